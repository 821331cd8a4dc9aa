"""Reductions in rank order: ((x0 + x1) + x2) + ..., so every rank and every run has the same bits.

Numbers of 16 bits and fewer are added, multiplied and averaged in float32 and rounded once, at the
end; all others in their own type. Integers wrap around; their average is cut towards zero. Of
booleans the sum is "any", the product "all", and there is no average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Fold = Callable[[Sequence[Tensor], Tensor], None]

_KINDS: Any = dist.ReduceOp.RedOpType
_STEPS: dict[dist.ReduceOp.RedOpType, Callable[[Tensor, Tensor], Tensor]] = {
    _KINDS.SUM: Tensor.add_,
    _KINDS.AVG: Tensor.add_,
    _KINDS.PREMUL_SUM: Tensor.add_,
    _KINDS.PRODUCT: Tensor.mul_,
    _KINDS.MIN: lambda a, x: torch.minimum(a, x, out=a),
    _KINDS.MAX: lambda a, x: torch.maximum(a, x, out=a),
    _KINDS.BAND: Tensor.bitwise_and_,
    _KINDS.BOR: Tensor.bitwise_or_,
    _KINDS.BXOR: Tensor.bitwise_xor_,
}
_BITWISE = (_KINDS.BAND, _KINDS.BOR, _KINDS.BXOR)
_ORDERED = (_KINDS.MIN, _KINDS.MAX)


class Reduction(NamedTuple):
    """What a ReduceOp does to one dtype. `objection` says why it has no meaning, if it has none."""

    name: str
    fold: Fold
    objection: str


def reduction(op: Any, dtype: torch.dtype) -> Reduction:
    """Of a ReduceOp, or of its kind."""
    kind: Any = getattr(op, "op", op)  # a new object each time: compared by ==, never by `is`
    if kind == _KINDS.PREMUL_SUM:
        _, factor = op.__getstate__()  # before torch 2.13 it has no name of its own
        return _reduction(kind, dtype)._replace(
            name=f"PREMUL_SUM by {factor}", fold=partial(_fold, kind, factor)
        )
    return _reduction(kind, dtype)


@lru_cache(None)
def _reduction(kind: dist.ReduceOp.RedOpType, dtype: torch.dtype) -> Reduction:
    return Reduction(kind.name, partial(_fold, kind, None), _objection(kind, dtype))


def by_place(fold: Fold) -> Fold:
    """The same reduction in an order that depends on where an element lies in the buffer, as in the
    rings of gloo and NCCL: copies that are reduced in unequal buffers then differ in their bits.
    """

    def folded(terms: Sequence[Tensor], out: Tensor) -> None:
        n = len(terms)
        parts = [term.tensor_split(n) for term in terms]
        for i, place in enumerate(out.tensor_split(n)):
            fold([parts[(i + k) % n][i] for k in range(n)], place)

    return folded


def twice(kind: Reduction) -> Reduction:
    """The reduction of the results of a reduction, one from each member."""

    def folded(terms: Sequence[Tensor], out: Tensor) -> None:
        n = len(terms)
        kind.fold(terms, out)
        kind.fold([out] * n, out)

    return kind._replace(name=f"{kind.name} twice", fold=folded)


def _objection(kind: dist.ReduceOp.RedOpType, dtype: torch.dtype) -> str:
    if kind in _BITWISE and (dtype.is_floating_point or dtype.is_complex):
        return f"{kind.name} works on bits, {dtype} has none to speak of: use integers"
    if kind in _ORDERED and dtype.is_complex:
        return f"{kind.name} needs an order, {dtype} has none: reduce the real view"
    if kind == _KINDS.AVG and dtype is torch.bool:
        return "there is no average of booleans: reduce them as numbers"
    if kind == _KINDS.PREMUL_SUM and not (dtype.is_floating_point or dtype.is_complex):
        return f"PREMUL_SUM multiplies by a real number, which {dtype} cannot hold"
    return ""


def _fold(
    kind: dist.ReduceOp.RedOpType,
    factor: float | Tensor | None,
    terms: Sequence[Tensor],
    out: Tensor,
) -> None:
    """Write the reduction of equal-shaped `terms` to `out`, which may be one of them."""
    dtype = terms[0].dtype
    is_short = dtype.is_floating_point and dtype.itemsize <= 2
    if is_short and kind not in _ORDERED:
        total = terms[0].float()
        rest = [t.float() if dtype.itemsize == 1 else t for t in terms[1:]]
    elif dtype.itemsize == 1 and dtype.is_floating_point:
        total, rest = terms[0].float(), [t.float() for t in terms[1:]]
    else:
        total, rest = terms[0].clone(), list(terms[1:])
    if factor is not None:
        total, rest = total * factor, [t.to(total.dtype) * factor for t in rest]
    if dtype is torch.bool:
        kind = {_KINDS.SUM: _KINDS.BOR, _KINDS.PRODUCT: _KINDS.BAND}.get(kind, kind)
    step = _STEPS[kind]
    for term in rest:
        step(total, term)
    if kind == _KINDS.AVG:
        if total.is_floating_point() or total.is_complex():
            total /= len(terms)
        else:
            total = torch.div(total, len(terms), rounding_mode="trunc")
    out.copy_(total)
