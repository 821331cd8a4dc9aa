"""Boxes of a tensor: cutting one into parts of bounded size, and what two have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

# Elements that are held at a time. Some twenty tensors of this size, in float64, are what comparing
# needs: 40 MB, whatever the size of the model.
LIMIT = 1 << 18


class Box(NamedTuple):
    """`size` elements from `offset` on, per dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(i + n for i, n in zip(self.offset, self.size, strict=True))

    @property
    def numel(self) -> int:
        return prod(self.size)

    def within(self, other: Box) -> tuple[slice, ...]:
        """Where this box lies in the tensor of `other`, which contains it."""
        starts = [i - j for i, j in zip(self.offset, other.offset, strict=True)]
        return tuple(slice(i, i + n) for i, n in zip(starts, self.size, strict=True))


def whole(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def common(a: Box, b: Box) -> Box | None:
    """What lies in both; None where nothing does."""
    starts = tuple(max(i, j) for i, j in zip(a.offset, b.offset, strict=True))
    size = tuple(min(i, j) - k for i, j, k in zip(a.end, b.end, starts, strict=True))
    return Box(starts, size) if all(n > 0 for n in size) else None


def regions(shape: Sequence[int], limit: int = LIMIT) -> Iterator[Box]:
    """Boxes of at most `limit` elements that tile the whole, in the order of its elements.

    Rows are kept together; only one that is longer than `limit` is split.
    """
    if not prod(shape):
        return
    dim = 0  # the first one of which several can be had at a time
    while dim < len(shape) - 1 and prod(shape[dim + 1 :]) > limit:
        dim += 1
    if not shape:
        yield whole(shape)
        return
    step = max(1, limit // prod(shape[dim + 1 :]))
    for lead in _indices(shape[:dim]):
        for start in range(0, shape[dim], step):
            size = min(step, shape[dim] - start)
            rest = tuple(shape[dim + 1 :])
            yield Box((*lead, start, *(0 for _ in rest)), (*(1 for _ in lead), size, *rest))


def _indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for flat in range(prod(shape)):
        index = []
        for n in reversed(shape):
            flat, i = divmod(flat, n)
            index.append(i)
        yield tuple(reversed(index))


def flat_index(box: Box, shape: Sequence[int]) -> Tensor:
    """The place of each element of `box` among those of a whole of `shape`, int64."""
    index = torch.zeros(box.size, dtype=torch.int64)
    for dim, (start, size) in enumerate(zip(*box, strict=True)):
        stride = prod(shape[dim + 1 :])
        along = torch.arange(start, start + size) * stride
        index += along.view(-1, *(1 for _ in shape[dim + 1 :]))
    return index


def overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """Two of them that have elements in common."""
    for (i, a), (j, b) in combinations(enumerate(boxes), 2):
        if common(a, b) is not None:
            return i, j
    return None
