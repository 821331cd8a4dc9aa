"""What every rank lets all others know: that it runs or has ended, what it waits for, and in words
what it has called. And where the lanes lie.

A lane is the place of one sequence of calls: of a group's collectives, or of the messages with one
tag from one rank to another. Its members find it by name, and the first one there makes it.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from parity.backend.memory import HEADER, SIZE, Region

RUNNING, ENDED = 1, 2  # 0: not here yet
DEADLOCK, LOST = 1, 2  # kinds of verdict
MAX_RANKS = 256
MAX_WAITS = 250  # calls that one blocked rank may wait for: any of them would set it free
_TABLE_SLOTS = 1 << 16
_END, _FREE = 2, 64  # words of the header: where memory ends, where the free lists begin
_TEXT_BYTES = 1 << 22  # per rank, for what it says about its calls

# Byte offsets. A rank's own words: state, asleep, verdict, number of waits, then the waits.
_STATE, _ASLEEP, _VERDICT, _WAITS = 0, 1, 2, 3
_RANK_WORDS = 1024
_RANKS = HEADER + 64 * MAX_RANKS
_VERDICT_TEXT = _RANKS + 8 * _RANK_WORDS * MAX_RANKS
_VERDICT_BYTES = 1 << 16
_TABLE = _VERDICT_TEXT + _VERDICT_BYTES
_TEXTS = _TABLE + 32 * _TABLE_SLOTS
_LANES = _TEXTS + _TEXT_BYTES * MAX_RANKS

# The control words of a lane, before the arrays with one word per member; and those arrays.
COMPLETE, FAULT, AGREED, ANY, LEFT, NEXT, MEMBERS, SLOT, PAGES = range(9)
HEAD = 16
RANK, ISSUED, POSTED, SIGNATURE, SHAPE, PHRASE, ROUNDS, GONE, EVEN = range(9)
ARRAYS = 9


class Wait(NamedTuple):
    """A call that has not come to its end: the `ordinal`-th of the lane at word `lane`."""

    lane: int
    ordinal: int
    phrase: int
    step: int = 0  # of the lane, for which the first call of the queue waits


class Board:
    """The shared words, with a meaning. Methods that say `locked` need the region's lock."""

    def __init__(self, region: Region, rank: int) -> None:
        self.region, self.rank, self.words = region, rank, region.words
        self.world = int(region.words[1])
        self._text_at = self.epoch = 0
        region.acquire()
        region.words[_END] = region.words[_END] or _LANES
        region.release()
        self._own = self._at(rank)
        region.come_alive(rank)
        self.words[self._own + _STATE] = RUNNING

    def _at(self, rank: int) -> int:
        return _RANKS // 8 + _RANK_WORDS * rank

    # What a rank does

    def state(self, rank: int) -> int:
        return self.words[self._at(rank) + _STATE]

    def end(self) -> None:
        self.region.acquire()
        self.words[self._own + _STATE] = ENDED
        self.words[self._own + _WAITS] = 0
        self.region.release()
        for rank in range(self.world):
            if rank != self.rank:
                self.region.ring(rank)

    def is_gone(self, rank: int) -> bool:
        """Whether a rank that was here will do nothing any more."""
        state = self.state(rank)
        dead = state == RUNNING and rank != self.rank and not self.region.is_alive(rank)
        return state == ENDED or dead

    def fall_asleep(self, waits: list[Wait]) -> None:
        """Locked. An empty list: it sleeps, but others of its threads may still act."""
        w, at = self.words, self._own
        if len(waits) > MAX_WAITS:
            waits = []  # a part of them would make it look stuck when it is not
        w[at + _WAITS] = len(waits)
        for i, wait in enumerate(waits):
            w[at + 4 + 4 * i], w[at + 5 + 4 * i], w[at + 6 + 4 * i], w[at + 7 + 4 * i] = wait
        w[at + _ASLEEP] = 1

    def wake_up(self) -> None:
        self.words[self._own + _WAITS] = 0
        self.words[self._own + _ASLEEP] = 0

    def rouse(self, ranks: list[int]) -> list[int]:
        """Locked. Those of `ranks` that sleep: their bells are to be rung, after the release."""
        w, found = self.words, []
        for rank in ranks:
            at = _RANKS // 8 + _RANK_WORDS * rank + _ASLEEP
            if w[at]:
                w[at] = 0
                found.append(rank)
        return found

    def waits(self, rank: int) -> list[Wait]:
        """Locked. What a rank is blocked in; empty for one that is not."""
        at = self._at(rank)
        count = self.words[at + _WAITS]
        return [
            Wait(*self.words[at + 4 + 4 * i : at + 8 + 4 * i].tolist()) for i in range(int(count))
        ]

    # What is said in words

    def say(self, text: str) -> int:
        """Store a text of this rank; the answer is where any rank can read it."""
        data = text.encode(errors="replace")[:1000]
        if self._text_at + len(data) + 8 > _TEXT_BYTES:
            self._text_at = 0  # the oldest are written over: whoever kept a place must ask again
            self.epoch += 1
        at = _TEXTS + _TEXT_BYTES * self.rank + self._text_at
        self._write(at, data)
        self._text_at += (len(data) + 15) // 8 * 8
        return at

    def read(self, at: int) -> str:
        size = min(self.words[at // 8], _VERDICT_BYTES)
        raw = bytes(self.words[at // 8 + 1 : at // 8 + 1 + (size + 7) // 8])
        return raw[:size].decode(errors="replace")

    def _write(self, at: int, data: bytes) -> None:
        self.words[at // 8] = len(data)
        padded = data + bytes(-len(data) % 8)
        whole = memoryview(padded).cast("Q")
        self.words[at // 8 + 1 : at // 8 + 1 + len(whole)] = whole

    def pass_verdict(self, ranks: list[int], kind: int, text: str) -> None:
        """Locked. Tell blocked ranks that they wait for ever, and why."""
        self._write(_VERDICT_TEXT, text.encode(errors="replace")[: _VERDICT_BYTES - 8])
        for rank in ranks:
            self.words[self._at(rank) + _VERDICT] = kind

    def verdict(self) -> tuple[int, str]:
        """The kind and text of what was found about this rank; kind 0: nothing."""
        kind = self.words[self._own + _VERDICT]
        return kind, self.read(_VERDICT_TEXT) if kind else ""

    # Lanes

    def find_lane(self, name: str, members: list[int], size: int, owner: int = 0) -> int:
        """The word at which the lane of that name begins; made with `size` bytes if need be, and
        then hung on the lane `owner`, to be freed with it.
        """
        key = memoryview(hashlib.blake2b(name.encode(), digest_size=16).digest()).cast("Q")
        w = self.words
        self.region.acquire()
        try:
            slot = self._slot(key[0], key[1])
            if not w[slot + 2]:
                lane = self._allocate(size)
                self._prepare(lane, slot, size, members)
                w[slot], w[slot + 1], w[slot + 2] = key[0], key[1], lane
                if owner:
                    w[lane + NEXT], w[owner + NEXT] = w[owner + NEXT], lane
            return w[slot + 2]
        finally:
            self.region.release()

    def _slot(self, a: int, b: int) -> int:
        """Locked. Where the key is in the table, or the free place for it."""
        w, free = self.words, 0
        for step in range(_TABLE_SLOTS):
            slot = _TABLE // 8 + 4 * ((a + step) % _TABLE_SLOTS)
            if w[slot] == a and w[slot + 1] == b and w[slot + 2]:
                return slot
            if not w[slot + 2]:
                free = free or slot
                if not w[slot + 3]:  # never used: the key is nowhere further on
                    break
        if not free:
            raise RuntimeError(f"more than {_TABLE_SLOTS} groups and channels are open at once")
        w[free + 3] = 1
        return free

    def _class(self, pages: int) -> int:
        """Locked. The word that heads the free list of lanes of that size."""
        for at in range(_FREE, HEADER // 8, 2):
            if self.words[at] in (0, pages):
                self.words[at] = pages
                return at + 1
        raise RuntimeError("lanes of too many sizes")  # sizes depend on the member count alone

    def _allocate(self, size: int) -> int:
        """Locked. A free lane of that size, or new memory; the word at which it begins."""
        w, pages = self.words, -(-size // 4096)
        head = self._class(pages)
        lane = w[head]
        if lane:
            w[head] = w[lane + NEXT]
            return lane
        end = w[_END]
        if end + 4096 * pages > SIZE:
            raise RuntimeError("the shared region is full: close groups that are no longer used")
        w[_END] = end + 4096 * pages
        return end // 8

    def _prepare(self, lane: int, slot: int, size: int, members: list[int]) -> None:
        n, w = len(members), self.words
        for i in range(HEAD + ARRAYS * n):
            w[lane + i] = 0
        w[lane + MEMBERS], w[lane + SLOT], w[lane + PAGES] = n, slot, -(-size // 4096)
        for i, rank in enumerate(members):
            w[lane + HEAD + RANK * n + i] = rank

    def leave(self, lane: int, seat: int) -> None:
        """A member goes; the last to go frees the lane and those that hang on it."""
        w = self.words
        self.region.acquire()
        n = w[lane + MEMBERS]
        w[lane + HEAD + GONE * n + seat] = 1
        w[lane + LEFT] += 1
        if w[lane + LEFT] == n:
            while lane:
                after = w[lane + NEXT]
                self._forget(w[lane + SLOT])
                head = self._class(w[lane + PAGES])
                w[lane + NEXT], w[head] = w[head], lane
                lane = after
        self.region.release()

    def _forget(self, slot: int) -> None:
        """Locked. Take a name from the table; a search need not go on here if none has passed."""
        self.words[slot + 2] = 0
        after = _TABLE // 8 + (slot + 4 - _TABLE // 8) % (4 * _TABLE_SLOTS)
        if not self.words[after + 3]:
            self.words[slot + 3] = 0
