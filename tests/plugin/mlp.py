"""What users write: an MLP cut over tp by hand, and a test of it."""

MLP = """
import parity
import pytest
import torch
import torch.distributed as dist
from torch import nn


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx, dy):
        dist.all_reduce(dy := dy.clone(), group=ctx.group)
        return dy, None


class Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        dist.all_reduce(x := x.clone(), group=group)
        return x

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class MyMLP(nn.Module):
    def __init__(self, full, mesh, reduce=True):
        super().__init__()
        n, r = mesh.size(), mesh.get_local_rank()
        self.group, self.reduce = mesh.get_group(), reduce
        self.up = nn.Parameter(full["0.weight"].tensor_split(n)[r])
        self.up_bias = nn.Parameter(full["0.bias"].tensor_split(n)[r])
        self.down = nn.Parameter(full["2.weight"].tensor_split(n, 1)[r])
        self.bias = nn.Parameter(full["2.bias"])

    def forward(self, x):
        h = torch.relu(Copy.apply(x, self.group) @ self.up.T + self.up_bias) @ self.down.T
        return (Reduce.apply(h, self.group) if self.reduce else h) + self.bias


def plain():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def check(case, change=lambda module: module, reduce=True):
    case.check(
        baseline=plain,
        candidate=lambda full, mesh: change(MyMLP(full, mesh["tp"], reduce)),
        inputs=[torch.randn(3, 8)],
    )
"""
