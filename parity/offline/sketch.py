"""Sketches: 64 numbers in place of a tensor, such that those of its parts add up to its own.

Element i of the whole is added, with a random sign, to one of 16 sums; there are four such tables,
drawn anew. Signs and sums follow from i alone, so a rank needs to know where its piece lies and
nothing of other ranks, and sketches add, subtract and scale as the tensors do. Half the norm of a
sketch estimates the norm of the tensor with a standard deviation of 9 percent, whatever it holds;
of two tensors, half the norm of the difference of sketches estimates how far they are apart.
Four tables, because two errors that cancel in one do so in all four once in a million times. A
whole of up to 64 elements is its own sketch, times two: exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from math import prod, sqrt

import torch
from torch import Tensor

from parity.bounds import as_float64
from parity.offline.boxes import Box, flat_index, regions

TABLES, SUMS = 4, 16
SIZE = TABLES * SUMS
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # of splitmix64


def sketch(tensor: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Of the piece at `offset` of a whole of `shape`: float64; of complex numbers two."""
    parts = [tensor] if not tensor.is_complex() else list(torch.view_as_real(tensor).unbind(-1))
    return torch.cat([_sketch(part, tuple(offset), tuple(shape)) for part in parts])


def size(vector: Tensor) -> float:
    """The norm of the tensor that this is the sketch of, give or take 9 percent."""
    return float(vector.norm()) / sqrt(TABLES)


def _sketch(tensor: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    sums = torch.zeros(SIZE, dtype=torch.float64)
    for region in regions(tensor.shape):
        values = as_float64(tensor[region.within(Box((0,) * tensor.ndim, tuple(tensor.shape)))])
        place = Box(tuple(i + j for i, j in zip(offset, region.offset, strict=True)), region.size)
        index = flat_index(place, shape).reshape(-1)
        sums += _add_up(values.reshape(-1), index, prod(shape) <= SIZE)
    return sums


def _add_up(values: Tensor, index: Tensor, is_small: bool) -> Tensor:
    if is_small:
        return torch.bincount(index, values, minlength=SIZE) * sqrt(TABLES)
    bits = _mix(index)
    tables = []
    for table in range(TABLES):
        # Four bits choose the sum; the fifth, whether the element is added or subtracted.
        chosen = (bits >> (5 * table)) & (2 * SUMS - 1)
        both = torch.bincount(chosen, values, minlength=2 * SUMS)
        tables.append(both[:SUMS] - both[SUMS:])
    return torch.cat(tables)


def _mix(index: Tensor) -> Tensor:
    """64 bits that look random, from each index: splitmix64."""
    z = (index + 1) * _ODD[0]
    for shift, factor in ((30, _ODD[1]), (27, _ODD[2])):
        z = (z ^ _shifted(z, shift)) * factor
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in from the left: int64 has no such shift of its own."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def digest(tensor: Tensor) -> str:
    """Equal for copies that are equal to the bit."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return blake2b(flat.numpy().data, digest_size=16).hexdigest()
