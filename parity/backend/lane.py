"""One sequence of calls among fixed members, who take each step of it together.

A step: every member writes what it gives into its row of the lane and posts; the last one to post
looks whether all meant the same call, and wakes the rest. Rows are doubled: a member that writes
step k + 1 has seen step k complete, so everybody has read step k - 1 and its rows are free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.backend import board as b
from parity.backend.board import Board

CHUNK = 1 << 19  # bytes of a row: what a member hands over in one step
_CACHED = 128  # views kept per lane


class Lane:
    """A member's side of a lane. `seat` is its place among the members."""

    def __init__(
        self, board: Board, name: str, members: list[int], seat: int, owner: Lane | None = None
    ) -> None:
        n = len(members)
        words = b.HEAD + b.ARRAYS * n + 2 * n * n
        control = (8 * words + 4095) // 4096 * 4096
        self.board, self.words, self.members, self.seat = board, board.words, members, seat
        self.at: int = board.find_lane(
            name, members, control + 2 * n * CHUNK, owner.at if owner is not None else 0
        )
        begin = 8 * self.at + control
        memory = board.region.data[begin : begin + 2 * n * CHUNK]
        self._halves = memory.view(2, n, CHUNK)
        self._views: dict[tuple[int, torch.dtype, int], tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._half = 0
        self.step = 0
        self.issued = 0
        self.queue: deque[Any] = deque()  # of calls, the first of which is under way
        self._last: Callable[[], None] | None = None

    # Words with one value per member

    def row(self, array: int) -> list[int]:
        n = len(self.members)
        at = self.at + b.HEAD + array * n
        return self.words[at : at + n].tolist()

    def tell(self, array: int, value: int) -> None:
        self.words[self.at + b.HEAD + array * len(self.members) + self.seat] = value

    def tell_splits(self, gives: list[int], wants: list[int]) -> None:
        """How many bytes this member gives to each, and wants from each."""
        n = len(self.members)
        if len({*gives, *wants}) == 1:
            self.tell(b.EVEN, gives[0] + 1)
            return
        self.tell(b.EVEN, 0)
        at = self.at + b.HEAD + b.ARRAYS * n + n * self.seat
        for i in range(n):
            self.words[at + i], self.words[at + n * n + i] = gives[i], wants[i]

    def splits_agree(self) -> bool:
        n = len(self.members)
        even = self.row(b.EVEN)
        if even[0] and len(set(even)) == 1:
            return True
        at = self.at + b.HEAD + b.ARRAYS * n
        gives, wants = (
            [
                [size - 1] * n if size else self.words[begin + n * i : begin + n * (i + 1)].tolist()
                for i, size in enumerate(even)
            ]
            for begin in (at, at + n * n)
        )
        return all(gives[i][j] == wants[j][i] for i in range(n) for j in range(n))

    # Rows of data

    def rows(self, dtype: torch.dtype, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next rows to write and read, `count` elements of each: as a matrix [n, count] and
        one by one. Every member must ask once per step that carries data.
        """
        self._half ^= 1
        key = self._half, dtype, count
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _CACHED:
                self._views.clear()
            matrix = self._halves[self._half].view(dtype)[:, :count]
            found = self._views[key] = (matrix, matrix.unbind(0))
        return found

    # Steps

    def post(self, last: Callable[[], None] | None = None) -> int:
        """This member has done its part of the next step; the answer is the step's number.

        The last member to post runs `last`: what one does for all, before anybody goes on.
        """
        w, region = self.words, self.board.region
        self.step = step = self.step + 1
        n = len(self.members)
        posted = self.at + b.HEAD + b.POSTED * n
        region.acquire()
        w[posted + self.seat] = step
        is_last = min(w[posted : posted + n].tolist()) >= step
        bells = [] if is_last or not w[self.at + b.ANY] else self.board.rouse(self.members)
        region.release()
        for rank in bells:
            region.ring(rank)
        if is_last:
            self._complete(step, last)
        return step

    def _complete(self, step: int, last: Callable[[], None] | None) -> None:
        fault = 2  # whatever it is: nobody may go on
        try:
            if last is not None:
                last()
            fault = 0
        except Disagreement:
            fault = 1
        finally:
            region = self.board.region
            region.acquire()
            self.words[self.at + b.FAULT] = fault
            self.words[self.at + b.COMPLETE] = step
            bells = self.board.rouse(self.members)
            region.release()
            for rank in bells:
                region.ring(rank)

    def is_complete(self, step: int) -> bool:
        return self.words[self.at + b.COMPLETE] >= step

    @property
    def is_faulty(self) -> bool:
        return self.words[self.at + b.FAULT] != 0

    def peer_has_posted(self, seat: int) -> bool:
        """Whether that member is already at the step after this member's."""
        return self.row(b.POSTED)[seat] > self.step


class Disagreement(Exception):
    """The members of a lane have not called the same thing."""
