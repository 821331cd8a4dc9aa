"""torch.distributed.pipelining: each rank has some layers, a schedule passes microbatches on."""

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, get_schedule_class
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import parity
from parity import Program
from tests.subjects.models import mlp


@parity.matrix(pp=[1, 2, 3, 4], options={"schedule": ["GPipe", "1F1B"]})
def check_pipeline(case):
    """pipelining: one stage per rank."""

    def pipeline(full, mesh):
        n, rank, model = mesh.size(), mesh.get_local_rank(), mlp()
        model.load_state_dict(full)
        layers = model[8 * rank // n : 8 * (rank + 1) // n]
        stage = PipelineStage(layers, rank, n, torch.device("cpu"), group=mesh.get_group())
        schedule = get_schedule_class(case["schedule"])(stage, 4, loss_fn=mse_loss)
        return Program(layers, lambda x, t: schedule.step(*[x][rank:], target=t))

    x, t = torch.randn(12, 10), torch.randn(12, 6)
    case.check(mlp, pipeline, [x], targets=[t], loss=mse_loss)


@parity.matrix(pp=[1, 2, 3, 4], options={"schedule": ["Interleaved1F1B", "InterleavedZeroBubble"]})
def check_interleaved(case):
    """pipelining: two stages per rank."""

    def interleaved(full, mesh):
        n, rank, model = 2 * mesh.size(), mesh.get_local_rank(), mlp()
        model.load_state_dict(full)
        layers = {i: model[8 * i // n : 8 * (i + 1) // n] for i in (rank, rank + n // 2)}
        cpu, group = torch.device("cpu"), mesh.get_group()
        stages = [PipelineStage(layers[i], i, n, cpu, group=group) for i in layers]
        schedule = get_schedule_class(case["schedule"])(stages, 4, loss_fn=mse_loss)
        return Program([*layers.values()], lambda x, t: schedule.step(*[x][rank:], target=t))

    x, t = torch.randn(12, 10), torch.randn(12, 6)
    case.check(mlp, interleaved, [x], targets=[t], loss=mse_loss)


def fsdp_pp(full, mesh):
    n, rank, model = mesh["pp"].size(), mesh["pp"].get_local_rank(), mlp()
    model.load_state_dict(full)
    layers = fully_shard(model[8 * rank // n : 8 * (rank + 1) // n], mesh=mesh["dp"])
    stage = PipelineStage(layers, rank, n, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = Schedule1F1B(stage, 2, loss_fn=mse_loss)
    return Program(layers, lambda x, t: schedule.step(*[x][rank:], target=t))


@parity.matrix(dp=[1, 2], pp=[1, 2])
def check_fsdp_pp(case):
    """pipelining of FSDP2 stages, 1F1B."""
    x, t = torch.randn(12, 10), torch.randn(12, 6)
    case.check(mlp, fsdp_pp, [x], targets=[t], loss=mse_loss, data={"dp": 0})


def ddp_pp(full, mesh):
    n, rank, model = mesh["pp"].size(), mesh["pp"].get_local_rank(), mlp()
    model.load_state_dict(full)
    layers = model[8 * rank // n : 8 * (rank + 1) // n]
    layers = DistributedDataParallel(layers, process_group=mesh["dp"].get_group())
    stage = PipelineStage(layers, rank, n, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = Schedule1F1B(stage, 2, loss_fn=mse_loss)
    return Program(layers, lambda x, t: schedule.step(*[x][rank:], target=t))


@parity.matrix(dp=[1, 2], pp=[1, 2])
def check_ddp_pp(case):
    """pipelining of DDP stages, 1F1B."""
    x, t = torch.randn(12, 10), torch.randn(12, 6)
    case.check(mlp, ddp_pp, [x], targets=[t], loss=mse_loss, data={"dp": 0})
