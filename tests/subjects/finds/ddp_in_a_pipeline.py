"""DDP in a stage fails in the second step: the schedule's trial backward has run its hooks already.

`RuntimeError: params_.size() == rebuilt_param_indices_.size() INTERNAL ASSERT FAILED`
"""

import torch
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import parity
from tests.subjects.models import adamw, mlp


def pipeline(full, mesh):
    model = mlp()
    model.load_state_dict(full)
    stage = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    stages = PipelineStage(stage, 0, 1, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = ScheduleGPipe(stages, 2, loss_fn=mse_loss)
    return parity.Program(stage, lambda x, t: schedule.step(x, target=t))


@parity.matrix(dp=[1, 2], pp=[1])
def check_ddp_in_a_pipeline(case):
    x, t = torch.randn(8, 10), torch.randn(8, 6)
    data = {"data": {"dp": 0}, "optimizer": adamw, "steps": 2}
    case.check(mlp, pipeline, [x], targets=[t], loss=mse_loss, **data)


FAILS = "rebuilt parameter indices size is not same"
