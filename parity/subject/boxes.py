"""A set of elements as boxes: few of them where it is regular, whatever order it is kept in."""

from __future__ import annotations

import torch
from torch import Tensor

Span = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape


def boxes_of(mask: Tensor) -> list[Span]:
    """Boxes that tile the True elements of `mask`, none of which overlap.

    Slices that are alike and follow each other are one box along their dim: a slice of any dims is
    one box, a piece of the flattened tensor at most 2 n - 1 of them for n dims.
    """
    if mask.ndim == 0:
        return [((), ())] if mask.item() else []
    if not mask.any():
        return []
    alike, counts = torch.unique_consecutive(
        mask.reshape(mask.shape[0], -1), dim=0, return_counts=True
    )
    boxes, start = [], 0
    for row, count in zip(alike, counts.tolist(), strict=True):
        for offset, size in boxes_of(row.reshape(mask.shape[1:])):
            boxes.append(((start, *offset), (count, *size)))
        start += count
    return boxes
