"""Tensor parallelism by parallelize_module and FSDP2 over it, or all on one process.

python program.py FOLDER MODE ...: trains once for each mode (clean, factor, sketch), each recorded
to a folder of its name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import parity

WORLD, WIDTH, INNER = int(os.environ.get("WORLD_SIZE", "1")), 10, 42  # 42 over 2 x 2 is uneven


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def train(folder: Path, mode: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(Block(), Block())
    place, count = 0, 1
    if WORLD > 1:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        for block in model:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        place, count = mesh["dp"].get_local_rank(), 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = parity.record(model, folder / mode, optimizer=optimizer, sketch=mode == "sketch")
    torch.manual_seed(2)
    for x in torch.randn(3, 8, WIDTH):
        mine = x.chunk(count)[place]
        loss = (model(mine) - mine.roll(1, -1)).square().mean()
        recorder.loss(loss, mean="dp")
        loss.backward()
        if mode == "factor":
            model[1].up.weight.grad.mul_(2)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    if WORLD > 1:
        dist.init_process_group("gloo")
    for mode in sys.argv[2:]:
        train(Path(sys.argv[1]), mode)
    if WORLD > 1:
        dist.destroy_process_group()
