"""Which element of the whole is each element that a rank holds? Its value says.

Before anything is computed, every element of the baseline's parameters is given a value of its own,
and the candidate loads them by its own code. Wherever a value turns up, its element lies: however
the candidate slices, fuses, interleaves, transposes, flattens, pads or renames.

A value is a random number of 50 bits, so one that the candidate made up by itself is none of ours
but for a chance of one in a million million. A dtype of fewer bits is told it in several builds, a
digit in each. Zeros are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parity.subject.boxes import boxes_of
from parity.subject.placing import as_dtensor

BITS = 50  # of a value; float64 holds it exactly

Full = Mapping[str, Tensor]


class Box(NamedTuple):
    """A box of the whole at `offset`, and for each element of it the flat place in what is held."""

    offset: tuple[int, ...]
    positions: Tensor  # int64, in the shape of the box


class Part(NamedTuple):
    """What a local tensor holds of one whole."""

    whole: str
    shape: tuple[int, ...]  # of the whole
    boxes: list[Box]


class Held(NamedTuple):
    """A local tensor by the names of the wholes. What is `strange` is of no whole, and not 0."""

    name: str
    shape: tuple[int, ...]
    parts: list[Part]
    padding: int = 0
    strange: int = 0


class Wholes:
    """The elements of all parameters of a baseline in one row, each with its value."""

    def __init__(self, parameters: Full) -> None:
        """`parameters` by name; names that share their tensor are one whole, under the first."""
        self.alias = _aliases(parameters)
        self.shapes = {n: tuple(p.shape) for n, p in parameters.items() if self.alias[n] == n}
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.values = _distinct(self.starts[-1])
        self._ordered, self._places = self.values.sort()

    def spelled(self, shift: int, bits: int) -> dict[str, Tensor]:
        """The digit of every value that begins at bit `shift`, as parameters in float64."""
        digits = (self.values >> shift & (1 << bits) - 1).double()
        spans = zip(self.shapes.items(), self.starts, strict=False)
        canonical = {
            name: digits[start : start + torch.Size(shape).numel()].reshape(shape)
            for (name, shape), start in spans
        }
        return {name: canonical[first] for name, first in self.alias.items()}

    def held(self, name: str, values: Tensor) -> Held:
        """What a local tensor holds. `values` in its shape: the values read there, int64."""
        flat = values.reshape(-1)
        places = torch.searchsorted(self._ordered, flat).clamp(max=len(self._ordered) - 1)
        known = self._ordered[places] == flat
        elements = torch.where(known, self._places[places], -1)
        is_padding = flat == 0
        return Held(
            name,
            tuple(values.shape),
            list(self._parts(elements)),
            int(is_padding.sum()),
            int((~known & ~is_padding).sum()),
        )

    def _parts(self, elements: Tensor) -> list[Part]:
        parts = []
        for (name, shape), start, end in zip(
            self.shapes.items(), self.starts, self.starts[1:], strict=False
        ):
            positions = ((elements >= start) & (elements < end)).nonzero().squeeze(1)
            if len(positions):
                boxes = _boxes(elements[positions] - start, positions, shape)
                parts.append(Part(name, shape, boxes))
        return parts


def align(build: Callable[[Full], Mapping[str, Tensor]], full: Full, wholes: Wholes) -> list[Held]:
    """Where all parameters of a candidate are from.

    `build` makes the candidate from a state dict, and returns the parameters that it then holds,
    by its own names. `full` is that of the baseline: what is no parameter in it stays as it is.
    """
    bits = BITS
    read = _read(build, full, wholes, [0], bits)
    narrowest = min((digits(p.dtype) for p in read[0].values()), default=bits)
    if narrowest < bits:
        bits = narrowest
        read = _read(build, full, wholes, range(0, BITS, bits), bits)
    return [
        wholes.held(name, sum(_whole_numbers(r[name]) << i * bits for i, r in enumerate(read)))  # type: ignore[arg-type]
        for name in read[0]
    ]


def held(build: Callable[[Full], nn.Module], full: Full) -> dict[str, Held]:
    """What this rank's parameters hold of the baseline's, by their own names.

    `build` makes the candidate from a state dict as it does from a checkpoint, and is called a few
    times; `full` is the baseline's state dict, of which only names and shapes matter. For
    `parity.record(..., layout=parity.held(build, full))`.
    """
    wholes = Wholes({name: p for name, p in full.items() if p.is_floating_point()})
    found = align(lambda values: dict(build(values).named_parameters()), full, wholes)
    return {one.name: one for one in found}


def _read(
    build: Callable[[Full], Mapping[str, Tensor]],
    full: Full,
    wholes: Wholes,
    shifts: Sequence[int],
    bits: int,
) -> list[dict[str, Tensor]]:
    """What the candidate holds after each of as many builds."""
    return [
        {
            name: local(p).detach().to("cpu", copy=True)
            for name, p in build({**full, **wholes.spelled(shift, bits)}).items()
            if p.is_floating_point()
        }
        for shift in shifts
    ]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    found = as_dtensor(tensor)
    return tensor if found is None else found.to_local()


def digits(dtype: torch.dtype) -> int:
    """How many bits a whole number may have that the dtype holds exactly."""
    return round(1 - torch.log2(torch.tensor(torch.finfo(dtype).eps, dtype=torch.float64)).item())


def _whole_numbers(tensor: Tensor) -> Tensor:
    """As int64; what is no whole number becomes one that no value is."""
    x = tensor.double()
    is_one = x.isfinite() & (x == x.floor()) & (x.abs() < 2**BITS)
    return torch.where(is_one, x, -1.0).long()


def _distinct(count: int) -> Tensor:
    """So many different random numbers of BITS bits, none of them small; int64."""
    generator = torch.Generator().manual_seed(count)
    low, high = 1 << 20, 1 << BITS
    values = torch.randint(low, high, (count,), generator=generator)
    while len(values.unique()) < count:
        values = torch.randint(low, high, (count,), generator=generator)
    return values


def _aliases(parameters: Full) -> dict[str, str]:
    """The first name of the tensor that each name stands for."""
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    return {
        name: first.setdefault((p.data_ptr(), tuple(p.shape), p.stride()), name)
        if p.numel()
        else name
        for name, p in parameters.items()
    }


def _boxes(elements: Tensor, positions: Tensor, shape: tuple[int, ...]) -> list[Box]:
    """`elements` of a whole of `shape`, by flat index, that lie at `positions`. An element that is
    held twice is in two boxes.
    """
    boxes = []
    while len(elements):
        place = torch.full((torch.Size(shape).numel(),), -1)
        # The last writer of an index is not defined where there are several: so only one writes.
        order = elements.argsort(stable=True)
        is_first = torch.ones(len(elements), dtype=torch.bool)
        is_first[order[1:]] = elements[order[1:]] != elements[order[:-1]]
        place[elements[is_first]] = positions[is_first]
        place = place.reshape(shape)
        for offset, size in boxes_of(place >= 0):
            part = place[tuple(slice(i, i + n) for i, n in zip(offset, size, strict=True))]
            boxes.append(Box(offset, part.clone()))
        elements, positions = elements[~is_first], positions[~is_first]
    return boxes
