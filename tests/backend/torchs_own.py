"""torch's own parallel code, unmodified, each against the same computation on one process.

Every function runs on all ranks of a world and returns the largest relative error that this rank
saw. Models and data are drawn from fixed seeds, in float64.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

BATCH, WIDTH = 24, 24


def mlp(layers: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)]
    return nn.Sequential(*parts).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def trained() -> nn.Sequential:
    """What one process makes of the whole batch."""
    model = mlp()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), *data())
    return model


def worst(model: nn.Module, reference: nn.Module) -> float:
    whole = dict(reference.named_parameters())
    return max(
        error(p.full_tensor() if isinstance(p, DTensor) else p.detach(), whole[name].detach())
        for name, p in model.named_parameters()
    )


def ddp() -> float:
    x, y = data()
    model = mlp()
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)
    train(wrapped, torch.optim.AdamW(model.parameters(), lr=0.01), mine(x), mine(y))
    return worst(model, trained())


def fsdp2() -> float:
    x, y = data()
    model = mlp()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), mine(x), mine(y))
    return worst(model, trained())


def hsdp() -> float:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    x, y = data()
    model = mlp()
    fully_shard(model, mesh=mesh)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), mine(x), mine(y))
    return worst(model, trained())


def zero_redundancy() -> float:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    x, y = data()
    model = mlp()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    train(wrapped, optimizer, mine(x), mine(y))
    return worst(model, trained())


def tensor_parallel() -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model, (x, y) = mlp(1), data()
    reference = copy.deepcopy(model)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for m in (model, reference):
        train(m, torch.optim.AdamW(m.parameters(), lr=0.01), x, y)
    return worst(model, reference)


def sequence_parallel() -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(1)
    norm, up, down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
    model = nn.Sequential(norm, up, nn.GELU(), down).double()
    reference = copy.deepcopy(model)
    x = data()[0].view(1, BATCH, WIDTH)
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    out = model(distribute_tensor(x, mesh, [Shard(1)]))
    out.full_tensor().square().sum().backward()
    want = reference(x)
    want.square().sum().backward()
    grads = [
        error(p.grad.full_tensor(), q.grad)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
        if isinstance(p.grad, DTensor) and q.grad is not None
    ]
    assert len(grads) >= 4
    return max(error(out.full_tensor().detach(), want.detach()), *grads)


def redistribution() -> float:
    """DTensor from every placement to every other, on a mesh of two axes."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2))
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = 0.0
    for a in (Shard(0), Shard(1), Replicate()):
        for b in (Shard(0), Shard(1), Replicate()):
            y = distribute_tensor(x, mesh, [a, b]).redistribute(mesh, [b, a])
            found = max(found, error(y.full_tensor(), x))
    return found


def context_parallel() -> float:
    """torch's ring attention. Its `context_parallel` scope has no rule for the attention of CPUs
    ("no sharding strategy", torch 2.13), so this calls the ring underneath, as the scope does.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(2, 4, 8 * world, 16, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ring._cp_options.enable_load_balance = False
    ring._cp_options.convert_to_f32 = False
    own = [t.chunk(world, 2)[rank].contiguous() for t in (q, k, v)]
    out, *_ = ring._templated_ring_attention(
        dist.group.WORLD,
        2,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        *own,
        is_causal=True,
    )
    return error(out, want.chunk(world, 2)[rank])


def checkpoint() -> float:
    """Save under one cut, load under another."""
    import torch.distributed.checkpoint as dcp

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.arange(96, dtype=torch.float64).view(12, 8)
    folder = [tempfile.mkdtemp(prefix="parity-dcp-")] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(folder)
    dcp.save({"x": distribute_tensor(x, mesh, [Shard(0)])}, checkpoint_id=folder[0])
    into = {"x": distribute_tensor(torch.zeros_like(x), mesh, [Shard(1)])}
    dcp.load(into, checkpoint_id=folder[0])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return error(into["x"].full_tensor(), x)


SCHEDULES = {
    "GPipe": (schedules.ScheduleGPipe, 1),
    "1F1B": (schedules.Schedule1F1B, 1),
    "Interleaved1F1B": (schedules.ScheduleInterleaved1F1B, 2),
    "LoopedBFS": (schedules.ScheduleLoopedBFS, 2),
    "InterleavedZeroBubble": (schedules.ScheduleInterleavedZeroBubble, 2),
    "ZBVZeroBubble": (schedules.ScheduleZBVZeroBubble, 2),
    "DualPipeV": (schedules.ScheduleDualPipeV, 2),
}
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


def pipeline(name: str) -> float:
    kind, chunks = SCHEDULES[name]
    world, rank = dist.get_world_size(), dist.get_rank()
    count = world * chunks
    whole = mlp(count)
    parts = [whole[3 * i : 3 * i + 3] for i in range(count)]
    second = count - 1 - rank if name in V_SHAPED else rank + world
    own = [rank, second][:chunks]
    device = torch.device("cpu")
    stages = [PipelineStage(copy.deepcopy(parts[i]), i, count, device) for i in own]
    microbatches = 2 * world
    x, y = (t.repeat(4, 1)[: 4 * microbatches] for t in data())
    first = stages[0] if chunks == 1 else stages
    schedule = kind(first, microbatches, loss_fn=F.mse_loss)  # type: ignore[arg-type]
    is_last = count - 1 in own
    args = (x,) if 0 in own else ()
    schedule.step(*args, **({"target": y} if is_last else {}))
    F.mse_loss(whole(x), y).backward()
    return max(
        error(p.grad, q.grad)
        for stage, i in zip(stages, own, strict=True)
        for p, q in zip(stage.submod.parameters(), parts[i].parameters(), strict=True)
        if p.grad is not None and q.grad is not None
    )


EVERYWHERE: list[Callable[[], float]] = [
    ddp,
    fsdp2,
    hsdp,
    zero_redundancy,
    tensor_parallel,
    sequence_parallel,
    redistribution,
    context_parallel,
    checkpoint,
]


def run(name: str) -> float:
    """One of the above, by its name; on every rank."""
    if name in SCHEDULES:
        return pipeline(name)
    return next(f for f in EVERYWHERE if f.__name__ == name)()
