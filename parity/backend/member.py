"""What a rank does for any call on a group: name it, begin it, wait for it, hand its result over.

All groups of a process share its world: one region of memory, one board, one engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from parity.backend import moves
from parity.backend.board import Board
from parity.backend.call import (
    AnyReceive,
    Call,
    Marks,
    Site,
    What,
    marks_of,
    site,
    through,
    trail,
    unseen,
)
from parity.backend.engine import Engine
from parity.backend.fold import Reduction, by_place, reduction, twice
from parity.backend.guard import Guard
from parity.backend.lane import Lane
from parity.backend.ledger import Entry, Ledger, name_of
from parity.backend.memory import Region
from parity.backend.mutation import Mutation
from parity.backend.settings import Rule, Settings
from parity.backend.watch import Watch
from parity.backend.work import Finished, Handle, Together
from parity.errors import ProtocolError

NAME = "parity"
_DONE = Finished()
_MakeMove = Callable[[Call, list[Tensor], list[Tensor]], moves.Move]


class World:
    """What the groups of one process share, from the first init_process_group to its end."""

    def __init__(self, region: Region, rank: int) -> None:
        self.region = region
        self.board = Board(region, rank)
        self.engine = Engine(self.board)
        self.visits: Counter[str] = Counter()  # how often a group of that name was left
        self.home: Member | None = None  # the first group, with which the world ends
        settings = Place.settings
        self.ledger = Place.ledger = Ledger(settings.ledger) if settings.ledger else None
        self.mutation = Place.mutation = Mutation(settings.rules, rank) if settings.rules else None
        self.groups: list[Member] = []  # that are open
        self.watch = Place.watch
        self.by_place = settings.order == "place"


class Place:
    """Of this process in the running world; one per process, like torch.distributed's own."""

    world: World | None = None
    settings = Settings()
    watch: Watch | None = None
    ledger: Ledger | None = None  # of the last world: to be read after its end too
    mutation: Mutation | None = None  # likewise


class Member(ProcessGroup):
    """This rank in one group. `members` are global ranks; seats, as everywhere in c10d's groups,
    places among them.
    """

    def __init__(self, world: World, name: str, members: list[int], seat: int) -> None:
        super().__init__(seat, len(members))  # type: ignore[call-arg]
        self.world, self._id, self.members, self.seat = world, name, members, seat
        self.key = f"{name}|{members}|{world.visits[name]}"
        self.lane = Lane(world.board, self.key, members, seat)
        self.channels: dict[tuple[int, int, int], Lane] = {}
        self._guests: Lane | None = None  # for calls of other groups that a rule sends here
        self._known: dict[tuple[What, Site], tuple[Marks, str]] = {}
        self._batch: list[Handle] | None = None
        self._calls = 0
        self._epoch = 0
        self._description = ""
        self._is_open = True
        world.home = world.home or self
        world.groups.append(self)

    # What torch.distributed asks of any group

    def getBackendName(self) -> str:  # noqa: N802
        return NAME

    def name(self) -> str:
        return NAME

    @property
    def _device_types(self) -> list[torch.device]:
        gpu = [torch.device("cuda")] if torch.cuda.is_available() else []
        return [torch.device("cpu"), *gpu]

    @property
    def group_name(self) -> Any:
        return self._id

    def _set_group_desc(self, text: str) -> None:
        self._description = text

    @property
    def group_desc(self) -> str:
        return self._description

    def shutdown(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        world = self.world
        world.visits[self._id] += 1
        world.groups.remove(self)
        try:
            world.engine.settle(None if world.home is self else self)
        finally:
            world.board.leave(self.lane.at, self.seat)
            if world.home is self:
                world.board.end()
                world.region.close()
                Place.world = None

    def abort(self) -> None:
        self.shutdown()

    def _start_coalescing(self, device: torch.device) -> None:
        self._batch = []

    def _end_coalescing(self, device: torch.device) -> Work:
        handles, self._batch = self._batch or [], None
        return Together(handles)

    @unseen
    def begin(
        self,
        what: What,
        reads: list[Tensor],
        writes: list[Tensor],
        move: _MakeMove,
        opts: Any,
        lane: Lane | dict[int, Lane] | None = None,
        *,
        with_splits: bool = False,
    ) -> Call:
        """Begin a call. What the move sees are flat tensors: copies, unless the caller waits."""
        if not self._is_open:
            raise ProtocolError(f"{what} on group {self._label()}: the group was destroyed")
        self._calls += 1
        place = site(2)
        marks, text = self._marks(what, place)
        rule = self._rule(what, text, self._calls)
        call: Call
        if isinstance(lane, dict):
            call = AnyReceive(lane, what, marks, place)
        else:
            call = Call(lane or self.lane, what, marks, place)
        call.with_splits = with_splits
        if rule is not None and rule.change == "skip":
            call.is_done = True
            return call
        is_async = getattr(opts, "asyncOp", True)
        gives = [_flat(x, is_async) for x in reads]
        apart = is_async or rule is not None
        takes = [_room(x, apart) for x in writes]
        late = [(x, t) for x, t in zip(writes, takes, strict=True) if apart or not _is_flat(x)]
        if rule is not None:
            call, takes = self._changed(rule, text, call, writes, gives, takes, move)
        elif late:
            call.deliver = lambda: _fill(late)
        self._enter(call, reads, writes)
        if is_async:
            call.guard = Guard(reads, writes)
            if self.world.watch is not None:
                self.world.watch.begin(id(call), reads, writes, text)
                call.landed = partial(self.world.watch.end, id(call))
        if call.ordinal == 0:  # else a rule has begun it already
            self.world.engine.start(call, lambda c: move(c, gives, takes))
        return call

    def kind_of(self, name: str, x: Tensor, op: Any, to: str = "") -> tuple[Reduction, What]:
        kind = self._kind(name, x.dtype, op)
        what = what_of(name, x, kind.name + to)
        mutation = self.world.mutation
        if mutation is None:
            return kind, what
        rule = self._rule(what, self._marks(what, site(2))[1], self._calls + 1)
        if rule is None or rule.change not in ("op", "double"):
            return kind, what
        if rule.change == "op":
            other = self._kind(name, x.dtype, getattr(dist.ReduceOp, str(rule.value)))
        else:
            other = twice(kind)
        return mutation.instead(kind, other), what_of(name, x, other.name + to)

    def _kind(self, name: str, dtype: torch.dtype, op: Any) -> Reduction:
        kind = reduction(op, dtype)
        if kind.objection:
            raise ValueError(f"{name} of {dtype}: {kind.objection}")
        return kind._replace(fold=by_place(kind.fold)) if self.world.by_place else kind

    def _marks(self, what: What, place: Site) -> tuple[Marks, str]:
        if self._epoch != self.world.board.epoch:
            self._epoch = self.world.board.epoch
            self._known.clear()
        found = self._known.get((what, place))
        if found is None:
            text = f"{what} on group {self._label()}, at {place}"
            found = self._known[what, place] = marks_of(what, text, self.world.board.say), text
        return found

    def _rule(self, what: What, text: str, number: int) -> Rule | None:
        mutation = self.world.mutation
        if mutation is None:
            return None
        name = name_of(what.called, self._label(), trail()) if mutation.by_site else ""
        return mutation.rule_for(text, name, number)

    def _enter(self, call: Call, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Into the ledger, if there is one."""
        ledger, what = self.world.ledger, call.what
        if ledger is not None:
            phase, module = ledger.place()
            call.entry = Entry(
                op=what.called,
                group=self._label(),
                bytes=sum(x.nbytes for x in reads or writes),
                dtype=str(what.dtype).removeprefix("torch."),
                phase=phase,
                module=module,
                site=str(call.site),
                detail=what.detail or what.verb.removeprefix(what.called).strip(),
                members=tuple(self.members),
                result=sum(x.nbytes for x in writes),
                through=through(),
                trail=trail(),
            )
            ledger.add(call.entry)

    def _changed(
        self,
        rule: Rule,
        text: str,
        call: Call,
        writes: list[Tensor],
        gives: list[Tensor],
        takes: list[Tensor],
        move: _MakeMove,
    ) -> tuple[Call, list[Tensor]]:
        """See to it that the caller gets what the rule says: what to call for it, into what."""
        mutation, engine = self.world.mutation, self.world.engine
        assert mutation is not None
        mutation.count()
        before = [x.detach().clone() for x in writes]
        true = takes
        if rule.change == "swap":
            call, takes, true = mutation.swap(
                call, takes, lambda c, t: engine.start(c, lambda c: move(c, gives, t))
            )

        def deliver() -> None:
            results = mutation.results(
                rule, text, takes, lambda: self._elsewhere(rule, call, gives, takes, move)
            )
            _fill(list(zip(writes, before if results is None else results, strict=True)))
            for x, result in zip(writes, true, strict=True):
                mutation.note(x.detach(), result)

        call.deliver = deliver
        return call, takes

    def _elsewhere(
        self,
        rule: Rule,
        call: Call,
        gives: list[Tensor],
        takes: list[Tensor],
        move: _MakeMove,
    ) -> list[Tensor]:
        """What the same call gives in another group, or what the next member of that one got."""
        other = next((g for g in self.world.groups if g._label() == rule.value), None)
        if other is None:
            return takes
        if other._guests is None:
            name, board, members = f"{other.key}|guests", self.world.board, other.members
            other._guests = Lane(board, name, members, other.seat, other.lane)
        again = Call(other._guests, call.what, call.marks, call.site)
        again.with_splits = call.with_splits
        n = len(other.members)
        copies = 1 if rule.change == "group" else n
        rooms = [torch.empty_like(t) for t in takes for _ in range(copies)]
        if rule.change == "peer":
            move = lambda c, g, t: moves.all_gather(c, takes[0], t)  # noqa: E731
        self.world.engine.start(again, lambda c: move(c, gives, rooms))
        self.world.engine.wait(again)
        return rooms if rule.change == "group" else [rooms[(other.seat + 1) % n]]

    def finish(self, calls: list[Call], opts: Any, outputs: Iterable[Tensor]) -> Work:
        engine = self.world.engine
        if getattr(opts, "asyncOp", True):
            handle = Handle(engine, calls, list(outputs), lambda: self.text_of(calls[0]), self)
            if self._batch is not None:
                self._batch.append(handle)
            return handle
        for call in calls:
            engine.wait(call)
            call.hand_over()
        return _DONE

    def text_of(self, call: Call) -> str:
        return self.world.board.read(call.marks.phrase)

    def _label(self) -> str:
        """The axis of a mesh, the name that somebody gave, or the ranks."""
        given = self._description.removeprefix("mesh_")
        if given in ("", "undefined"):
            return str(self.members)
        return "world" if given == "default_pg" else given


def _fill(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Put results where the caller looks for them."""
    for x, result in pairs:
        x.detach().copy_(result.view(x.shape))


def what_of(name: str, x: Tensor, detail: str = "") -> What:
    return What(name, x.dtype, tuple(x.shape), x.numel(), detail)


def _is_flat(x: Tensor) -> bool:
    return x.is_contiguous()


def _flat(x: Tensor, copy: bool) -> Tensor:
    x = x.detach()
    y = x.contiguous().view(-1)
    return y.clone() if copy and y.data_ptr() == x.data_ptr() else y


def _room(x: Tensor, apart: bool) -> Tensor:
    """Where the result may go, flat: the tensor itself, or a place that nobody sees yet."""
    if apart or not _is_flat(x):
        with torch.inference_mode(False):  # whoever fills it may be in another mode
            return torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    return x.detach().view(-1)
