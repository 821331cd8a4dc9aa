"""The arithmetic of giving parts their shares: values, for what `parity.strategies` draws.

>>> tensor_split(7, 3), chunk(7, 3), chunk(5, 4)
((3, 2, 2), (3, 3, 1), (2, 2, 1, 0))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise, product
from typing import NamedTuple


class Part(NamedTuple):
    """A box of a whole: its element 0 is at `offset`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """`whole[part.slices]` is the part."""
        return tuple(slice(i, i + n) for i, n in zip(self.offset, self.shape, strict=True))


class FlatPart(NamedTuple):
    """Elements `start` to `stop` of a flat buffer, and `padding` of no meaning after them."""

    start: int
    stop: int
    padding: int


def tensor_split(size: int, parts: int) -> tuple[int, ...]:
    """The shares of torch.tensor_split: they differ by at most one, the first being larger."""
    return tuple(size // parts + (i < size % parts) for i in range(parts))


def chunk(size: int, parts: int) -> tuple[int, ...]:
    """The shares of torch.chunk, with the pieces that it leaves out as empty ones at the end."""
    each = -(-size // parts)
    return tuple(min(each, max(0, size - i * each)) for i in range(parts))


def moved(shares: Sequence[int], least: int, moves: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """`shares` after moves (from part, to the part so many further on, how much), as far as every
    part keeps its `least`.
    """
    result = list(shares)
    for source, step, amount in moves:
        amount = min(amount, result[source] - least)
        result[source] -= amount
        result[(source + step) % len(result)] += amount
    return tuple(result)


def spans(shares: Sequence[int]) -> list[range]:
    """Where each share lies in the whole."""
    return [range(end - n, end) for n, end in zip(shares, accumulate(shares), strict=True)]


def boxes(sides: Sequence[Sequence[int]]) -> tuple[Part, ...]:
    """The parts of a grid, by the shares of each dimension; the last one moves fastest."""
    return tuple(
        Part(tuple(side.start for side in box), tuple(len(side) for side in box))
        for box in product(*map(spans, sides))
    )


def flat(elements: int, parts: int, align: int) -> tuple[FlatPart, ...]:
    """Parts of one length, a multiple of `align`; what lies beyond the elements is padding."""
    each = -(-elements // (parts * align)) * align
    edges = [min(i * each, elements) for i in range(parts + 1)]
    return tuple(FlatPart(a, b, each - (b - a)) for a, b in pairwise(edges))


def factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `number` as a product of `count` factors, in any order."""
    if count == 0:
        yield from [()] if number == 1 else []
        return
    for factor in range(1, number + 1):
        if number % factor == 0:
            yield from ((factor, *others) for others in factors(number // factor, count - 1))


def grids(parts: int, dims: int) -> list[tuple[int, ...]]:
    """How often each dimension may be cut: those that cut few dimensions first, and the first."""
    return sorted(factors(parts, dims), key=lambda f: (sum(n > 1 for n in f), f[::-1]))


def fitting(limits: Sequence[Sequence[int] | None], room: int) -> Iterator[tuple[int, ...]]:
    """All sizes of some axes with a product of at most `room`; None: an axis has no limit."""
    if not limits:
        yield ()
        return
    for size in limits[0] if limits[0] is not None else range(1, room + 1):
        if size <= room:
            yield from ((size, *others) for others in fitting(limits[1:], room // size))
