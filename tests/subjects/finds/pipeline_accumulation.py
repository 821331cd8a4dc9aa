"""A pipeline schedule that is called twice before a step divides the first gradient once more."""

import torch
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import mse_loss

import parity
from tests.subjects.models import mlp


def accumulating(full, mesh):
    n, rank, model = mesh.size(), mesh.get_local_rank(), mlp()
    model.load_state_dict(full)
    layers = model[8 * rank // n : 8 * (rank + 1) // n]
    stage = PipelineStage(layers, rank, n, torch.device("cpu"), group=mesh.get_group())
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, t: mse_loss(y, t) / 2)

    def step(*batch):
        halves = zip(*(rows.chunk(2) for rows in batch), strict=True)
        outputs = [schedule.step(*[x][rank:], target=t) for x, t in halves]
        return torch.cat(outputs) if rank == n - 1 else None

    return parity.Program(layers, step)


@parity.matrix(pp=[1, 2])
def check_pipeline_accumulation(case):
    x, t = torch.randn(8, 10), torch.randn(8, 6)
    case.check(mlp, accumulating, [x], targets=[t], loss=mse_loss)


WRONG = "gradient of 7.bias"
WORDS = ()
