"""A pipeline takes ten rows as microbatches of 3, 3, 3 and 1, and weighs each of them 1/4."""

import torch
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import mse_loss

import parity
from tests.subjects.models import mlp


def pipeline(full, mesh):
    model = mlp()
    model.load_state_dict(full)
    stage = PipelineStage(model, 0, 1, torch.device("cpu"), group=mesh.get_group())
    schedule = ScheduleGPipe(stage, 4, loss_fn=mse_loss)
    return parity.Program(model, lambda x, t: schedule.step(x, target=t))


@parity.matrix(pp=[1])
def check_uneven_microbatches(case):
    x, t = torch.randn(10, 10), torch.randn(10, 6)
    case.check(mlp, pipeline, [x], targets=[t], loss=mse_loss)


WRONG = "gradient of 7.bias"
WORDS = ()
