"""How each kind of call moves its data over a lane, a step at a time, through rows of fixed size.

A move is a generator: it writes what this member gives, posts, yields the step that must be
complete, and reads on. Tensors here are flat and contiguous, G is the number of members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from parity.backend import board as b
from parity.backend.fold import Fold
from parity.backend.lane import CHUNK, Lane

Move = Iterator[int]
Parts = Sequence[Tensor] | Tensor
# Below this many bytes one rank reduces for all, while the others sleep; above, each its slice.
SMALL = 1 << 17


class Poster(Protocol):
    """A call under way: announces itself with its first step."""

    lane: Lane

    def post(self, last: Callable[[], None] | None = None) -> int: ...


def barrier(call: Poster) -> Move:
    yield call.post()


def all_reduce(call: Poster, give: Tensor, take: Tensor | None, fold: Fold) -> Move:
    """`take` is None for a member that only gives (a reduction to another root)."""
    lane = call.lane
    if give.numel() * give.itemsize <= SMALL:
        _, rows = lane.rows(give.dtype, give.numel())
        rows[lane.seat].copy_(give)
        yield call.post(lambda: fold(rows, rows[0]))
        if take is not None:
            take.copy_(rows[0])
        return
    size = CHUNK // give.itemsize
    for begin in range(0, give.numel(), size):
        part = give[begin : begin + size]
        _, rows = lane.rows(give.dtype, part.numel())
        rows[lane.seat].copy_(part)
        yield call.post()
        edges = [part.numel() * seat // len(rows) for seat in range(len(rows) + 1)]
        lower, upper = edges[lane.seat : lane.seat + 2]
        mine = [row[lower:upper] for row in rows]
        fold(mine, mine[lane.seat])
        yield call.post()
        if take is not None:
            whole = take[begin : begin + size]
            for row, lower, upper in zip(rows, edges, edges[1:], strict=False):
                whole[lower:upper].copy_(row[lower:upper])


def all_gather(call: Poster, give: Tensor, takes: Sequence[Tensor] | Tensor | None) -> Move:
    """`takes`: G tensors or one of [G, count], None for a member that only gives (a gather)."""
    lane, size = call.lane, CHUNK // give.itemsize
    for begin in range(0, max(give.numel(), 1), size):
        part = give[begin : begin + size]
        matrix, rows = lane.rows(give.dtype, part.numel())
        rows[lane.seat].copy_(part)
        yield call.post()
        if isinstance(takes, Tensor):
            takes[:, begin : begin + size].copy_(matrix)
        elif takes is not None:
            for row, take in zip(rows, takes, strict=True):
                take[begin : begin + size].copy_(row)


def broadcast(call: Poster, x: Tensor, root: int) -> Move:
    lane, size = call.lane, CHUNK // x.itemsize
    for begin in range(0, max(x.numel(), 1), size):
        part = x[begin : begin + size]
        _, rows = lane.rows(x.dtype, part.numel())
        if lane.seat == root:
            rows[root].copy_(part)
        yield call.post()
        if lane.seat != root:
            part.copy_(rows[root])


def scatter(call: Poster, gives: Tensor | None, take: Tensor, root: int) -> Move:
    """`gives` [G, count] on the root, None elsewhere."""
    lane = call.lane
    for begin, end, cube in _cells(lane, take):
        if gives is not None:
            cube[root, :, : end - begin].copy_(gives[:, begin:end])
        yield call.post()
        take[begin:end].copy_(cube[root, lane.seat, : end - begin])


def reduce_scatter(call: Poster, gives: Tensor, take: Tensor, fold: Fold) -> Move:
    """`gives` [G, count], `take` [count]."""
    lane = call.lane
    for begin, end, cube in _cells(lane, take):
        cube[lane.seat, :, : end - begin].copy_(gives[:, begin:end])
        yield call.post()
        fold(cube[:, lane.seat, : end - begin].unbind(0), take[begin:end])


def all_to_all(call: Poster, gives: Parts, takes: Parts, dtype: torch.dtype) -> Move:
    """A part from each to each, of any size: G tensors, or one of [G, count] for equal sizes."""
    lane = call.lane
    cell = _cell(lane, dtype)
    given, wanted = _lengths(gives), _lengths(takes)
    lane.tell_splits([n * dtype.itemsize for n in given], [n * dtype.itemsize for n in wanted])
    longest = max(*given, *wanted)
    lane.tell(b.ROUNDS, -(-longest // cell))
    begin, rounds, n = 0, 1, len(lane.members)
    while begin < rounds * cell:
        matrix, _ = lane.rows(dtype, n * cell)
        cube = matrix.view(n, n, cell)
        for cells, part in _pairs(cube[lane.seat], gives, begin):
            cells.copy_(part)
        yield call.post()
        if begin == 0:
            rounds = lane.words[lane.at + b.AGREED]
        for cells, part in _pairs(cube[:, lane.seat], takes, begin):
            part.copy_(cells)
        begin += cell


def _lengths(parts: Parts) -> list[int]:
    if isinstance(parts, Tensor):
        return [parts.shape[1]] * parts.shape[0]
    return [part.numel() for part in parts]


def _pairs(cells: Tensor, parts: Parts, begin: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What of each part, from `begin` on, meets which of the cells [G, cell]."""
    size = cells.shape[1]
    if isinstance(parts, Tensor):
        part = parts[:, begin : begin + size]
        yield cells[:, : part.shape[1]], part
        return
    for seat, whole in enumerate(parts):
        part = whole[begin : begin + size]
        if part.numel():
            yield cells[seat, : part.numel()], part


def _cell(lane: Lane, dtype: torch.dtype) -> int:
    """Elements of a row for each member: a multiple of 64 bytes."""
    return CHUNK // len(lane.members) // 64 * 64 // dtype.itemsize


def _cells(lane: Lane, each: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Ranges of a part, and the rows [G, G, cell] that carry them: from each, to each."""
    n, cell = len(lane.members), _cell(lane, each.dtype)
    for begin in range(0, max(each.numel(), 1), cell):
        end = min(begin + cell, each.numel())
        size = end - begin
        matrix, _ = lane.rows(each.dtype, n * size)
        yield begin, end, matrix.view(n, n, size)
