"""How a tensor is spread over the ranks of a run: boxes, copies of them, and terms of sums.

Where a piece was recorded without its place, it is found: a dimension is cut over an axis if what
the ranks along that axis hold of it adds up to the whole. So uneven cuts are found too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations, product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from parity.offline.boxes import Box, overlap, whole
from parity.offline.read import Recorded, Stored
from parity.whole import Finding

Cut = Mapping[int, tuple[str, ...]]
_MOST_AXES = 3  # that cut one dimension


class Source(NamedTuple):
    """A box of the whole as one rank holds it, or as several do, in terms that are to be added."""

    box: Box
    terms: Sequence[Stored]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.terms[0].rank

    def read(self, part: Box) -> Tensor:
        """`part`, of the whole, lies in the box."""
        start = tuple(i - j for i, j in zip(part.offset, self.box.offset, strict=True))
        return self._added([term.read(Box(start, part.size)) for term in self.terms])

    def sketch(self) -> Tensor:
        return self._added([term.sketch() for term in self.terms])

    def _added(self, terms: list[Tensor]) -> Tensor:
        if len(terms) == 1 and self.scale == 1.0:
            return terms[0]
        return torch.stack([term.double() for term in terms]).sum(0) * self.scale


class Spread(NamedTuple):
    """`boxes`: for each, its copies in order of the ranks. With findings that forbid reading it
    (`is_whole` is false) the boxes do not tile the shape.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: Sequence[Sequence[Source]]
    findings: Sequence[Finding]
    at: Sequence[Mapping[str, int]]
    is_sketch: bool
    is_whole: bool = True

    @property
    def copies(self) -> int:
        return sum(len(copies) - 1 for copies in self.boxes)

    @property
    def digests(self) -> Iterator[tuple[Source, Source]]:
        """Of sketches: pairs of copies that are not equal to the bit."""
        for first, *others in self.boxes:
            for other in others:
                pairs = zip(first.terms, other.terms, strict=False)
                if any(a.about.digest != b.about.digest for a, b in pairs):
                    yield first, other


def spread(pieces: Sequence[Stored], recorded: Recorded, cut: Cut | None = None) -> Spread:
    """`cut` places the pieces that have no place of their own; without it, they are all whole."""
    first, at = pieces[0].about, [h.at for h in recorded.headers]
    dtype: torch.dtype = getattr(torch, first.dtype)
    empty = Spread((), dtype, [], [], at, recorded.is_sketch, is_whole=False)
    if other := next((p for p in pieces if p.about.dtype != first.dtype), None):
        text = f"rank {pieces[0].rank} holds {first.dtype}, rank {other.rank} {other.about.dtype}"
        return empty._replace(
            findings=[Finding("dtype", f"ranks disagree about the dtype: {text}")]
        )
    if first.offset is None:
        own = {int(d): tuple(axes) for d, axes in (first.cut or {}).items()}
        shapes, boxes = _locate(pieces, own if first.cut is not None else cut or {}, at)
    else:
        shapes = [tuple(p.about.shape or ()) for p in pieces]
        boxes = [Box(tuple(p.about.offset or ()), tuple(p.about.size)) for p in pieces]
    if len(set(shapes)) > 1:
        odd = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
        text = f"rank {pieces[0].rank} says {shapes[0]}, rank {pieces[odd].rank} says {shapes[odd]}"
        return empty._replace(
            findings=[Finding("shape", f"ranks disagree about the shape: {text}")]
        )
    sources, findings = _sources(pieces, boxes, at)
    grouped: dict[Box, list[Source]] = {}
    for source in sources:
        grouped.setdefault(source.box, []).append(source)
    found = [*findings, *_tiling(list(grouped.values()), shapes[0])]
    listed = [copies for box, copies in grouped.items() if box.numel or len(grouped) == 1]
    return Spread(shapes[0], dtype, listed, found, at, recorded.is_sketch, not found)


def _locate(
    pieces: Sequence[Stored], cut: Cut, at: Sequence[Mapping[str, int]]
) -> tuple[list[tuple[int, ...]], list[Box]]:
    """The shape of the whole by each piece's word, and its box: running sums along the axes."""
    shapes, boxes = [], []
    for piece in pieces:
        shape, offset = list(piece.about.size), [0] * len(piece.about.size)
        for dim, axes in cut.items():
            here = at[piece.rank]
            line = [p for p in pieces if _is_beside(at[p.rank], here, axes)]
            before = [p for p in line if _order(at[p.rank], axes) < _order(here, axes)]
            shape[dim] = sum(p.about.size[dim] for p in line)
            offset[dim] = sum(p.about.size[dim] for p in before)
        shapes.append(tuple(shape))
        boxes.append(Box(tuple(offset), tuple(piece.about.size)))
    return shapes, boxes


def _is_beside(a: Mapping[str, int], b: Mapping[str, int], axes: Sequence[str]) -> bool:
    return all(a[axis] == b[axis] for axis in a if axis not in axes)


def _order(at: Mapping[str, int], axes: Sequence[str]) -> tuple[int, ...]:
    return tuple(at[axis] for axis in axes)


def cuts(
    pieces: Sequence[Stored], shape: Sequence[int], recorded: Recorded
) -> list[dict[int, tuple[str, ...]]]:
    """All the ways in which pieces without a place could be cut from a whole of `shape`."""
    at = [h.at for h in recorded.headers]
    if any(len(p.about.size) != len(shape) for p in pieces):
        return []
    axes = [axis for axis, n in recorded.sizes.items() if n > 1]
    choices: list[list[tuple[int, tuple[str, ...]]]] = []
    for dim, n in enumerate(shape):
        if any(p.about.size[dim] != n for p in pieces):
            fitting = _axes_that_cut(pieces, dim, n, axes, at)
            choices.append([(dim, some) for some in fitting])
    found = []
    for choice in product(*choices):
        used = [axis for _, some in choice for axis in some]
        if len(used) == len(set(used)):
            found.append(dict(choice))
    return found


def _axes_that_cut(
    pieces: Sequence[Stored],
    dim: int,
    n: int,
    axes: Sequence[str],
    at: Sequence[Mapping[str, int]],
) -> list[tuple[str, ...]]:
    """The fewest axes along which the pieces add up to `n` elements, in every order that may be."""
    for count in range(1, min(len(axes), _MOST_AXES) + 1):
        fitting = []
        for some in permutations(axes, count):
            lines: dict[tuple[int, ...], int] = {}
            for piece in pieces:
                rest = tuple(i for axis, i in at[piece.rank].items() if axis not in some)
                lines[rest] = lines.get(rest, 0) + piece.about.size[dim]
            if set(lines.values()) == {n}:
                fitting.append(some)
        if fitting:
            return fitting
    return []


def _sources(
    pieces: Sequence[Stored], boxes: Sequence[Box], at: Sequence[Mapping[str, int]]
) -> tuple[list[Source], list[Finding]]:
    """Terms of one sum together: the ranks that differ along the axes over which it goes."""
    groups: dict[tuple[Box, tuple[int, ...]], list[Stored]] = {}
    for piece, box in zip(pieces, boxes, strict=True):
        axes = [*piece.about.total, *piece.about.mean]
        rest = tuple(i for axis, i in at[piece.rank].items() if axis not in axes)
        groups.setdefault((box, rest), []).append(piece)
    sources, findings = [], []
    for (box, _), terms in groups.items():
        about = terms[0].about
        sizes = {axis: len({place[axis] for place in at}) for axis in (*about.total, *about.mean)}
        if (about.total or about.mean) and len(terms) != prod(sizes.values()):
            names = " and ".join(sizes)
            text = f"the sum over {names} needs {prod(sizes.values())} ranks, {len(terms)} have it"
            findings.append(Finding("hole", text))
        scale = 1.0 / prod(sizes[axis] for axis in about.mean)
        for some in [terms] if about.total or about.mean else [[term] for term in terms]:
            sources.append(Source(box, some, scale))
    return sources, findings


def _tiling(boxes: Sequence[Sequence[Source]], shape: tuple[int, ...]) -> list[Finding]:
    """Whether the boxes are the whole: none beyond it, none missing, none in part on another."""
    for copies in boxes:
        box = copies[0].box
        if any(end > n for end, n in zip(box.end, shape, strict=True)):
            text = f"{box.size} at {box.offset} reaches beyond the whole of {shape}"
            return [Finding("shape", f"the piece of rank {copies[0].rank}, {text}")]
    filled = [copies[0] for copies in boxes if copies[0].box.numel]
    if pair := overlap([source.box for source in filled]):
        a, b = (filled[i].rank for i in pair)
        return [Finding("overlap", f"the pieces of ranks {a} and {b} cover the same elements")]
    held = sum(source.box.numel for source in filled)
    if held < whole(shape).numel:
        missing = whole(shape).numel - held
        return [Finding("hole", f"{missing} of {whole(shape).numel} elements are on no rank")]
    return []
