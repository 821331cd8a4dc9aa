"""A parallel MLP by hand over tp, right, and with the mistakes that people make in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


class Copy(torch.autograd.Function):
    """Megatron's f: itself in the forward, a sum over the group in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        slope = slope.clone()
        dist.all_reduce(slope, group=ctx.group)
        return slope, None


class Sum(torch.autograd.Function):
    """Megatron's g: a sum over the group in the forward, itself in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


class ParallelMLP(nn.Module):
    """`wrong` is the name of a mistake, or empty."""

    def __init__(self, full: Mapping[str, Tensor], mesh: DeviceMesh, wrong: str = "") -> None:
        super().__init__()
        n, r = mesh.size(), mesh.get_local_rank()
        self.group, self.wrong, self.n = mesh.get_group(), wrong, n
        up = full["0.weight"].tensor_split(n)[(r + 1) % n if wrong == "neighbour's" else r]
        self.up = nn.Parameter(up)
        self.up_bias = nn.Parameter(full["0.bias"].tensor_split(n)[r])
        down = torch.randn(8, 12) if wrong == "not loaded" else full["2.weight"]
        self.down = nn.Parameter(down.tensor_split(n, 1)[r].to(self.up.dtype))
        self.bias = nn.Parameter(full["2.bias"].clone())
        if wrong == "float32":
            self.bias = nn.Parameter(self.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        if self.wrong != "no sum in backward":
            x = Copy.apply(x, self.group)
        x = torch.relu(x @ self.up.T + self.up_bias) @ self.down.T
        if self.wrong == "bias n times":
            return Sum.apply(x + self.bias, self.group)
        if self.wrong == "averaged":
            return Sum.apply(x, self.group) / self.n + self.bias
        if self.wrong == "frozen":
            return Sum.apply(x, self.group) + self.bias.detach()
        if self.wrong != "no sum":
            x = Sum.apply(x, self.group)
        return x + self.bias
