"""Pieces to the whole: gaps, overlaps and copies that disagree are findings, not crashes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from itertools import combinations
from math import prod
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from parity.trace import Piece

P = ParamSpec("P")
R = TypeVar("R")


def on_one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """Judging is many small operations: threads that meet after each of them, on cores that others
    use too, made it 30 times slower.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return call


class Finding(NamedTuple):
    """Something wrong with the pieces themselves; no baseline was needed to see it."""

    status: str  # split, hole, overlap, shape, dtype
    text: str


class Whole(NamedTuple):
    """The joined tensor (None unless the pieces tile one shape), and what was seen on the way."""

    tensor: Tensor | None
    copies: int  # pieces beyond the first of their box, each compared bit by bit
    findings: list[Finding]


def join(pieces: list[Piece], shapes: list[tuple[int, ...]]) -> Whole:
    """Put the pieces together; of several copies of a box the lowest rank's is taken."""
    if len(set(shapes)) > 1:
        said = ", ".join(f"rank {p.rank} says {s}" for p, s in zip(pieces, shapes, strict=True))
        return Whole(None, 0, [Finding("shape", f"ranks disagree about the shape: {said}")])
    dtypes = {str(p.tensor.dtype): p.rank for p in reversed(pieces)}
    if len(dtypes) > 1:
        said = ", ".join(f"rank {rank} holds {dtype}" for dtype, rank in dtypes.items())
        return Whole(None, 0, [Finding("dtype", f"ranks disagree about the dtype: {said}")])
    for rank, offset, tensor in pieces:
        if any(i + n > end for i, n, end in zip(offset, tensor.shape, shapes[0], strict=True)):
            text = f"{tuple(tensor.shape)} at {offset} reaches beyond the whole of {shapes[0]}"
            return Whole(None, 0, [Finding("shape", f"the piece of rank {rank}, {text}")])
    boxes: dict[tuple[tuple[int, ...], ...], list[Piece]] = {}
    for piece in pieces:
        boxes.setdefault((piece.offset, tuple(piece.tensor.shape)), []).append(piece)
    firsts = [copies[0] for copies in boxes.values() if copies[0].tensor.numel()]
    tiling = _tiling(firsts, shapes[0])
    findings = [*_splits(boxes.values()), *tiling]
    copies = len(pieces) - len(boxes)
    if tiling:
        return Whole(None, copies, findings)
    if len(firsts) == 1:
        return Whole(firsts[0].tensor, copies, findings)
    whole = torch.empty(shapes[0], dtype=pieces[0].tensor.dtype)
    for _, offset, tensor in firsts:
        whole[_slices(offset, tensor)] = tensor
    return Whole(whole, copies, findings)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: NaN equals the same NaN, and 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _splits(boxes: Iterable[list[Piece]]) -> list[Finding]:
    for first, *others in boxes:
        for other in others:
            if not same_bits(first.tensor, other.tensor):
                return [Finding("split", _split_text(first, other))]
    return []


def _split_text(a: Piece, b: Piece) -> str:
    count = int((a.tensor != b.tensor).sum())
    wide = torch.complex128 if a.tensor.is_complex() else torch.float64
    far = (a.tensor.to(wide) - b.tensor.to(wide)).abs().max().item()
    who = f"ranks {a.rank} and {b.rank} hold different copies"
    if a.rank == b.rank:
        who = f"rank {a.rank} holds two copies that differ"
    return f"{who} ({count} of {a.tensor.numel()} elements differ, by up to {far:.1e})"


def _tiling(pieces: list[Piece], shape: tuple[int, ...]) -> list[Finding]:
    overlaps = [(a.rank, b.rank) for a, b in combinations(pieces, 2) if _overlap(a, b)]
    if overlaps:
        covered = torch.zeros(shape, dtype=torch.bool)
        for _, offset, tensor in pieces:
            covered[_slices(offset, tensor)] = True
        held = int(covered.sum())
    else:
        held = sum(piece.tensor.numel() for piece in pieces)
    findings = []
    if overlaps:
        a, b = overlaps[0]
        text = f"the pieces of ranks {a} and {b} cover the same elements in part"
        findings.append(Finding("overlap", text))
    if held < prod(shape):
        text = f"{prod(shape) - held} of {prod(shape)} elements are on no rank"
        findings.append(Finding("hole", text))
    return findings


def _overlap(a: Piece, b: Piece) -> bool:
    return all(
        max(i, j) < min(i + m, j + n)
        for i, m, j, n in zip(a.offset, a.tensor.shape, b.offset, b.tensor.shape, strict=True)
    )


def _slices(offset: tuple[int, ...], tensor: Tensor) -> tuple[slice, ...]:
    return tuple(slice(i, i + n) for i, n in zip(offset, tensor.shape, strict=True))
