"""Zero-bubble schedules make gradients of weights apart, past the hooks by which DDP averages."""

import torch
from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import parity
from tests.subjects.models import mlp


def zero_bubble(full, mesh):
    model, group = mlp(), mesh["pp"].get_group()
    model.load_state_dict(full)
    halves = [
        DistributedDataParallel(half, process_group=mesh["dp"].get_group())
        for half in (model[:4], model[4:])
    ]
    cpu = torch.device("cpu")
    stages = [PipelineStage(half, i, 2, cpu, group=group) for i, half in enumerate(halves)]
    schedule = ScheduleInterleavedZeroBubble(stages, 4, loss_fn=mse_loss)
    return parity.Program(halves, lambda x, t: schedule.step(x, target=t))


@parity.matrix(dp=[1, 2], pp=[1])
def check_zero_bubble_ddp(case):
    x, t = torch.randn(8, 10), torch.randn(8, 6)
    case.check(mlp, zero_bubble, [x], targets=[t], loss=mse_loss, data={"dp": 0})


WRONG = "gradient of 7.bias"
WORDS = ("an average over dp is missing",)
