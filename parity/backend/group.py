"""A process group of torch.distributed whose members talk over shared memory, and are checked.

    import parity.backend                      # registers it
    dist.init_process_group("parity")          # under any launcher, for the ranks of one host

The methods are those that torch.distributed calls; each says what it does as a move (moves.py) and
which tensors that reads and writes.
"""
# torch declares overloads that it never calls on a group written in Python.
# mypy: disable-error-code="override,assignment"

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work, c10d_logger, distributed_c10d

from parity.backend import moves
from parity.backend.board import MAX_RANKS
from parity.backend.call import Call, What
from parity.backend.lane import Lane
from parity.backend.member import Member, Place, World, what_of
from parity.backend.memory import Region
from parity.backend.work import Finished
from parity.errors import ProtocolError


def create(options: Any, _: object = None) -> CheckedGroup:
    """Called by torch.distributed for every new group that this rank is a member of."""
    ranks = list(options.global_ranks_in_group)
    rank, size = int(options.group_rank), int(options.group_size)
    world = Place.world
    if world is None:
        if ranks and dist.is_initialized():
            raise ProtocolError("init_process_group('parity') must come before groups of it")
        world = Place.world = World(_region(options.store, rank, size), rank)
    members = ranks or list(range(size))
    return CheckedGroup(world, str(options.group_id), members, rank)


def _region(store: Any, rank: int, size: int) -> Region:
    """The memory of a new world. All ranks leave together: a store may see several worlds."""
    if size > MAX_RANKS:
        raise ProtocolError(f"{size} ranks: the backend has room for {MAX_RANKS} on one host")
    number = (store.add("parity/arrivals", 1) - 1) // size
    key = f"parity/{number}/"
    if rank == 0:
        region = Region.create(size)
        store.set(key + "region", region.path)
    else:
        region = Region.attach(store.get(key + "region").decode())
    if store.add(key + "attached", 1) == size:
        store.set(key + "all attached", "yes")
    store.get(key + "all attached")
    return region


class CheckedGroup(Member):
    """What torch.distributed calls on a group, by torch's names."""

    def allreduce(self, tensors: Any, opts: Any = dist.ReduceOp.SUM, *_: Any) -> Work:
        op = getattr(opts, "reduceOp", opts)
        if any(x.is_sparse for x in _listed(tensors)):
            return self._sum_sparse(_listed(tensors), op)
        calls = [self._reduction("all_reduce", x, op, opts) for x in _listed(tensors)]
        return self.finish(calls, opts, _listed(tensors))

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Any, opts: Any, *_: Any) -> Work:
        (x,) = _listed(tensors)
        call = self._reduction("reduce", x, opts.reduceOp, opts, opts.rootRank)
        return self.finish([call], opts, [x])

    def broadcast(self, tensors: Any, opts: Any = 0, *_: Any) -> Work:
        root = opts if isinstance(opts, int) else opts.rootRank
        calls = [self._broadcast(x, root, opts) for x in _listed(tensors)]
        return self.finish(calls, opts, _listed(tensors))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        outs = _listed(outputs if isinstance(outputs[0], Tensor) else outputs[0])
        (x,) = _listed(inputs)
        return self.finish([self._gather("all_gather", x, outs, opts)], opts, outs)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        # c10d passes one list per rank, each with one output per input.
        columns = [list(column) for column in zip(*outputs, strict=True)]
        calls = [
            self._gather("all_gather", x, outs, opts)
            for x, outs in zip(inputs, columns, strict=True)
        ]
        return self.finish(calls, opts, [x for outs in columns for x in outs])

    def all_gather_single(self, output: Tensor, x: Tensor, opts: Any = None) -> Work:
        return self.all_gather_single_coalesced([output], [x], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        calls = [
            self._gather("all_gather", x, out, opts) for out, x in zip(outputs, inputs, strict=True)
        ]
        return self.finish(calls, opts, outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: Any, inputs: Any, opts: Any, *_: Any) -> Work:
        (x,) = _listed(inputs)
        outs = list(outputs[0]) if outputs else None
        return self.finish([self._gather("gather", x, outs, opts, opts.rootRank)], opts, [])

    def scatter(self, outputs: Any, inputs: Any, opts: Any, *_: Any) -> Work:
        (out,), root = _listed(outputs), opts.rootRank
        gives = list(inputs[0]) if inputs else []
        what = what_of("scatter", out, f"root {self.members[root]}")

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            return moves.scatter(call, torch.stack(g) if g else None, t[0], root)

        return self.finish([self.begin(what, gives, [out], move, opts)], opts, [out])

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> Work:
        (out,) = _listed(outputs)
        parts = list(inputs[0])
        return self.finish([self._reduce_scatter(out, parts, opts)], opts, [out])

    def reduce_scatter_single(self, output: Tensor, x: Tensor, opts: Any = None) -> Work:
        return self.reduce_scatter_single_coalesced([output], [x], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        calls = [
            self._reduce_scatter(out, [x], opts) for out, x in zip(outputs, inputs, strict=True)
        ]
        return self.finish(calls, opts, outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> Work:
        outs, gives = list(outputs), list(inputs)
        for name, parts in (("inputs", gives), ("outputs", outs)):
            self._check_parts("all_to_all", name, len(parts))
        what = What("all_to_all", gives[0].dtype, verb="all_to_all")

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            return moves.all_to_all(call, g, t, what.dtype or torch.uint8)

        call = self.begin(what, gives, outs, move, opts, with_splits=True)
        return self.finish([call], opts, outs)

    def all_to_all_single(
        self, output: Tensor, x: Tensor, out_splits: Any, in_splits: Any, opts: Any = None, *_: Any
    ) -> Work:
        n, verb = len(self.members), "all_to_all_single"
        for name, splits in (("input splits", in_splits), ("output splits", out_splits)):
            self._check_parts(verb, name, len(splits) or n)
        what = What("all_to_all", x.dtype, verb=_verb(verb, tuple(x.shape), tuple(in_splits)))
        out_row, in_row = (y[0].numel() if len(y) else 0 for y in (output, x))

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            gives = _parts(g[0], in_splits, in_row, n)
            return moves.all_to_all(call, gives, _parts(t[0], out_splits, out_row, n), x.dtype)

        call = self.begin(what, [x], [output], move, opts, with_splits=True)
        return self.finish([call], opts, [output])

    alltoall_base = all_to_all_single

    def _check_parts(self, verb: str, name: str, count: int) -> None:
        if count != len(self.members):
            raise ValueError(
                f"{verb} on group {self._label()}: {count} {name}; expected one for each of its "
                f"{len(self.members)} members"
            )

    def barrier(self, opts: Any = None, *_: Any) -> Work:
        call = self.begin(What("barrier"), [], [], lambda c, g, t: moves.barrier(c), opts)
        return self.finish([call], opts, [])

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        self.barrier(_SYNC)

    # Messages

    def send(self, tensors: Any, to: int, tag: int = 0) -> Work:
        (x,) = _listed(tensors)
        what = self._message(x, self.seat, to, tag, "send")
        lane, opts = self._channel(self.seat, to, tag, 0), _blocking("send")
        call = self.begin(what, [x], [], lambda c, g, t: moves.broadcast(c, g[0], 0), opts, lane)
        return self.finish([call], opts, [])

    def recv(self, tensors: Any, source: int, tag: int = 0) -> Work:
        (x,) = _listed(tensors)
        what = self._message(x, source, self.seat, tag, "recv")
        lane, opts = self._channel(source, self.seat, tag, 1), _blocking("recv")
        call = self.begin(what, [], [x], lambda c, g, t: moves.broadcast(c, t[0], 0), opts, lane)
        call.sender = source
        return self.finish([call], opts, [x])

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Work:
        (x,) = _listed(tensors)
        what = self._message(x, None, self.seat, tag, "recv")
        lanes = {
            seat: self._channel(seat, self.seat, tag, 1)
            for seat in range(len(self.members))
            if seat != self.seat
        }
        call = self.begin(what, [], [x], lambda c, g, t: moves.broadcast(c, t[0], 0), None, lanes)
        return self.finish([call], None, [x])

    def _message(self, x: Tensor, source: int | None, to: int, tag: int, verb: str) -> What:
        # Both ends agree on elements and type; one may see them in another shape than the other.
        ranks = [self.members[seat] if seat is not None else "any rank" for seat in (source, to)]
        end = f"to rank {ranks[1]}" if verb == "send" else f"from {_rank(ranks[0])}"
        note = f", tag {tag}" if tag else ""
        shape = tuple(x.shape)
        return What("message", x.dtype, shape, x.numel(), "", f"{verb} {end}{note}")

    def _channel(self, source: int, to: int, tag: int, end: int) -> Lane:
        key = source, to, (tag << 1) + end
        found = self.channels.get(key)
        if found is None:
            name = f"{self.key}|{source} to {to}, tag {tag}"
            ends = [self.members[source], self.members[to]]
            found = self.channels[key] = Lane(self.world.board, name, ends, end, self.lane)
        return found

    def _reduction(self, name: str, x: Tensor, op: Any, opts: Any, root: int | None = None) -> Call:
        to = "" if root is None else f", root {self.members[root]}"
        kind, what = self.kind_of(name, x, op, to)
        takes = [x] if root in (None, self.seat) else []

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            return moves.all_reduce(call, g[0], t[0] if t else None, kind.fold)

        return self.begin(what, [x], takes, move, opts)

    def _sum_sparse(self, tensors: list[Tensor], op: Any) -> Work:
        """Sparse tensors, each rank with elements of its own; waited for inside of the call."""
        for x in tensors:
            if getattr(op, "op", op) != dist.ReduceOp.SUM:
                raise ValueError("of sparse tensors there is the sum only: make them dense first")
            own = x.coalesce()
            counts = [torch.zeros(1, dtype=torch.int64) for _ in self.members]
            self.allgather([counts], [torch.tensor([own._nnz()])], _SYNC)
            sizes = [int(count) for count in counts]
            places = [own.indices().new_empty(own.indices().shape[0], n) for n in sizes]
            values = [own.values().new_empty(n, *own.values().shape[1:]) for n in sizes]
            self.allgather([places], [own.indices()], _SYNC)
            self.allgather([values], [own.values()], _SYNC)
            terms = [
                torch.sparse_coo_tensor(i, v, x.shape, is_coalesced=True)
                for i, v in zip(places, values, strict=True)
            ]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            x.copy_(total)
        return Finished(tensors)

    def _broadcast(self, x: Tensor, root: int, opts: Any) -> Call:
        what = what_of("broadcast", x, f"root {self.members[root]}")
        sides = ([x], []) if root == self.seat else ([], [x])

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            return moves.broadcast(call, (g or t)[0], root)

        return self.begin(what, *sides, move, opts)

    def _gather(self, name: str, x: Tensor, outs: Any, opts: Any, root: int | None = None) -> Call:
        n = len(self.members)
        what = what_of(name, x, "" if root is None else f"root {self.members[root]}")
        takes = [outs] if isinstance(outs, Tensor) else list(outs or [])
        if len({t.numel() for t in takes}) > 1:
            what = What(name, x.dtype, verb=f"{name} of {list(x.shape)}, sizes that differ,")
            return self.begin(
                what, [x], takes,
                lambda c, g, t: moves.all_to_all(c, [g[0]] * n, t, x.dtype), opts, with_splits=True,
            )  # fmt: skip

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            into = t[0].view(n, x.numel()) if isinstance(outs, Tensor) else t or None
            return moves.all_gather(call, g[0], into)

        return self.begin(what, [x], takes, move, opts)

    def _reduce_scatter(self, out: Tensor, parts: list[Tensor], opts: Any) -> Call:
        op = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        (kind, what), n = self.kind_of("reduce_scatter", out, op), len(self.members)
        if len({x.numel() for x in parts}) > 1:
            what = What("reduce_scatter", out.dtype, detail=kind.name, verb="uneven reduce_scatter")

            def uneven(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
                terms = [torch.empty_like(t[0]) for _ in range(n)]
                yield from moves.all_to_all(call, g, terms, out.dtype)
                kind.fold(terms, t[0])

            return self.begin(what, parts, [out], uneven, opts, with_splits=True)

        def move(call: Call, g: list[Tensor], t: list[Tensor]) -> moves.Move:
            gives = torch.stack(g) if len(g) > 1 else g[0].view(n, t[0].numel())
            return moves.reduce_scatter(call, gives, t[0], kind.fold)

        return self.begin(what, parts, [out], move, opts)


class _Sync:
    asyncOp = False  # noqa: N815


_SYNC = _Sync()
_C10D = (distributed_c10d.__file__, c10d_logger.__file__)


def _blocking(verb: str) -> object:
    """c10d does not tell a group whether its caller waits: the name of its own function does."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in _C10D:
        if frame.f_code.co_name == verb:
            return _SYNC
        frame = frame.f_back
    return None


def _rank(rank: int | str) -> str:
    return f"rank {rank}" if isinstance(rank, int) else rank


def _listed(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


@lru_cache
def _verb(verb: str, shape: tuple[int, ...], splits: tuple[int, ...]) -> str:
    return f"{verb} of {list(shape)}" + (f" split into {list(splits)}" if splits else "")


def _parts(flat: Tensor, splits: Sequence[int], row: int, n: int) -> moves.Parts:
    """A flat tensor as one part per member: of equal size, or of so many rows each."""
    if not splits:
        return flat.view(n, flat.numel() // n)
    return list(flat.split([size * row for size in splits]))
