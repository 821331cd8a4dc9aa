"""Where a piece of an activation lies, by its shape: a dim that is shorter is cut over an axis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from parity.cutting import chunk, spans, tensor_split

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Cuts = Mapping[int, str | Sequence[str]]  # dim of a tensor -> the axis it is cut over, or axes


class Stretch(NamedTuple):
    """So many places of a dim that follow each other: from where on in the whole, and in what a
    rank has.
    """

    whole: int
    held: int
    length: int


class Place(NamedTuple):
    """A rank's part of a whole of `shape`: of every dim the stretches that it has, in its order."""

    shape: tuple[int, ...]
    dims: tuple[tuple[Stretch, ...], ...]

    @property
    def offset(self) -> tuple[int, ...]:
        """Where its first element lies."""
        return tuple(stretches[0].whole for stretches in self.dims)

    @property
    def boxes(self) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """The offset of each in the whole, and where it is in what the rank has."""
        return [
            (
                tuple(s.whole for s in box),
                tuple(slice(s.held, s.held + s.length) for s in box),
            )
            for box in product(*self.dims)
        ]

    def part_of(self, whole: Tensor) -> Tensor:
        for dim, stretches in enumerate(self.dims):
            whole = taken(whole, dim, stretches)
        return whole


def place_at(shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> Place:
    """Of one box."""
    dims = zip(offset, size, strict=True)
    return Place(tuple(shape), tuple((Stretch(start, 0, length),) for start, length in dims))


def everything(shape: Sequence[int]) -> Place:
    return place_at(shape, [0] * len(shape), shape)


class Axes(NamedTuple):
    """The mesh as one rank sees it: the size of each axis, and its own coordinate.

    Rank r of n on an axis in `zigzag` has parts r and 2n - 1 - r of 2n of whatever is as long as
    that says, as causal attention is balanced: sequences, and not what else is cut over the axis.
    """

    sizes: Mapping[str, int]
    at: Mapping[str, int]
    zigzag: Mapping[str, Collection[int]] = {}


class Unplaced(Exception):
    """Why a piece has no place by its shape alone."""


def share(length: int, parts: int, index: int, *, even: bool = False) -> tuple[int, int]:
    """(start, length) of a part, as torch.chunk cuts, or with `even` as torch.tensor_split does."""
    span = spans((tensor_split if even else chunk)(length, parts))[index]
    return span.start, len(span)


def shares(length: int, names: Sequence[str], axes: Axes, *, even: bool) -> tuple[Stretch, ...]:
    """What this rank has of so much, cut over these axes one after the other."""
    found: tuple[Stretch, ...] = (Stretch(0, 0, length),)
    for axis in names:
        left, n, r = sum(s.length for s in found), axes.sizes[axis], axes.at[axis]
        if length in axes.zigzag.get(axis, ()):
            parts = [share(left, 2 * n, i, even=even) for i in (r, 2 * n - 1 - r)]
        else:
            parts = [share(left, n, r, even=even)]
        found = _joined(s for part in parts for s in _within(found, *part))
    return found


def _within(stretches: Sequence[Stretch], start: int, length: int) -> Iterator[Stretch]:
    """The part of what is held that begins at `start`."""
    for s in stretches:
        first, end = max(start, s.held), min(start + length, s.held + s.length)
        if first < end or length == 0:
            yield Stretch(s.whole + first - s.held, 0, max(0, end - first))


def _joined(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """One after the other, those that follow each other in the whole as one."""
    found: list[Stretch] = []
    for s in stretches:
        if found and found[-1].whole + found[-1].length == s.whole:
            found[-1] = found[-1]._replace(length=found[-1].length + s.length)
        else:
            held = found[-1].held + found[-1].length if found else 0
            found.append(s._replace(held=held))
    return tuple(found)


def taken(whole: Tensor, dim: int, stretches: Sequence[Stretch]) -> Tensor:
    """These of a dim; a copy where there are several."""
    parts = [whole.narrow(dim, s.whole, s.length) for s in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def cut(place: Place, size: Sequence[int], cuts: Cuts, axes: Axes) -> Place:
    """That of a piece of `size`, if `cuts` say over which axes its dims are cut."""
    dims = list(place.dims)
    for dim, names in cuts.items():
        found = _along(place.shape[dim], size[dim], _tuple(names), axes)
        if found is None:
            raise Unplaced(
                f"dim {dim} of {place.shape[dim]} cut over {', '.join(_tuple(names))} is not "
                f"{size[dim]} long on this rank"
            )
        dims[dim] = found
    return place._replace(dims=tuple(dims))


def by_shape(
    shape: Sequence[int], size: Sequence[int], axes: Axes, first: Cuts | None = None
) -> Place:
    """The place of a piece of `size` in a whole of `shape`, both of as many dims.

    `first` are cuts that explain a dim before any other does: those of the inputs. Raises Unplaced
    where nothing explains a dim, or several axes do.
    """
    shape, size = tuple(shape), tuple(size)
    if len(shape) != len(size):
        raise Unplaced(f"it has {len(size)} dims, and the baseline's {len(shape)}")
    dims = [
        (Stretch(0, 0, size[dim]),)
        if size[dim] == shape[dim]
        else _cut_of(shape, size, dim, axes, first or {})
        for dim in range(len(shape))
    ]
    return Place(shape, tuple(dims))


def _cut_of(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    dim: int,
    axes: Axes,
    known: Cuts,
) -> tuple[Stretch, ...]:
    """What it has of `dim`, by the axis or the fewest axes that explain its size."""
    own = _tuple(known.get(dim, ()))
    if own and (part := _along(shape[dim], size[dim], own, axes, INPUTS)) is not None:
        return part
    # An axis cuts one dim of a tensor: that of the inputs' cuts, if it is in them.
    taken = {axis for other, names in known.items() if other != dim for axis in _tuple(names)}
    names = [axis for axis, n in axes.sizes.items() if n > 1 and axis not in taken]
    for count in range(1, len(names) + 1):
        found = {
            chosen: part
            for chosen in combinations(names, count)
            if (part := _along(shape[dim], size[dim], chosen, axes)) is not None
        }
        if len(found) > 1:
            raise Unplaced(
                f"dim {dim} of {shape[dim]} is {size[dim]} long here, and may be cut over "
                f"{' or '.join(' x '.join(chosen) for chosen in found)}"
            )
        if found:
            return next(iter(found.values()))
    raise Unplaced(f"dim {dim} of {shape[dim]} is {size[dim]} long here, which no axis explains")


OTHERS, INPUTS = (False, True), (True, False)  # as DTensor cuts, and as parity cuts inputs, first


def _along(
    whole: int, length: int, names: Sequence[str], axes: Axes, ways: Sequence[bool] = OTHERS
) -> tuple[Stretch, ...] | None:
    """A part of this length, cut over these axes one after the other."""
    for even in ways:
        part = shares(whole, names, axes, even=even)
        if sum(s.length for s in part) == length:
            return part
    return None


def _tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """Itself, if it is one. They are loaded late: ranks have them, and who only starts ranks need
    not wait half a second for them.
    """
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def of_dtensor(tensor: DTensor) -> Place:
    """By its placements; raises Unplaced for one whose parts are still to be summed."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = tensor.device_mesh
    partial = [axis for axis, p in enumerate(tensor.placements) if p.is_partial()]
    if partial:
        names = mesh.mesh_dim_names or ()
        over = ", ".join(names[axis] if names else f"axis {axis} of its mesh" for axis in partial)
        raise Unplaced(
            f"it is a DTensor with a sum over {over} still to be made (Partial): end in "
            ".redistribute(placements=...) or .full_tensor()"
        )
    size, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    return place_at(tensor.shape, offset, size)
