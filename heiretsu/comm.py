"""What ranks say to each other: sums, their adjoints as a table of pairs, and stage to stage.

With mesh.py the only module that speaks to torch.distributed. On an axis of size 1 everything here
is the identity, so the one-rank program is the same program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heiretsu.mesh import Mesh

Operator = Callable[[Tensor, Mesh, str], Tensor]


def keep(x: Tensor, mesh: Mesh, axis: str) -> Tensor:
    return x


def all_sum(x: Tensor, mesh: Mesh, axis: str) -> Tensor:
    return _all_reduce(x, mesh, axis, dist.ReduceOp.SUM)


def all_max(x: Tensor, mesh: Mesh, axis: str) -> Tensor:
    return _all_reduce(x, mesh, axis, dist.ReduceOp.MAX)


def _all_reduce(x: Tensor, mesh: Mesh, axis: str, op: dist.ReduceOp.RedOpType) -> Tensor:
    if mesh.size(axis) == 1:
        return x
    # A copy: autograd may need the operand again, and a collective works in place.
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, op, group=mesh.group(axis))
    return y


# name: (forward, backward), the backward being the adjoint of the forward. `copy` and `reduce` are
# f and g of Megatron-LM (arXiv 1909.08053, figure 3): f opens a region in which each rank computes
# a part, g closes it.
PAIRS: dict[str, tuple[Operator, Operator]] = {
    "copy": (keep, all_sum),
    "reduce": (all_sum, keep),
}


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, mesh: Mesh, axis: str) -> Tensor:
        ctx.pair = name, mesh, axis
        y = PAIRS[name][0](x, mesh, axis)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        name, mesh, axis = ctx.pair
        return PAIRS[name][1](grads[0], mesh, axis), None, None, None


def copy(x: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """Every rank of the axis goes on with `x`, each for its own part: their gradients add up."""
    return x if mesh.size(axis) == 1 else _Pair.apply(x, "copy", mesh, axis)  # type: ignore[no-untyped-call]


def reduce(x: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """`x` is one term of a sum over the axis: all ranks go on with the sum."""
    return x if mesh.size(axis) == 1 else _Pair.apply(x, "reduce", mesh, axis)  # type: ignore[no-untyped-call]


class StageLink:
    """The wires between pipeline stages: sends return at once, receives wait.

    Downstream (activations) and upstream (gradients) are separate groups: see Mesh. What is sent
    stays referenced until `flush`, since the transfer may still read it.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.in_flight: list[tuple[dist.Work, Tensor]] = []

    def send(self, x: Tensor, stage: int) -> None:
        x = x.contiguous()
        work = dist.isend(x, self._rank(stage), group=self._group(self.mesh.at.pp, stage))
        assert work is not None
        self.in_flight.append((work, x))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        dist.recv(x, self._rank(stage), group=self._group(stage, self.mesh.at.pp))
        return x

    def flush(self) -> None:
        while self.in_flight:
            work, _ = self.in_flight.pop(0)
            work.wait()

    def _rank(self, stage: int) -> int:
        return self.mesh.topology.rank(self.mesh.at._replace(pp=stage))

    def _group(self, source: int, target: int) -> dist.ProcessGroup:
        return self.mesh.group("pp" if source < target else "pp upstream")
