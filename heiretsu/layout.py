"""How a whole tensor is cut over the mesh, stated once per parameter, as a value.

Layers allocate by it, initialisation slices by it, the gradient norm counts by it, and whoever
compares or saves learns from it where a local piece lies in the whole. Sizes need not divide:
pieces differ by at most one, the first ones being larger.

>>> qkv = Layout((12, 4), Cut("tp", dim=0, blocks=3))  # q, k and v, stacked: each is cut
>>> [(local, whole, length) for local, whole, length in qkv.spans(parts=2, index=1)]
[(0, 2, 2), (2, 6, 2), (4, 10, 2)]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def share(size: int, parts: int, index: int) -> tuple[int, int]:
    """The (start, length) of part `index` when `size` is cut into `parts`.

    The first `size % parts` parts are one longer, as in torch.tensor_split.
    """
    length, longer = divmod(size, parts)
    return index * length + min(index, longer), length + (index < longer)


class Cut(NamedTuple):
    """Tensor dimension `dim` is cut over mesh axis `axis`; fused tensors are cut in each block."""

    axis: str
    dim: int
    blocks: int = 1


class Span(NamedTuple):
    """`length` rows from `local` on in a piece are those from `whole` on in the whole."""

    local: int
    whole: int
    length: int


class Layout(NamedTuple):
    """The shape of the whole, and how it is cut; no cut: every rank holds all of it."""

    shape: tuple[int, ...]
    cut: Cut | None = None

    def spans(self, parts: int, index: int) -> list[Span]:
        """Where piece `index` of `parts` lies along the dimension that is cut."""
        assert self.cut is not None
        block = self.shape[self.cut.dim] // self.cut.blocks
        start, length = share(block, parts, index)
        return [Span(i * length, i * block + start, length) for i in range(self.cut.blocks)]

    def local_shape(self, parts: int, index: int) -> tuple[int, ...]:
        if self.cut is None:
            return self.shape
        shape = list(self.shape)
        shape[self.cut.dim] = sum(span.length for span in self.spans(parts, index))
        return tuple(shape)

    def take(self, whole: Tensor, parts: int, index: int) -> Tensor:
        """Piece `index` of `whole`."""
        if self.cut is None:
            return whole
        dim = self.cut.dim
        return torch.cat([whole.narrow(dim, s, n) for _, s, n in self.spans(parts, index)], dim)

    def place(self, local: Tensor, parts: int, index: int) -> list[tuple[tuple[int, ...], Tensor]]:
        """The boxes of a piece, each with its offset in the whole."""
        if self.cut is None:
            return [((0,) * len(self.shape), local)]
        dim, boxes = self.cut.dim, []
        for start, whole, length in self.spans(parts, index):
            offset = [0] * len(self.shape)
            offset[dim] = whole
            boxes.append((tuple(offset), local.narrow(dim, start, length)))
        return boxes
