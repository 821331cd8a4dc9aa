"""FSDP2: fully_shard cuts parameters over ranks, gathers them for a forward, scatters gradients."""

import torch
from torch.distributed.fsdp import fully_shard

import parity
from tests.subjects.models import adamw, mlp


def fsdp(full, mesh):
    model = mlp()
    model.load_state_dict(full)
    for layer in model[:4]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@parity.matrix(dp=[1, 2, 3, 4])
def check_fsdp(case):
    """FSDP2, sizes that no number of ranks divides, AdamW."""
    case.check(mlp, fsdp, [torch.randn(12, 10)], data={"dp": 0}, optimizer=adamw, steps=3)


@parity.matrix(replicate=[1, 2], shard=[2])
def check_hsdp(case):
    """FSDP2, shards that are replicated (HSDP), AdamW."""
    data = {"replicate": 0, "shard": 0}
    case.check(mlp, fsdp, [torch.randn(12, 10)], data=data, optimizer=adamw, steps=3)


def kept(full, mesh):
    model = mlp()
    model.load_state_dict(full)
    for layer in model[:4]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


@parity.matrix(dp=[2, 3])
def check_fsdp_kept(case):
    """FSDP2, parameters kept after the forward, AdamW."""
    case.check(mlp, kept, [torch.randn(12, 10)], data={"dp": 0}, optimizer=adamw, steps=3)
