"""Reductions in rank order: ((x0 + x1) + x2) + ..., so every rank and every run has the same bits.

Numbers of 16 bits and fewer are added, multiplied and averaged in float32 and rounded once, at the
end; all others in their own type. Integers wrap around; their average is cut towards zero. Of
booleans the sum is "any", the product "all", and there is no average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

Fold = Callable[[Sequence[Tensor], Tensor], None]

_KINDS = dist.ReduceOp.RedOpType
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


def name_of(op: dist.ReduceOp) -> str:
    kind: str = _kind(op).name
    return kind if kind != "PREMUL_SUM" else f"PREMUL_SUM by {_factor(op)}"


def objection(op: dist.ReduceOp, dtype: torch.dtype) -> str:
    """Why this reduction has no meaning for this type; empty if it has."""
    kind, sort = _kind(op), name_of(op)
    if kind in _BITWISE and (dtype.is_floating_point or dtype.is_complex):
        return f"{sort} works on bits, {dtype} has none to speak of: use integers"
    if kind in _ORDERED and dtype.is_complex:
        return f"{sort} needs an order, {dtype} has none: reduce the real view"
    if kind is _KINDS.AVG and dtype is torch.bool:
        return "there is no average of booleans: reduce them as numbers"
    if kind is _KINDS.PREMUL_SUM and not (dtype.is_floating_point or dtype.is_complex):
        return f"PREMUL_SUM multiplies by a real number, which {dtype} cannot hold"
    return ""


def fold_by(op: dist.ReduceOp) -> Fold:
    return partial(_fold, _kind(op), _factor(op))


def _kind(op: dist.ReduceOp) -> dist.ReduceOp.RedOpType:
    return op.op if isinstance(op, dist.ReduceOp) else op


def _factor(op: dist.ReduceOp) -> float | Tensor | None:
    return getattr(op, "factor", None) if _kind(op) is _KINDS.PREMUL_SUM else None


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
        total, rest = total * factor, [t * factor for t in rest]
    if dtype is torch.bool:
        kind = {_KINDS.SUM: _KINDS.BOR, _KINDS.PRODUCT: _KINDS.BAND}.get(kind, kind)
    step = _STEPS[kind]
    for term in rest:
        step(total, term)
    if kind is _KINDS.AVG:
        if total.is_floating_point() or total.is_complex():
            total /= len(terms)
        else:
            total = torch.div(total, len(terms), rounding_mode="trunc")
    out.copy_(total)
