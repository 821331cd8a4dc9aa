"""What makes a rank's calls go on: whoever waits for one of them moves all that can move.

There is no thread behind the scenes, but for calls whose future was asked for: those may be waited
for where no Python runs. A rank sleeps on its bell until the last of those it waits for rings.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

from parity.backend import board as b
from parity.backend.board import Board
from parity.backend.call import AnyReceive, Call, unseen
from parity.backend.deadlock import lost_member, passed_verdict, verdict_on
from parity.backend.lane import Disagreement, Lane
from parity.backend.moves import Move
from parity.backend.threads import Stand, look, may_call, parked
from parity.errors import Mismatch, ParityError, Race

_Promise = tuple[Sequence[Call], Callable[[], None], Callable[[Exception], None]]
# Seconds asleep after which a rank looks whether it waits in vain: soon, and then now and again.
NAP, LONG_NAP = 0.05, 0.3
LINGER = 2e-5  # seconds awake before the sleep


class Engine:
    """All calls of this process that are under way, in all its groups."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.busy: dict[int, Lane] = {}  # lanes with calls under way, by identity
        self.changed = threading.Condition(threading.RLock())
        self._is_driven = False
        self._failure: ParityError | None = None
        self._unheard: ParityError | None = None  # raised in a thread that nobody may look after
        self._waiting: dict[int, Call] = {}  # what each thread of this process is blocked in
        self._tasks: dict[int, int] = {}  # the same threads, by the kernel's number
        self._callers = {threading.main_thread().ident}
        self._parked: set[int | None] = set()  # threads that only those in `_waiting` can wake
        self._open_choices: list[AnyReceive] = []
        self._promised: list[_Promise] = []
        self._keepers: set[int] = set()  # threads that keep promises
        # By the identity of the handle: the group, and what is to be said.
        self.unwaited: dict[int, tuple[object, Callable[[], str]]] = {}
        self.complaints: list[ParityError] = []

    def start(self, call: Call, move: Callable[[Call], Move]) -> None:
        """Begin a call: as far as it can go now."""
        with self.changed:
            self.complain()
            self._callers.add(threading.get_ident())
            if isinstance(call, AnyReceive):
                call.make = move
                self._open_choices.append(call)
                self._bind()
                return
            call.issue(move(call))
            self.busy[id(call.lane)] = call.lane
            if call.lane.queue[0] is call:
                self._advance(call.lane)

    def complain(self) -> None:
        if self._failure is not None:
            first = str(self._failure).splitlines()[0]
            raise type(self._failure)(f"an earlier call of this rank has failed: {first}")
        if self.complaints:
            raise self.complaints.pop(0)

    @unseen
    def poll(self, call: Call) -> bool:
        """Whether the call is done by now."""
        with self.changed:
            if not call.is_done and not self._is_driven:
                self._progress()
            return call.is_done

    @unseen
    def wait(self, call: Call) -> None:
        if call.is_done:
            return
        begin = time.perf_counter()
        thread = threading.get_ident()
        with self.changed:
            self._waiting[thread] = call
            self._tasks[thread] = threading.get_native_id()
            try:
                while not call.is_done:
                    if self._is_driven:  # another thread of this rank sleeps for all of them
                        self.changed.wait(NAP)
                    else:
                        self._drive(call)
            except ParityError as error:
                self._failure = self._failure or error
                if thread not in (threading.main_thread().ident, *self._keepers):
                    self._unheard = self._unheard or error
                raise
            finally:
                del self._waiting[thread], self._tasks[thread]
        call.waited += time.perf_counter() - begin

    def _drive(self, call: Call) -> None:
        self._is_driven = True
        naps = 0
        stands: dict[int, Stand] = {}
        try:
            while True:
                self._progress()
                if call.is_done:
                    return
                if self._sleep(NAP if naps < 2 else LONG_NAP):
                    naps, stands, self._parked = 0, {}, set()
                    continue
                naps, stands = naps + 1, self._look_inside(stands)
                if naps >= 2:
                    self._look_around(call)
        finally:
            self._is_driven = False
            self._parked = set()
            self.board.wake_up()
            self.changed.notify_all()

    def _bind(self) -> None:
        passed: set[int] = set()  # lanes that an earlier choice waits for: it comes first
        for choice in list(self._open_choices):
            lanes = {lane.at for lane in choice.lanes.values()}
            if lanes & passed or not choice.bind():
                passed |= lanes
            else:
                self._open_choices.remove(choice)
                self.busy[id(choice.lane)] = choice.lane

    def _progress(self) -> None:
        self._bind()
        for lane in list(self.busy.values()):
            self._advance(lane)

    def _advance(self, lane: Lane) -> None:
        queue = lane.queue
        while queue:
            call = queue[0]
            try:
                if not call.advance():
                    return
            except Disagreement:
                raise self._mismatch(call) from None
            queue.popleft()
            if len(self._waiting) > 1:  # it may be another thread's
                self.changed.notify_all()
        self.busy.pop(id(lane), None)

    def _sleep(self, seconds: float) -> bool:
        """Until the bell rings; False if it did not for a while."""
        board, region = self.board, self.board.region
        if len(self.busy) == 1:
            self._linger()
        region.acquire()
        heads = [lane.queue[0] for lane in self.busy.values()]
        if any(call.is_ready() for call in (*heads, *self._open_choices)):
            region.release()
            return True
        board.fall_asleep(self._blocked_in())
        region.release()
        if error := passed_verdict(board):
            raise error
        self.changed.release()
        try:
            return region.wait(board.rank, seconds)
        finally:
            self.changed.acquire()

    def _linger(self) -> None:
        """Of two ranks the other is often a moment behind: to sleep and be woken takes longer."""
        (lane,) = self.busy.values()
        if len(lane.members) == 2:
            step, until = lane.queue[0].step, time.perf_counter() + LINGER
            while not lane.is_complete(step) and time.perf_counter() < until:
                os.sched_yield()

    def _blocked_in(self) -> list[b.Wait]:
        """What would set this process free; nothing if one of its threads is free already."""
        callers = {*self._callers, *self._keepers}
        if len(running := sys._current_frames()) > 1:
            alive = {thread.ident: thread for thread in threading.enumerate()}
            self._callers &= alive.keys()
            # Whoever has not called yet may do so, but for what libraries run in the background.
            callers = {*self._callers, *self._keepers, *may_call(running, alive)}
        if not callers - self._parked <= self._waiting.keys():
            return []
        return [entry for call in self._waiting.values() for entry in call.wait_entries()]

    def _look_inside(self, before: dict[int, Stand]) -> dict[int, Stand]:
        """Which threads wait for those that are blocked here: for a future, or for their end."""
        now = look() if len(sys._current_frames()) > 1 or len(self._waiting) > 1 else {}
        self._parked = parked(before, now, self._tasks.values())
        return now

    def _look_around(self, call: Call) -> None:
        board = self.board
        error = verdict_on(board) or lost_member(board, call.wait_entries())
        if error is not None:
            raise error

    def _mismatch(self, call: Call) -> Mismatch:
        lane, board = call.lane, self.board
        if lane.words[lane.at + b.FAULT] == 2:
            return Mismatch(f"another rank could not compute its part of {call.what}")
        lines = [
            f"rank {rank} calls {board.read(phrase)}"
            for rank, phrase in zip(lane.members, lane.row(b.PHRASE), strict=True)
        ]
        head = f"the ranks of one group do not call the same thing (call no. {call.ordinal}):"
        return Mismatch("\n  ".join([head, *lines]))

    # Futures

    def promise(
        self,
        calls: Sequence[Call],
        keep: Callable[[], None],
        fail: Callable[[Exception], None],
    ) -> None:
        """See to it that calls get done though nobody may come and wait for them; then `keep`."""
        promise = calls, keep, fail
        with self.changed:
            # One after the other, so that what hangs on futures runs in one order on all ranks. But
            # what hangs on one may wait for another, which must then not stand behind it.
            if threading.get_ident() in self._keepers:
                queue = [promise]
            else:
                queue = self._promised
                queue.append(promise)
            if len(queue) == 1:
                threading.Thread(target=self._keep_promises, args=(queue,), daemon=True).start()

    def _keep_promises(self, queue: list[_Promise]) -> None:
        with self.changed:
            self._keepers.add(threading.get_ident())
        while True:
            calls, keep, fail = queue[0]
            try:
                for call in calls:
                    self.wait(call)
                keep()
            except Exception as error:  # whatever it is, the future's holder is told
                fail(error)
            with self.changed:
                queue.pop(0)
                if not queue:
                    self._keepers.discard(threading.get_ident())
                    return

    # What nobody waited for

    def forget(self, handle: int) -> None:
        """A handle has gone, and nobody had waited: said at the next call, or at the end."""
        _, phrase = self.unwaited.pop(handle, (None, None))
        if phrase is not None:
            self.complaints.append(_forgotten(phrase()))

    def settle(self, group: object = None) -> None:
        """At the end (of one group): all must have been waited for, unless something went wrong."""
        if self._unheard is not None:
            error, self._unheard = self._unheard, None
            raise error
        if self._failure is not None:
            return
        for handle, (owner, _) in list(self.unwaited.items()):
            if group is None or owner is group:
                self.forget(handle)
        self.complain()


def _forgotten(phrase: str) -> Race:
    return Race(f"nobody waited for {phrase}:\n  call wait() on what it returned")
