"""One call of a rank, from its issue until its result is where the caller wants it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from hashlib import blake2b
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

import torch
from torch.distributed import c10d_logger
from torch.utils._python_dispatch import _disable_current_modes

from parity.backend import board as b
from parity.backend.lane import Disagreement, Lane

if TYPE_CHECKING:
    from parity.backend.guard import Guard
    from parity.backend.ledger import Entry
    from parity.backend.moves import Move

P = ParamSpec("P")
R = TypeVar("R")
_TORCH, _HERE = Path(torch.__file__).parent, Path(__file__).parent
_NOT_THE_USERS = (str(_TORCH), str(_HERE), "<")
_PARITY = f"{_HERE.parent}{os.sep}"
_DISTRIBUTED = f"{_TORCH / 'distributed'}{os.sep}"
_THE_CALL_ITSELF = (
    str(_HERE),
    str(_TORCH / "distributed" / "distributed_c10d.py"),
    str(_TORCH / "distributed" / "c10d_logger.py"),
    str(_TORCH / "overrides.py"),
)
_MODES = ("__torch_function__", "__torch_dispatch__")


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """What the backend does to tensors is nothing that a user's dispatch mode should count."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._len_torch_dispatch_stack():
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


class What(NamedTuple):
    """What is called; two members of a lane must mean the same. `detail` is the reduction, or the
    root, or nothing; `shape` the one that the user passed.
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    elements: int = 0  # how many; all members must agree
    detail: str = ""
    verb: str = ""  # what the user called, if members call it by different names (send, recv)

    @property
    def called(self) -> str:
        return (self.verb or self.name).split()[0]

    def __str__(self) -> str:
        sort = str(self.dtype).removeprefix("torch.")
        of = f" of {sort}{list(self.shape)}" if self.dtype is not None else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.verb or self.name}{detail}{of}"


class Site(NamedTuple):
    """A place in the user's code."""

    code: CodeType
    instruction: int

    def __str__(self) -> str:
        lines = [
            line for begin, end, line in self.code.co_lines() if begin <= self.instruction < end
        ]
        line = next((line for line in lines if line), self.code.co_firstlineno)
        return f"{self.code.co_filename}:{line} in {self.code.co_name}"


@lru_cache(None)
def _is_the_users(code: CodeType) -> bool:
    is_a_mode = code.co_name in _MODES  # which stands between a caller and whom it calls
    return not is_a_mode and not code.co_filename.startswith(_NOT_THE_USERS)


def site(depth: int = 1) -> Site:
    """Where the user's code stands that led here."""
    frame: FrameType | None = sys._getframe(depth)
    last = frame
    while frame is not None:
        if _is_the_users(frame.f_code):
            return Site(frame.f_code, frame.f_lasti)
        last, frame = frame, frame.f_back
    assert last is not None
    return Site(last.f_code, last.f_lasti)


def trail() -> str:
    """All places of the user's code that led here, the innermost first, up to parity's own."""
    places = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PARITY) and not file.startswith(str(_HERE)):
            break
        if _is_the_users(frame.f_code):
            places.append(Site(frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return _joined(tuple(places))


@lru_cache(None)
def _joined(places: tuple[Site, ...]) -> str:
    return " < ".join(map(str, places))


def through() -> str:
    """The function of torch.distributed that the user called, or that called in the user's stead:
    `all_reduce` for most, `all_gather_object`, `init_device_mesh` for what they call in turn.
    """
    name = ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_the_users(frame.f_code):
        code = frame.f_code
        if code.co_filename.startswith(_DISTRIBUTED) and code.co_filename != c10d_logger.__file__:
            name = code.co_name
        frame = frame.f_back
    return name


def is_called_by_the_user() -> bool:
    """Whether the user's own line made the call at hand, and not some other part of torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_code.co_filename.startswith(_THE_CALL_ITSELF) or frame.f_code.co_name in _MODES
    ):
        frame = frame.f_back
    return frame is None or _is_the_users(frame.f_code)


class Marks(NamedTuple):
    """A call in three words: what must agree, the shape if it says something, and the text."""

    signature: int
    shape: int
    phrase: int


def _digest(value: object) -> int:
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=7).digest()) + 1


def marks_of(what: What, text: str, say: Callable[[str], int]) -> Marks:
    # A flat tensor is how one passes a shape on purpose, and fits any of the same size.
    shape = _digest(what.shape) if len(what.shape) > 1 else 0
    agreed = _digest((what.name, str(what.dtype), what.elements, what.detail))
    return Marks(agreed, shape, say(text))


class Call:
    """In flight. `deliver` puts the result where the caller sees it, when the caller asks."""

    def __init__(self, lane: Lane, what: What, marks: Marks, place: Site) -> None:
        self.lane, self.what, self.marks, self.site = lane, what, marks, place
        self.ordinal = 0
        self.sender = -1
        self.move: Move | None = None
        self.step = 0  # which must be complete before the move goes on
        self.is_open = False
        self.is_done = False
        self.deliver: Callable[[], None] | None = None  # where the result goes at the wait
        self.guard: Guard | None = None
        self.waited = 0.0  # seconds
        self.with_splits = False
        self.entry: Entry | None = None  # of the ledger
        self.landed: Callable[[], None] | None = None  # whom to tell that it is over

    def issue(self, move: Move) -> None:
        """Join the lane's queue; nobody has been told anything yet but that it comes."""
        lane = self.lane
        self.move = move
        lane.issued = self.ordinal = lane.issued + 1
        lane.tell(b.ISSUED, self.ordinal)
        lane.queue.append(self)

    def advance(self) -> bool:
        """Go on as far as the others allow; whether it is done. Only the first of a queue may."""
        lane, move = self.lane, self.move
        assert move is not None
        while lane.is_complete(self.step):
            if self.step and lane.is_faulty:
                raise Disagreement
            step = next(move, None)
            if step is None:
                self.is_done = True
                self.move = None
                return True
            self.step = step
        return False

    def post(self, last: Callable[[], None] | None = None) -> int:
        if self.is_open:
            return self.lane.post(last)
        self.is_open = True
        lane, marks = self.lane, self.marks
        lane.tell(b.SIGNATURE, marks.signature)
        lane.tell(b.SHAPE, marks.shape)
        lane.tell(b.PHRASE, marks.phrase)
        return lane.post(lambda: self._open(last))

    def _open(self, last: Callable[[], None] | None) -> None:
        """Run by the last member to arrive: do all mean the same call?"""
        lane = self.lane
        signatures, shapes = lane.row(b.SIGNATURE), {s for s in lane.row(b.SHAPE) if s}
        if min(signatures) != max(signatures) or len(shapes) > 1:
            raise Disagreement
        if self.with_splits:
            lane.words[lane.at + b.AGREED] = max(1, *lane.row(b.ROUNDS))
            if not lane.splits_agree():
                raise Disagreement
        if last is not None:
            last()

    @unseen
    def hand_over(self, is_promised: bool = False) -> None:
        """The caller takes the result: look whether the tensors were left alone, and fill them."""
        if self.entry is not None:
            self.entry.waited = self.waited
        if self.landed is not None:
            self.landed()
        if self.guard is not None:
            place = "its future" if is_promised else str(site())
            self.guard.check(self.lane.board.read(self.marks.phrase), place)
        if self.deliver is not None:
            self.deliver()

    @property
    def source(self) -> int:
        """Of a message: the seat in the group of its sender."""
        return self.sender

    def is_ready(self) -> bool:
        return self.lane.queue[0] is self and self.lane.is_complete(self.step)

    def wait_entries(self) -> list[b.Wait]:
        step = self.lane.queue[0].step if self.lane.queue else 0
        return [b.Wait(self.lane.at, self.ordinal, self.marks.phrase, step)]


class AnyReceive(Call):
    """A message from whoever sends first. It joins the sender's lane when it knows which."""

    def __init__(self, lanes: dict[int, Lane], what: What, marks: Marks, place: Site) -> None:
        super().__init__(next(iter(lanes.values())), what, marks, place)
        self.lanes = lanes
        self.make: Callable[[Call], Move] | None = None
        self.is_bound = False
        for lane in lanes.values():
            lane.words[lane.at + b.ANY] = 1

    def bind(self) -> bool:
        """Whether a sender was found."""
        for seat, lane in self.lanes.items():
            if not lane.queue and lane.peer_has_posted(0):
                self.lane, self.sender, self.is_bound = lane, seat, True
                assert self.make is not None
                self.issue(self.make(self))
                return True
        return False

    def is_ready(self) -> bool:
        if self.is_bound:
            return super().is_ready()
        return any(not lane.queue and lane.peer_has_posted(0) for lane in self.lanes.values())

    def wait_entries(self) -> list[b.Wait]:
        if self.is_bound:
            return super().wait_entries()
        return [b.Wait(x.at, x.issued + 1, self.marks.phrase) for x in self.lanes.values()]
