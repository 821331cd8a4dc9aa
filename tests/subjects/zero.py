"""ZeroRedundancyOptimizer: each rank steps its share of the parameters, and sends them round."""

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import parity
from parity import Program
from tests.subjects.models import adamw, mlp


def zero(full, mesh):
    group, optimizer = mesh.get_group(), ZeroRedundancyOptimizer
    model = DistributedDataParallel(mlp(), process_group=group)
    model.module.load_state_dict(full)
    adamw = optimizer(model.parameters(), torch.optim.AdamW, process_group=group, lr=1e-2)
    return Program(model, optimizer=adamw)


@parity.matrix(dp=[1, 2, 3, 4])
def check_zero(case):
    """ZeroRedundancyOptimizer around AdamW, with DDP."""
    case.check(mlp, zero, [torch.randn(12, 10)], data={"dp": 0}, optimizer=adamw, steps=3)
