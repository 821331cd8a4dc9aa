"""A process group of torch.distributed whose members talk over shared memory, and are checked.

    import parity.backend                      # registers it
    dist.init_process_group("parity")          # under any launcher, for the ranks of one host

The methods are those that torch.distributed calls; each says what it does as a move (moves.py) and
which tensors that reads and writes. All ranks of the world share one region, and so one board.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from parity.backend import moves
from parity.backend.board import Board
from parity.backend.call import AnyReceive, Call, Marks, Site, What, marks_of, site
from parity.backend.engine import Engine
from parity.backend.fold import reduction
from parity.backend.guard import Guard
from parity.backend.lane import Lane
from parity.backend.memory import Region
from parity.backend.work import Finished, Handle

NAME = "parity"
_DONE = Finished()


class World:
    """What the groups of one process share, from the first init_process_group to its end."""

    def __init__(self, region: Region, rank: int) -> None:
        self.region = region
        self.board = Board(region, rank)
        self.engine = Engine(self.board)
        self.visits: Counter[str] = Counter()  # how often a group of that name was left


class Place:
    """Of this process in the running world; one per process, like torch.distributed's own."""

    world: World | None = None


def create(options: Any, _: object = None) -> CheckedGroup:
    """Called by torch.distributed for every new group that this rank is a member of."""
    ranks = list(options.global_ranks_in_group)
    rank, size = int(options.group_rank), int(options.group_size)
    world = Place.world
    if world is None:
        world = Place.world = World(_region(options.store, rank, size), rank)
    members = ranks or list(range(size))
    return CheckedGroup(world, str(options.group_id), members, rank)


def _region(store: dist.Store, rank: int, size: int) -> Region:
    if rank == 0:
        region = Region.create(size)
        store.set("parity/region", region.path)
    else:
        region = Region.attach(store.get("parity/region").decode())
    # Rank 0 must not go away before all others have opened the memory.
    if store.add("parity/attached", 1) == size:
        store.set("parity/all attached", "yes")
    if rank == 0:
        store.get("parity/all attached")
    return region


class CheckedGroup(ProcessGroup):  # type: ignore[misc]
    """See the module. `members` are global ranks; seats, as everywhere in c10d's groups, places
    among them.
    """

    def __init__(self, world: World, name: str, members: list[int], seat: int) -> None:
        super().__init__(seat, len(members))
        self._world, self._id, self._members, self._seat = world, name, members, seat
        self._key = f"{name}|{members}|{world.visits[name]}"
        self._lane = Lane(world.board, self._key, members, seat)
        self._channels: dict[tuple[int, int, int], Lane] = {}
        self._known: dict[tuple[What, Site], Marks] = {}
        self._batch: list[Call] | None = None
        self._description = ""
        self._is_open = True

    # What torch.distributed asks of any group

    def getBackendName(self) -> str:  # noqa: N802
        return NAME

    def name(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
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
        world = self._world
        world.visits[self._id] += 1
        try:
            world.engine.settle()
        finally:
            world.board.leave(self._lane.at, self._seat)
            if self._id == "0" or (len(self._members) == world.board.world and self._is_default()):
                world.board.end()
                Place.world = None

    def abort(self) -> None:
        self.shutdown()

    def _is_default(self) -> bool:
        return dist.is_initialized() and dist.group.WORLD is self

    def _start_coalescing(self, device: torch.device) -> None:
        self._batch = []

    def _end_coalescing(self, device: torch.device) -> Work:
        calls, self._batch = self._batch or [], None
        return Handle(self._world.engine, calls, (), lambda: "a batch of calls")

    # The calls

    def allreduce(self, tensors: Any, opts: Any = dist.ReduceOp.SUM, *_: Any) -> Work:
        op = getattr(opts, "reduceOp", opts)
        calls = [self._reduction("all_reduce", x, op, opts) for x in _listed(tensors)]
        return self._handle(calls, opts, _listed(tensors))

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Any, opts: Any, *_: Any) -> Work:
        (x,) = _listed(tensors)
        call = self._reduction("reduce", x, opts.reduceOp, opts, opts.rootRank)
        return self._handle([call], opts, [x])

    def broadcast(self, tensors: Any, opts: Any = 0, *_: Any) -> Work:
        root = opts if isinstance(opts, int) else opts.rootRank
        calls = [self._broadcast(x, root, opts) for x in _listed(tensors)]
        return self._handle(calls, opts, _listed(tensors))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        outs = _listed(outputs if isinstance(outputs[0], Tensor) else outputs[0])
        (x,) = _listed(inputs)
        return self._handle([self._gather("all_gather", x, outs, opts)], opts, outs)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        # c10d passes one list per rank, each with one output per input.
        columns = [list(column) for column in zip(*outputs, strict=True)]
        calls = [
            self._gather("all_gather", x, outs, opts)
            for x, outs in zip(inputs, columns, strict=True)
        ]
        return self._handle(calls, opts, [x for outs in columns for x in outs])

    def all_gather_single(self, output: Tensor, x: Tensor, opts: Any = None) -> Work:
        return self.all_gather_single_coalesced([output], [x], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        calls = [
            self._gather("all_gather", x, out, opts) for out, x in zip(outputs, inputs, strict=True)
        ]
        return self._handle(calls, opts, outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: Any, inputs: Any, opts: Any, *_: Any) -> Work:
        (x,) = _listed(inputs)
        outs = list(outputs[0]) if outputs else None
        return self._handle([self._gather("gather", x, outs, opts, opts.rootRank)], opts, [])

    def scatter(self, outputs: Any, inputs: Any, opts: Any, *_: Any) -> Work:
        (out,), root = _listed(outputs), opts.rootRank
        gives = list(inputs[0]) if inputs else []
        what = _what("scatter", out, f"root {self._members[root]}")

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            return moves.scatter(call, torch.stack(g) if g else None, t[0], root)

        return self._handle([self._start(what, gives, [out], move, opts)], opts, [out])

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> Work:
        (out,) = _listed(outputs)
        parts = list(inputs[0])
        return self._handle([self._reduce_scatter(out, parts, opts)], opts, [out])

    def reduce_scatter_single(self, output: Tensor, x: Tensor, opts: Any = None) -> Work:
        return self.reduce_scatter_single_coalesced([output], [x], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        calls = [
            self._reduce_scatter(out, [x], opts) for out, x in zip(outputs, inputs, strict=True)
        ]
        return self._handle(calls, opts, outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> Work:
        outs, gives = list(outputs), list(inputs)
        what = What("all_to_all", gives[0].dtype, verb="all_to_all")

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            return moves.all_to_all(call, g, t, what.dtype or torch.uint8)

        call = self._start(what, gives, outs, move, opts, with_splits=True)
        return self._handle([call], opts, outs)

    def all_to_all_single(
        self, output: Tensor, x: Tensor, out_splits: Any, in_splits: Any, opts: Any = None, *_: Any
    ) -> Work:
        n, verb = len(self._members), "all_to_all_single"
        what = What("all_to_all", x.dtype, verb=f"{verb} of {_sizes(x, in_splits)}")
        out_row, in_row = (y[0].numel() if len(y) else 0 for y in (output, x))

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            gives = _parts(g[0], in_splits, in_row, n)
            return moves.all_to_all(call, gives, _parts(t[0], out_splits, out_row, n), x.dtype)

        call = self._start(what, [x], [output], move, opts, with_splits=True)
        return self._handle([call], opts, [output])

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None, *_: Any) -> Work:
        call = self._start(What("barrier"), [], [], lambda c, g, t: moves.barrier(c), opts)
        return self._handle([call], opts, [])

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        self.barrier(_SYNC)

    # Messages

    def send(self, tensors: Any, to: int, tag: int = 0) -> Work:
        (x,) = _listed(tensors)
        what = self._message(x, self._seat, to, tag, "send")
        lane, opts = self._channel(self._seat, to, tag, 0), _blocking("send")
        call = self._start(what, [x], [], lambda c, g, t: moves.broadcast(c, g[0], 0), opts, lane)
        return self._handle([call], opts, [])

    def recv(self, tensors: Any, source: int, tag: int = 0) -> Work:
        (x,) = _listed(tensors)
        what = self._message(x, source, self._seat, tag, "recv")
        lane, opts = self._channel(source, self._seat, tag, 1), _blocking("recv")
        call = self._start(what, [], [x], lambda c, g, t: moves.broadcast(c, t[0], 0), opts, lane)
        call.sender = source
        return self._handle([call], opts, [x])

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Work:
        (x,) = _listed(tensors)
        what = self._message(x, None, self._seat, tag, "recv")
        lanes = {
            seat: self._channel(seat, self._seat, tag, 1)
            for seat in range(len(self._members))
            if seat != self._seat
        }
        call = self._start(what, [], [x], lambda c, g, t: moves.broadcast(c, t[0], 0), None, lanes)
        return Handle(self._world.engine, [call], [x], lambda: self._text(call))

    def _message(self, x: Tensor, source: int | None, to: int, tag: int, verb: str) -> What:
        # Both ends agree on elements and type; one may see them in another shape than the other.
        ranks = [self._members[seat] if seat is not None else "any rank" for seat in (source, to)]
        end = f"to rank {ranks[1]}" if verb == "send" else f"from {_rank(ranks[0])}"
        note = f", tag {tag}" if tag else ""
        shape = tuple(x.shape)
        return What("message", x.dtype, shape, x.numel(), "", f"{verb} {end}{note}")

    def _channel(self, source: int, to: int, tag: int, end: int) -> Lane:
        key = source, to, (tag << 1) + end
        found = self._channels.get(key)
        if found is None:
            name = f"{self._key}|{source} to {to}, tag {tag}"
            ends = [self._members[source], self._members[to]]
            found = self._channels[key] = Lane(self._world.board, name, ends, end, self._lane)
        return found

    # What all calls share

    def _reduction(self, name: str, x: Tensor, op: Any, opts: Any, root: int | None = None) -> Call:
        kind = reduction(op, x.dtype)
        if kind.objection:
            raise ValueError(f"{name} of {x.dtype}: {kind.objection}")
        to = "" if root is None else f", root {self._members[root]}"
        what = _what(name, x, kind.name + to)
        takes = [x] if root in (None, self._seat) else []

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            return moves.all_reduce(call, g[0], t[0] if t else None, kind.fold)

        return self._start(what, [x], takes, move, opts)

    def _broadcast(self, x: Tensor, root: int, opts: Any) -> Call:
        what = _what("broadcast", x, f"root {self._members[root]}")
        sides = ([x], []) if root == self._seat else ([], [x])

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            return moves.broadcast(call, (g or t)[0], root)

        return self._start(what, *sides, move, opts)

    def _gather(self, name: str, x: Tensor, outs: Any, opts: Any, root: int | None = None) -> Call:
        n = len(self._members)
        what = _what(name, x, "" if root is None else f"root {self._members[root]}")
        takes = [outs] if isinstance(outs, Tensor) else list(outs or [])
        if len({t.numel() for t in takes}) > 1:
            what = What(name, x.dtype, verb=f"{name} of {list(x.shape)}, sizes that differ,")
            return self._start(
                what, [x], takes,
                lambda c, g, t: moves.all_to_all(c, [g[0]] * n, t, x.dtype), opts, with_splits=True,
            )  # fmt: skip

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            into = t[0].view(n, -1) if isinstance(outs, Tensor) and x.numel() else t or None
            return moves.all_gather(call, g[0], into)

        return self._start(what, [x], takes, move, opts)

    def _reduce_scatter(self, out: Tensor, parts: list[Tensor], opts: Any) -> Call:
        kind = reduction(getattr(opts, "reduceOp", dist.ReduceOp.SUM), out.dtype)
        if kind.objection:
            raise ValueError(f"reduce_scatter of {out.dtype}: {kind.objection}")
        what, n = _what("reduce_scatter", out, kind.name), len(self._members)

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            gives = torch.stack(g) if len(g) > 1 else g[0].view(n, t[0].numel())
            return moves.reduce_scatter(call, gives, t[0], kind.fold)

        return self._start(what, parts, [out], move, opts)

    def _start(
        self,
        what: What,
        reads: list[Tensor],
        writes: list[Tensor],
        move: Callable[[Call, list[Tensor], list[Tensor]], moves.Move],
        opts: Any,
        lane: Lane | dict[int, Lane] | None = None,
        *,
        with_splits: bool = False,
    ) -> Call:
        """Begin a call. What the move sees are flat tensors: copies, unless the caller waits."""
        place = site(2)
        marks = self._known.get((what, place))
        if marks is None:
            text = f"{what} on group {self._label()}, at {place}"
            marks = self._known[what, place] = marks_of(what, text, self._world.board.say)
        call: Call
        if isinstance(lane, dict):
            call = AnyReceive(lane, what, marks, place)
        else:
            call = Call(lane or self._lane, what, marks, place)
        call.with_splits = with_splits
        is_async = getattr(opts, "asyncOp", True)
        gives = [_flat(x, is_async) for x in reads]
        takes = [_room(x, is_async) for x in writes]
        if is_async:
            call.guard = Guard(reads, writes)
        late = [(x, t) for x, t in zip(writes, takes, strict=True) if is_async or not _is_flat(x)]
        if late:
            call.deliver = lambda: _fill(late)
        if self._batch is not None:
            self._batch.append(call)
        self._world.engine.start(call, lambda c: move(c, gives, takes))
        return call

    def _handle(self, calls: list[Call], opts: Any, outputs: Iterable[Tensor]) -> Work:
        engine = self._world.engine
        if self._batch is not None:
            return _DONE  # the batch has the handle
        if getattr(opts, "asyncOp", True):
            return Handle(engine, calls, list(outputs), lambda: self._text(calls[0]))
        for call in calls:
            engine.wait(call)
            call.hand_over()
        return _DONE

    def _text(self, call: Call) -> str:
        return self._world.board.read(call.marks.phrase)

    def _label(self) -> str:
        """The axis of a mesh, the name that somebody gave, or the ranks."""
        given = self._description.removeprefix("mesh_")
        if given in ("", "undefined"):
            return str(self._members)
        return "world" if given == "default_pg" else given


class _Sync:
    asyncOp = False  # noqa: N815


_SYNC = _Sync()


def _blocking(verb: str) -> object:
    """c10d does not tell a group whether its caller waits: its own function's name does."""
    return _SYNC if sys._getframe(2).f_code.co_name == verb else None


def _rank(rank: int | str) -> str:
    return f"rank {rank}" if isinstance(rank, int) else rank


def _listed(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _what(name: str, x: Tensor, detail: str = "") -> What:
    return What(name, x.dtype, tuple(x.shape), x.numel(), detail)


def _sizes(x: Tensor, splits: Sequence[int]) -> str:
    return f"{list(x.shape)} split into {list(splits)}" if splits else str(list(x.shape))


def _parts(flat: Tensor, splits: Sequence[int], row: int, n: int) -> moves.Parts:
    """A flat tensor as one part per member: of equal size, or of so many rows each."""
    if not splits:
        return flat.view(n, flat.numel() // n)
    return flat.split([size * row for size in splits])


def _is_flat(x: Tensor) -> bool:
    return x.is_contiguous()


def _flat(x: Tensor, copy: bool) -> Tensor:
    x = x.detach()
    y = x.contiguous().view(-1)
    return y.clone() if copy and y.data_ptr() == x.data_ptr() else y


def _room(x: Tensor, apart: bool) -> Tensor:
    """Where the result may go, flat: the tensor itself, or a place that nobody sees yet."""
    if apart or not _is_flat(x):
        return torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    return x.detach().view(-1)


def _fill(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for x, result in pairs:
        x.detach().copy_(result.view(x.shape))
