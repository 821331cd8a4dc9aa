"""Where a local tensor lies in the whole: by its DTensor placements, by a layout, or not known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from parity.errors import UsageError
from parity.subject.alignment import Held

Cut = Mapping[int, str | Sequence[str]]


Rule = Cut | Held
Layout = Mapping[str, Rule]


class Where(NamedTuple):
    """Which rank this is: of how many, and its coordinates by axis, with the sizes of the axes."""

    rank: int
    world: int
    at: Mapping[str, int]
    sizes: Mapping[str, int]


class Piece(NamedTuple):
    """A part of a local tensor. Without `offset` its place is for the diff to find, by `cut` (the
    axes that cut each dimension) if that is known. `total`: the axes over which pieces are to be
    added; `mean`: to be averaged.
    """

    tensor: Tensor
    shape: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None
    cut: Mapping[int, tuple[str, ...]] | None = None
    total: tuple[str, ...] = ()
    mean: tuple[str, ...] = ()


class Rules:
    """The layout of one rank, checked against the parameters and axes that there are."""

    def __init__(self, layout: Layout | None, where: Where) -> None:
        self.where = where
        self._layout = dict(layout or {})

    def objections(self, shapes: Mapping[str, tuple[int, ...]], is_stage: bool) -> list[str]:
        """What is wrong with the layout. A stage of a pipeline need not hold all that it names."""
        said = []
        for pattern, rule in self._layout.items():
            names = [name for name in shapes if fnmatchcase(name, pattern)]
            if not names and not is_stage:
                known = ", ".join(list(shapes)[:4])
                said.append(
                    f"layout: no parameter is called '{pattern}'; expected one of {known}, ... "
                    "(* stands for any characters); correct the name or remove the line"
                )
            if isinstance(rule, Mapping):
                said += self._wrong_cut(pattern, rule, {name: shapes[name] for name in names})
            else:
                said += _wrong_held(pattern, rule, {name: shapes[name] for name in names})
        return said

    def _wrong_cut(self, pattern: str, cut: Cut, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        said = []
        for dim, axes in cut.items():
            for axis in [axes] if isinstance(axes, str) else axes:
                if axis not in self.where.at and self.where.world > 1:
                    known = ", ".join(self.where.at) or "none"
                    said.append(
                        f"layout of '{pattern}': no axis '{axis}'; expected one of: {known}; give "
                        "the coordinates of this rank by mesh= or at="
                    )
            for name, shape in shapes.items():
                if not 0 <= dim < len(shape):
                    said.append(
                        f"layout of '{pattern}': '{name}' has no dimension {dim}; expected 0 to "
                        f"{len(shape) - 1}; its shape here is {tuple(shape)}"
                    )
        return said

    def rule(self, name: str) -> Rule | None:
        found = (r for p, r in self._layout.items() if p == name or fnmatchcase(name, p))
        return self._layout.get(name) or next(found, None)

    def pieces(self, name: str, tensor: Tensor, like: Tensor) -> list[tuple[str, list[Piece]]]:
        """Of `tensor`, which belongs to the parameter `like` called `name`: of each whole that it
        holds a part of, as a rule one of the same name.
        """
        rule = None if isinstance(like, DTensor) else self.rule(name)
        if (
            isinstance(rule, Held)
            and tensor.shape == like.shape
            and not isinstance(tensor, DTensor)
        ):
            return list(_as_held(rule, tensor))
        return [(name, self._pieces(rule, tensor, like))]

    def _pieces(self, rule: Rule | None, tensor: Tensor, like: Tensor) -> list[Piece]:
        if isinstance(tensor, DTensor):
            return of_dtensor(tensor, self.where)
        if self.where.world == 1 or tensor.ndim == 0:
            # The script of the parallel run, on one process: nothing is cut.
            return [Piece(tensor, tuple(tensor.shape), (0,) * tensor.ndim)]
        if tensor.shape == like.shape and isinstance(rule, Mapping):
            cut = {d: (axes,) if isinstance(axes, str) else tuple(axes) for d, axes in rule.items()}
            return [Piece(tensor, cut=cut)]
        return [Piece(tensor)]


def _as_held(held: Held, tensor: Tensor) -> Iterator[tuple[str, list[Piece]]]:
    flat = tensor.reshape(-1)
    for part in held.parts:
        boxes = [Piece(flat[p.to(flat.device)], part.shape, offset) for offset, p in part.boxes]
        yield part.whole, boxes


def _wrong_held(pattern: str, rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    if not isinstance(rule, Held):
        return [
            f"layout of '{pattern}': it is a {type(rule).__name__}; expected {{dimension: axis}}, "
            'as in {0: "tp"}, or what parity.held has found'
        ]
    return [
        f"layout of '{pattern}': it is of a tensor of {rule.shape}, and '{name}' has {shape} here; "
        "it was made for another piece: make it anew on this rank"
        for name, shape in shapes.items()
        if prod(shape) != prod(rule.shape)
    ]


def of_dtensor(tensor: DTensor, where: Where) -> list[Piece]:
    """One piece, or several where a strided shard consists of several runs of rows."""
    local, mesh = tensor.to_local(), tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return []  # this rank holds nothing of it
    total, mean = _to_be_added(tensor, where)
    rows = [torch.arange(n) for n in tensor.shape]
    for place, size, i in zip(tensor.placements, mesh.shape, coordinate, strict=True):
        dim = getattr(place, "dim", None)  # of Shard, and of _StridedShard, which is another class
        if dim is not None:
            rows[dim] = shard(rows[dim], size, i, getattr(place, "split_factor", 1))
    if tuple(len(r) for r in rows) != tuple(local.shape):
        return [Piece(local, total=total, mean=mean)]  # a placement that we do not know
    pieces = []
    for runs in product(*(_runs(r) for r in rows)):
        part = tuple(slice(first, first + n) for first, _, n in runs)
        offset = tuple(start for _, start, _ in runs)
        pieces.append(Piece(local[part], tuple(tensor.shape), offset, None, total, mean))
    return pieces


def shard(rows: Tensor, count: int, i: int, split: int = 1) -> Tensor:
    """Which of `rows` the i-th of `count` ranks holds: of a strided shard, a part of each of the
    `split` parts that were there before.
    """
    held = []
    for part in rows.chunk(split) if split > 1 else [rows]:
        chunks = part.chunk(count)
        held.append(chunks[i] if i < len(chunks) else part[:0])
    return torch.cat(held)


def _runs(rows: Tensor) -> list[tuple[int, int, int]]:
    """(first, start, length): `length` rows from local row `first` on are those from `start` on."""
    if not len(rows):
        return [(0, 0, 0)]
    breaks = ((rows[1:] - rows[:-1]) != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    return [(a, int(rows[a]), b - a) for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]


def _to_be_added(tensor: DTensor, where: Where) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = tensor.device_mesh.mesh_dim_names or ()
    ways: dict[str, list[str]] = {"sum": [], "avg": []}
    for dim, place in enumerate(tensor.placements):
        if isinstance(place, Partial):
            axis = names[dim] if dim < len(names) else f"dim {dim} of its mesh"
            if axis not in where.at or place.reduce_op not in ways:
                raise UsageError(
                    f"a DTensor is Partial({place.reduce_op}) over {axis}; expected a sum or "
                    f"average over one of: {', '.join(where.at) or 'none'}; give mesh= with that "
                    "axis, or reduce it before it is recorded"
                )
            ways[place.reduce_op].append(axis)
    return tuple(ways["sum"]), tuple(ways["avg"])


def whereabouts(
    mesh: Any, at: Mapping[str, int] | None, sizes: Mapping[str, int] | None, rank: int, world: int
) -> Where:
    """The coordinates of this rank: by a DeviceMesh, by the user's word, or its rank alone."""
    if mesh is not None and at is not None:
        raise UsageError("mesh= and at= both give coordinates; expected one of them; leave one out")
    if mesh is not None:
        names, coordinate = mesh.mesh_dim_names, mesh.get_coordinate()
        if names is None or coordinate is None:
            what = "has no names for its axes" if names is None else f"does not hold rank {rank}"
            raise UsageError(
                f"mesh: it {what}; expected a DeviceMesh of all ranks, made with mesh_dim_names; "
                'or give at={"dp": 0, "tp": 1}'
            )
        found = dict(zip(names, coordinate, strict=True))
        return Where(rank, world, found, dict(zip(names, mesh.shape, strict=True)))
    if at is None:
        return Where(rank, world, {"rank": rank}, {"rank": world})
    for axis, i in at.items():
        size = (sizes or {}).get(axis)
        if not isinstance(i, int) or i < 0 or (size is not None and i >= size):
            said = "0 or more" if size is None else f"0 to {size - 1}, since sizes has {size}"
            raise UsageError(f"at: {axis} is {i!r}; expected a whole number, {said}")
    return Where(rank, world, dict(at), dict(sizes or {}))
