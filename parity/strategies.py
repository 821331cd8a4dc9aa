"""Property tests of parallel code: what hypothesis can draw for them.

from parity import strategies as ps

Whatever can be wrong in the arguments is a ValueError where a strategy is made, not where it draws.
Every value that is promised can be drawn, and shrinks to the plainest one: one rank, equal shares,
nothing masked (`find` in the examples is hypothesis.find). Only tensors load torch, when drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, TypeVar

from parity import cutting
from parity.case import Case
from parity.cutting import FlatPart as FlatPart
from parity.cutting import Part as Part

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "parity.strategies needs hypothesis: pip install 'hypothesis>=6.100'"
    ) from error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

# How a dimension is cut, the plainest first. `any` is any sizes that add up.
HOWS = ("even", "tensor_split", "chunk", "any")


def topologies(
    max_world: int = 8,
    axes: Iterable[str] = ("dp", "tp", "pp"),
    *,
    min_world: int = 1,
    **sizes: int | Iterable[int],
) -> st.SearchStrategy[Case]:
    """Cases of `min_world` to `max_world` ranks; `tp=[1, 2, 4]` or `pp=1` limits an axis.

    Each that fits can be drawn, and large ones often are. Every axis shrinks by itself.

    >>> find(topologies(), lambda case: True).id
    'dp1-tp1-pp1'
    >>> find(topologies(12, tp=[1, 3]), lambda case: case.world > 2 and case.axes["dp"] < 3).id
    'dp1-tp3-pp1'
    """
    _whole("min_world", min_world, 1)
    _whole("max_world", max_world, min_world)
    names = list(axes)
    if isinstance(axes, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"axes are different names, at least one, as in ['dp', 'tp'], not {axes}")
    for name in sizes:
        if name not in names:
            raise ValueError(f"'{name}' is no axis of these (they are {', '.join(names)})")
    limits = [_sizes(name, sizes[name]) if name in sizes else None for name in names]
    rows = [row for row in cutting.fitting(limits, max_world) if prod(row) >= min_world]
    if not rows:
        said = ", ".join(f"{name}={sizes[name]}" for name in sizes)
        raise ValueError(f"no topology of {min_world} to {max_world} ranks has {said}")
    return _topologies(names, rows)


@st.composite
def _topologies(draw: st.DrawFn, names: list[str], rows: list[tuple[int, ...]]) -> Case:
    # Any axis may be drawn first and have the most room; in the simplest order that is the last.
    # As many choices for each topology (hence the remainder), so that one can shrink to another.
    most = [len(set(sizes)) for sizes in zip(*rows, strict=True)]
    for axis in reversed(draw(st.permutations(range(len(names))))):
        fitting = sorted({row[axis] for row in rows})
        size = fitting[draw(st.integers(0, most[axis] - 1)) % len(fitting)]
        rows = [row for row in rows if row[axis] == size]
    return Case(dict(zip(names, rows[0], strict=True)))


def _sizes(name: str, sizes: int | Iterable[int]) -> list[int]:
    found = {sizes} if isinstance(sizes, int) else set(sizes)
    if not found:
        raise ValueError(f"{name} has nothing to choose from")
    for size in found:
        _whole(name, size, 1)
    return sorted(found)


def even(parts: int, *, min_size: int = 1, max_size: int | None = None) -> st.SearchStrategy[int]:
    """Sizes that `parts` divides, up to four times `parts`, or 16 if that is more.

    >>> find(even(3), lambda size: size > 6)
    9
    """
    return st.sampled_from(_bounded("even", parts, min_size, max_size))


def uneven(parts: int, *, min_size: int = 1, max_size: int | None = None) -> st.SearchStrategy[int]:
    """Sizes that `parts` does not divide. Fewer than `parts`, so that some get nothing, are among
    them; `min_size=parts` leaves those out.

    >>> find(uneven(3), lambda size: True), find(uneven(3, min_size=3), lambda size: True)
    (1, 4)
    """
    return st.sampled_from(_bounded("uneven", parts, min_size, max_size))


def _bounded(kind: str, parts: int, low: int, high: int | None) -> list[int]:
    _whole("parts", parts, 1)
    _whole("min_size", low, 0)
    high = max(16, 4 * parts) if high is None else high
    sizes = [n for n in range(low, high + 1) if (n % parts == 0) == (kind == "even")]
    if not sizes:
        hint = "; limit the axis to sizes from 2 on" if parts == 1 and kind == "uneven" else ""
        raise ValueError(f"no size from {low} to {high} is {kind} over {parts}{hint}")
    return sizes


def shapes(*dims: int | st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of tensors, dimension by dimension: a size, or what sizes are drawn from.

    >>> find(shapes(even(2), uneven(4, min_size=4), 8), lambda shape: True)
    (2, 5, 8)
    """
    for dim in dims:
        if not isinstance(dim, st.SearchStrategy):
            _whole("a dimension", dim, 0)
    return st.tuples(*(st.just(dim) if isinstance(dim, int) else dim for dim in dims))


def shares(size: int, parts: int, *, min_share: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    """What each of `parts` gets of `size`, in any way. `tensor.split` takes it as it is.

    Shrinks to the shares of torch.tensor_split, and to few rows that are moved from there.

    >>> find(shares(7, 3), lambda share: True), find(shares(6, 3), lambda share: share[0] != 2)
    ((3, 2, 2), (1, 3, 2))
    """
    _whole("size", size, 0)
    _whole("parts", parts, 1)
    _whole("min_share", min_share, 0)
    if (spare := size - parts * min_share) < 0:
        raise ValueError(f"{size} does not give each of {parts} parts {min_share}")
    start = cutting.tensor_split(size, parts)
    if parts == 1:
        return st.just(start)
    # So many moves lead to any shares: each can make one part what it is to be, the last one two.
    # They are drawn even where nothing can move, so that other sizes can shrink to these.
    ranks = st.integers(0, parts - 1)
    move = st.tuples(ranks, st.integers(1, parts - 1), st.integers(1, max(1, spare)))
    moves = st.lists(move, max_size=parts - 1)
    return _made(moves, lambda steps: cutting.moved(start, min_share, steps))


def microbatch_splits(
    rows: int,
    dp: int = 1,
    *,
    micro_batches: int | Iterable[int] = range(1, 9),
    equal: bool = False,
    min_rows: int = 1,
) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """The rows of each microbatch, by dp rank. All ranks have as many microbatches, as a pipeline
    needs it: one of `micro_batches`.

    `equal`: all have as many rows; else that is the simplest case. `min_rows=0`: some have none.

    >>> find(microbatch_splits(8, dp=2), lambda split: len(split[0]) == 2)
    ((2, 2), (2, 2))
    >>> find(microbatch_splits(4, dp=2), lambda split: len(set(map(sum, split))) > 1)
    ((1,), (3,))
    """
    _whole("rows", rows, 1)
    _whole("dp", dp, 1)
    _whole("min_rows", min_rows, 0)
    counts = [
        count
        for count in _sizes("micro_batches", micro_batches)
        if rows >= dp * count * min_rows and not (equal and rows % (dp * count))
    ]
    if not counts:
        least = "as many rows" if equal else f"at least {min_rows} rows"
        which = f"each of {micro_batches} microbatches"
        raise ValueError(f"{rows} rows over dp={dp} do not give {which} {least}")
    return _microbatch_splits(rows, dp, counts, equal, min_rows)


@st.composite
def _microbatch_splits(
    draw: st.DrawFn, rows: int, dp: int, counts: list[int], equal: bool, least: int
) -> tuple[tuple[int, ...], ...]:
    count = draw(st.sampled_from(counts))
    if equal:
        return (cutting.tensor_split(rows // dp, count),) * dp
    by_rank = draw(shares(rows, dp, min_share=count * least))
    return tuple(draw(shares(share, count, min_share=least)) for share in by_rank)


def valid_masks(
    rows: int,
    length: int,
    *,
    shares: Sequence[int] | Sequence[Sequence[int]] = (),
    nothing: bool = False,
) -> st.SearchStrategy[Tensor]:
    """Which tokens count, as a torch.bool of (rows, length). Rows are full, padded on the right or
    left, hold a single token or none, or anything else.

    `shares` are the rows of ranks or microbatches, as `shares` and `microbatch_splits` draw them:
    often some of these are without any valid token, which is where a mean is 0 / 0. At least one
    token is valid in all, unless `nothing` allows none.

    >>> find(valid_masks(2, 3, shares=(1, 1)), lambda mask: not mask[1].any()).tolist()
    [[True, True, True], [False, False, False]]
    """
    _whole("rows", rows, 1)
    _whole("length", length, 1)
    counts = [n for share in shares for n in ([share] if isinstance(share, int) else share)]
    if counts and (min(counts) < 0 or sum(counts) != rows):
        raise ValueError(f"shares of {rows} rows add up to them, with none below 0, not {shares}")
    held = [span for span in cutting.spans(counts) if span]
    return _valid_masks(rows, length, held, nothing)


@st.composite
def _valid_masks(
    draw: st.DrawFn, rows: int, length: int, held: Sequence[range], nothing: bool
) -> Tensor:
    import torch

    # A bit that is set is a token that is not valid: the simplest row is full. All kinds of rows
    # take as many choices as the simplest kind, so that they can shrink to that.
    every = 2**length - 1
    row = st.tuples(st.integers(0, 5), st.integers(0, every))
    drawn = draw(st.lists(row, min_size=rows, max_size=rows))
    bits = [_not_valid(kind, value, length) for kind, value in drawn]
    if held:
        most = len(held) - (not nothing)
        for span in draw(st.lists(st.sampled_from(held), max_size=most, unique=True)):
            bits[span.start : span.stop] = [every] * len(span)
    if not nothing and all(mask == every for mask in bits):
        bits[draw(st.integers(0, rows - 1))] -= 2 ** draw(st.integers(0, length - 1))
    return torch.tensor(
        [[not mask >> (length - 1 - i) & 1 for i in range(length)] for mask in bits]
    )


def _not_valid(kind: int, value: int, length: int) -> int:
    """A row as bits, of which the last token's is the lowest."""
    every, n = 2**length - 1, value % (length + 1)
    return (
        value,  # any row
        every >> n,  # padded on the right, n tokens are valid
        every - (every >> n),  # padded on the left, n tokens are not
        every - 2 ** (value % length),  # a single token
        every,
        0,
    )[kind]


def exact_tensors(
    shape: Sequence[int], dtype: str | torch.dtype = "float32", *, bound: int = 8
) -> st.SearchStrategy[Tensor]:
    """Tensors of whole numbers from -`bound` to `bound`: their sums and products are exact, in any
    order, as long as they stay below 2**24 in float32 (256 in bfloat16). So a test may ask for
    equality, where a tolerance would hide a mistake. Shrinks to counting, 1, 2, ..., `bound`,
    -`bound`, ...: then an element tells where it comes from.

    >>> find(exact_tensors((2, 2)), lambda tensor: True).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    for size in shape:
        _whole("a dimension", size, 0)
    _whole("bound", bound, 1)
    seeds = st.integers(0, 2**32 - 1)
    return _made(seeds, lambda seed: _tensor(tuple(shape), dtype, bound, seed))


def _tensor(shape: tuple[int, ...], dtype: str | torch.dtype, bound: int, seed: int) -> Tensor:
    import torch

    if seed:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(-bound, bound + 1, shape, generator=generator)
    else:
        counting = torch.arange(1, prod(shape) + 1).reshape(shape)
        values = (counting + bound) % (2 * bound + 1) - bound
    return values.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def cuts(
    shape: Sequence[int],
    parts: int,
    *,
    dims: Iterable[int] | None = None,
    how: Iterable[str] = HOWS,
    empty: bool = True,
) -> st.SearchStrategy[tuple[Part, ...]]:
    """How `parts` ranks hold a tensor of `shape`: boxes that cover it once, in order.

    One of `dims` is cut (of all, without them), or several (a grid), each by a way of its own out
    of `how`: `even`, `tensor_split`, `chunk`, `any`. Some parts may hold nothing, unless `empty` is
    False. Shrinks to the first dimension, cut evenly if it can be.

    >>> find(cuts((4, 3), 2), lambda cut: True)
    (Part(offset=(0, 0), shape=(2, 3)), Part(offset=(2, 0), shape=(2, 3)))
    """
    _whole("parts", parts, 1)
    shape, hows = tuple(shape), list(how)
    if not hows or not set(hows) <= set(HOWS):
        raise ValueError(f"a tensor is cut by some of {', '.join(HOWS)}, not by {how}")
    free = range(len(shape)) if dims is None else {_dim(dim, len(shape)) for dim in dims}
    grids = []
    for counts in cutting.grids(parts, len(shape)):
        ways = [_ways(*side, hows, empty) for side in zip(shape, counts, strict=True)]
        if all(ways) and all(n == 1 or dim in free for dim, n in enumerate(counts)):
            grids.append(st.tuples(*map(st.one_of, ways)))
    if not grids:
        full = "" if empty else ", none of them empty"
        along = "" if dims is None else f" along {sorted(free)}"
        raise ValueError(f"{shape} has no cut{along} in {parts} parts by {', '.join(hows)}{full}")
    return _made(st.one_of(grids), cutting.boxes)


def _dim(dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise ValueError(f"there is no dimension {dim} of {rank}")
    return dim % rank


def _ways(
    size: int, parts: int, hows: Sequence[str], empty: bool
) -> list[st.SearchStrategy[tuple[int, ...]]]:
    """What can be drawn for one dimension; nothing if it cannot be cut so."""
    _whole("a dimension", size, 0)
    if parts == 1:
        hows = ["tensor_split"]
    fixed = {"tensor_split": cutting.tensor_split(size, parts), "chunk": cutting.chunk(size, parts)}
    if size % parts == 0:
        fixed = {"even": fixed["chunk"], **fixed}
    ways = [st.just(side) for name, side in fixed.items() if name in hows and (empty or all(side))]
    if "any" in hows and (empty or size >= parts):
        ways.append(shares(size, parts, min_share=int(not empty)))
    return ways


def flat_cuts(
    elements: int, parts: int, *, align: int | Iterable[int] = (1, 2, 4, 8)
) -> st.SearchStrategy[tuple[FlatPart, ...]]:
    """A flat buffer over `parts`, as ZeRO and FSDP hold it: all are equally long, a multiple of
    one of `align`, and what lies beyond the `elements` is padding. The last may be nothing else.

    >>> find(flat_cuts(5, 2), lambda cut: True)
    (FlatPart(start=0, stop=3, padding=0), FlatPart(start=3, stop=5, padding=1))
    """
    _whole("elements", elements, 0)
    _whole("parts", parts, 1)
    units = st.sampled_from(_sizes("align", align))
    return _made(units, lambda unit: cutting.flat(elements, parts, unit))


def groupings(
    world: int, size: int | None = None
) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """The ranks in groups of `size`, or of any size that divides `world`: neighbours, ranks
    equally far apart, or any, in any order. Shrinks to neighbours.

    >>> find(groupings(4, 2), lambda groups: True)
    ((0, 1), (2, 3))
    >>> find(groupings(4, 2), lambda groups: (0, 1) not in groups)
    ((0, 2), (1, 3))
    """
    _whole("world", world, 1)
    if size is not None and (size < 1 or world % size):
        raise ValueError(f"{world} ranks do not make groups of {size}")
    sizes = [n for n in range(1, world + 1) if world % n == 0] if size is None else [size]
    return st.one_of([_groups(world, n) for n in sizes])


def _groups(world: int, size: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    ranks, count = list(range(world)), world // size
    apart = [rank for first in range(count) for rank in ranks[first::count]]
    orders = st.one_of(st.just(ranks), st.just(apart), st.permutations(ranks))
    starts = range(0, world, size)
    return _made(orders, lambda order: tuple(tuple(order[i : i + size]) for i in starts))


@st.composite
def _made(draw: st.DrawFn, strategy: st.SearchStrategy[T], make: Callable[[T], R]) -> R:
    """As `strategy.map(make)`; but of that, hypothesis prints the call of `make`, not the value."""
    return make(draw(strategy))


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is a whole number from {least} on, not {value!r}")
