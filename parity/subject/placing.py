"""Where a piece of an activation lies, by its shape: a dim that is shorter is cut over an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from parity.cutting import chunk, spans, tensor_split

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Cuts = Mapping[int, str | Sequence[str]]  # dim of a tensor -> the axis it is cut over, or axes


class Place(NamedTuple):
    """A rank's part of a whole of `shape`: from `offset` on."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]


class Axes(NamedTuple):
    """The mesh as one rank sees it: the size of each axis, and its own coordinate."""

    sizes: Mapping[str, int]
    at: Mapping[str, int]


class Unplaced(Exception):
    """Why a piece has no place by its shape alone."""


def share(length: int, parts: int, index: int, *, even: bool = False) -> tuple[int, int]:
    """(start, length) of a part, as torch.chunk cuts, or with `even` as torch.tensor_split does."""
    span = spans((tensor_split if even else chunk)(length, parts))[index]
    return span.start, len(span)


def cut(place: Place, size: Sequence[int], cuts: Cuts, axes: Axes) -> tuple[int, ...]:
    """The offset of a piece of `size`, if `cuts` say over which axes its dims are cut."""
    offset = list(place.offset)
    for dim, names in cuts.items():
        found = _along(place.shape[dim], size[dim], _tuple(names), axes)
        if found is None:
            raise Unplaced(
                f"dim {dim} of {place.shape[dim]} cut over {', '.join(_tuple(names))} is not "
                f"{size[dim]} long on this rank"
            )
        offset[dim] = found
    return tuple(offset)


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
    offset = tuple(
        0 if size[dim] == shape[dim] else _start(shape, size, dim, axes, first or {})
        for dim in range(len(shape))
    )
    return Place(shape, offset)


def _start(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    dim: int,
    axes: Axes,
    known: Cuts,
) -> int:
    """Where in `dim` it begins, by the axis or the fewest axes that explain its size."""
    own = _tuple(known.get(dim, ()))
    if own and (start := _along(shape[dim], size[dim], own, axes, INPUTS)) is not None:
        return start
    # An axis cuts one dim of a tensor: that of the inputs' cuts, if it is in them.
    taken = {axis for other, names in known.items() if other != dim for axis in _tuple(names)}
    names = [axis for axis, n in axes.sizes.items() if n > 1 and axis not in taken]
    for count in range(1, len(names) + 1):
        found = {
            chosen: start
            for chosen in combinations(names, count)
            if (start := _along(shape[dim], size[dim], chosen, axes)) is not None
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
) -> int | None:
    """Where a part of this length starts, cut over these axes one after the other."""
    for even in ways:
        start, left = 0, whole
        for axis in names:
            inner, left = share(left, axes.sizes[axis], axes.at[axis], even=even)
            start += inner
        if left == length:
            return start
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
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    return Place(tuple(tensor.shape), tuple(offset))
