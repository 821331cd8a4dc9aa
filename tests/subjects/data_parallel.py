"""DistributedDataParallel: every rank has its rows of the batch, and a copy of the model."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import parity
from parity import Program
from tests.subjects.models import adamw, mean_square, mlp


def ddp(full, mesh):
    model = DistributedDataParallel(mlp(), process_group=mesh.get_group())
    model.module.load_state_dict(full)
    return model


@parity.matrix(dp=[1, 2, 3, 4])
def check_ddp(case):
    """DDP, three steps of AdamW."""
    case.check(mlp, ddp, [torch.randn(12, 10)], data={"dp": 0}, optimizer=adamw, steps=3)


@parity.matrix(dp=[2, 3, 4])
def check_ddp_uneven_rows(case):
    """DDP, eleven rows: ranks have unequal shares."""
    case.check(mlp, ddp, [torch.randn(11, 10)], data={"dp": 0})


def no_sync(full, mesh):
    model = DistributedDataParallel(mlp(), process_group=mesh.get_group())
    model.module.load_state_dict(full)

    def step(x):
        with model.no_sync():
            mean_square(early := model(x[:2])).div(2).backward()
        mean_square(late := model(x[2:])).div(2).backward()
        return torch.cat([early, late])

    return Program(model, step)


@parity.matrix(dp=[1, 2, 3, 4])
def check_ddp_no_sync(case):
    """DDP, gradients accumulated under `no_sync`."""
    case.check(mlp, no_sync, [torch.randn(4 * case["dp"], 10)], loss=mean_square, data={"dp": 0})


def sharing(full, mesh):
    model = DistributedDataParallel(mlp(), process_group=mesh.get_group())
    model.module.load_state_dict(full)

    def step(*batch):
        x, t = (rows.chunk(mesh.size())[mesh.get_local_rank()] for rows in batch)
        mse_loss(y := model(x), t).backward()
        return y

    return Program(model, step)


@parity.matrix(dp=[2, 3, 4])
def check_ddp_own_share(case):
    """DDP, a step that takes its own share of the batch."""
    batch = torch.randn(12, 10), torch.randn(12, 6)
    case.check(mlp, sharing, batch[:1], targets=batch[1:], loss=mse_loss)
