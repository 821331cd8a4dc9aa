"""The ranks' side of a random program: make its calls, wait for them in any order, say what came.

Runs on every rank of a launch, by `parity.launch`.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parity.backend import lane, moves
from tests.backend.model import Result, an_object, fingerprint, fingerprints
from tests.backend.programs import FACTOR, UNSORTED, Call, Message, Placed, Plan, decode, tensors

CPU = torch.device("cpu")
# Before torch 2.13 they have the old names only.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
ANY_TAG = 1000  # of messages from any source: one tag for each step of a launch


@dataclass
class Under:
    """A call under way: `works` are to be waited for, then `bring` tells what came."""

    place: int  # in the program
    call: Call
    works: list[Any]
    bring: Callable[[], Result]

    def wait(self) -> Result:
        for work in self.works:
            if self.call.wait == "poll" and isinstance(work, dist.Work):
                while not work.is_completed():
                    pass
            elif self.call.wait == "future" and isinstance(work, dist.Work):
                work.get_future().wait()
            elif work is not None:
                work.wait()
        return self.bring()


@dataclass
class At:
    """Where this rank makes a call."""

    group: dist.ProcessGroup
    seat: int
    step: int  # of all in the launch

    def peer(self, call: Call, side: str, seat: int) -> dict[str, int]:
        """A seat of the group, as c10d's functions take it: by global rank or by group rank."""
        if call.seed % 2:
            return {side: call.members[seat]}
        return {f"group_{side}": seat}


def play(plan: Plan) -> list[dict[int, Result]]:
    """Of each program, what each call of this rank brought."""
    warnings.simplefilter("ignore", FutureWarning)
    lane.CHUNK = moves.CHUNK = plan.chunk
    moves.SMALL = plan.small
    groups = [dist.new_group(list(g), **UNSORTED) for g in plan.groups]
    found = []
    for number, program in enumerate(plan.programs):
        found.append(_run(plan, program, groups, number * 1000))
    for members, group in zip(plan.groups, groups, strict=True):
        if dist.get_rank() in members:
            dist.destroy_process_group(group)
    return found


def _run(
    plan: Plan, program: tuple[int, ...], groups: list[dist.ProcessGroup], first: int
) -> dict[int, Result]:
    rank, found = dist.get_rank(), {}
    waiting: list[tuple[int, Under]] = []
    for place, seed in enumerate(program):
        call = decode(seed, plan)
        if call is None or rank not in call.members:
            continue
        at = At(groups[call.group], call.members.index(rank), first + place)
        rng = random.Random(seed + rank)  # noqa: S311
        works, bring = issue(call, at, rng)
        due = place + rng.choice([0, 0, 1, 2, 5, 100])
        waiting.append((due, Under(place, call, works, bring)))
        now = [w for due, w in waiting if due <= place]
        waiting = [(due, w) for due, w in waiting if due > place]
        found |= {w.place: w.wait() for w in rng.sample(now, len(now))}
    rest = random.Random(rank).sample(waiting, len(waiting))  # noqa: S311
    return found | {w.place: w.wait() for _, w in rest}


Begun = tuple[list[Any], Callable[[], Result]]


def issue(call: Call, at: At, rng: random.Random) -> Begun:
    if call.kind == "objects":
        came = _OBJECTS[call.form](call, at)
        return [], lambda: came
    reads, writes = tensors(call, at.seat)
    if call.kind == "any":
        return _any(call, at, reads, writes)
    if call.kind == "exchange":
        works = _exchange(call, at, reads, writes, rng)
    elif call.kind == "barrier":
        works = [dist.barrier(group=at.group, async_op=call.is_async)]
    else:
        works = _SAY[call.kind](call, at, [p.view for p in reads], [p.view for p in writes])
    return works, lambda: fingerprints([*reads, *writes])


# Collectives

Tensors = list[Tensor]


def reduce_op(call: Call) -> Any:
    if call.op == "PREMUL_SUM":
        return dist._make_nccl_premul_sum(FACTOR)
    return getattr(dist.ReduceOp, call.op)


def _managed(call: Call, at: At, say: Callable[[int], Any], device: Any = None) -> list[Any]:
    with dist._coalescing_manager(at.group, device, async_ops=call.is_async) as manager:
        for i in range(len(call.shapes)):
            say(i)
    return [manager] if call.is_async else []


def _all_reduce(call: Call, at: At, x: Tensors, _: Tensors) -> list[Any]:
    op, opts = reduce_op(call), {"group": at.group, "async_op": call.is_async}
    if call.form == "manager":
        return _managed(call, at, lambda i: dist.all_reduce(x[i], op, at.group))
    if call.form == "coalesced":
        return [dist.all_reduce_coalesced(x, op, **opts)]
    return [dist.all_reduce(x[0], op, **opts)]


def _reduce(call: Call, at: At, x: Tensors, _: Tensors) -> list[Any]:
    root = at.peer(call, "dst", call.root)
    opts = {"group": at.group, "async_op": call.is_async}
    return [dist.reduce(x[0], op=reduce_op(call), **root, **opts)]


def _broadcast(call: Call, at: At, x: Tensors, _: Tensors) -> list[Any]:
    root = at.peer(call, "src", call.root)
    if call.form == "bundle":
        return _managed(call, at, lambda i: dist.broadcast(x[i], **root, group=at.group), CPU)
    return [dist.broadcast(x[0], **root, group=at.group, async_op=call.is_async)]


def _all_gather(call: Call, at: At, x: Tensors, y: Tensors) -> list[Any]:
    n, opts = len(call.members), {"group": at.group, "async_op": call.is_async}
    if call.form == "coalesced":
        lists = [[y[i * n + seat] for i in range(len(x))] for seat in range(n)]
        return [dist.all_gather_coalesced(lists, x, **opts)]
    return [dist.all_gather(y, x[0], **opts)]


def _all_gather_single(call: Call, at: At, x: Tensors, y: Tensors) -> list[Any]:
    if call.form == "manager":
        return _managed(call, at, lambda i: all_gather_single(y[i], x[i], at.group))
    say = dist.all_gather_into_tensor if call.form == "old name" else all_gather_single
    return [say(y[0], x[0], group=at.group, async_op=call.is_async)]


def _gather(call: Call, at: At, x: Tensors, y: Tensors) -> list[Any]:
    root = at.peer(call, "dst", call.root)
    return [dist.gather(x[0], y or None, **root, group=at.group, async_op=call.is_async)]


def _scatter(call: Call, at: At, x: Tensors, y: Tensors) -> list[Any]:
    root = at.peer(call, "src", call.root)
    return [dist.scatter(y[0], x or None, **root, group=at.group, async_op=call.is_async)]


def _reduce_scatter(call: Call, at: At, x: Tensors, y: Tensors) -> list[Any]:
    return [dist.reduce_scatter(y[0], x, reduce_op(call), at.group, call.is_async)]


def _reduce_scatter_single(call: Call, at: At, x: Tensors, y: Tensors) -> list[Any]:
    op, say = reduce_op(call), reduce_scatter_single
    if call.form == "manager":
        return _managed(call, at, lambda i: say(y[i], x[i], op, at.group))
    say = dist.reduce_scatter_tensor if call.form == "old name" else say
    return [say(y[0], x[0], op, at.group, call.is_async)]


def _all_to_all(call: Call, at: At, x: Tensors, y: Tensors) -> list[Any]:
    return [dist.all_to_all(y, x, at.group, call.is_async)]


def _all_to_all_single(call: Call, at: At, x: Tensors, y: Tensors) -> list[Any]:
    splits: list[Any] = [None, None]
    if call.form != "even":
        splits = [[row[at.seat] for row in call.splits], list(call.splits[at.seat])]
    return [dist.all_to_all_single(y[0], x[0], *splits, at.group, call.is_async)]


_SAY: dict[str, Callable[[Call, At, Tensors, Tensors], list[Any]]] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_gather_single": _all_gather_single,
    "gather": _gather,
    "scatter": _scatter,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter_single,
    "all_to_all": _all_to_all,
    "all_to_all_single": _all_to_all_single,
}

# Messages


def _exchange(
    call: Call, at: At, reads: list[Placed], writes: list[Placed], rng: random.Random
) -> list[Any]:
    gives, takes = iter(reads), iter(writes)
    mine: list[tuple[str, Message, Tensor]] = []
    for m in call.messages:
        mine += [("isend", m, next(gives).view)] if m.source == at.seat else []
        mine += [("irecv", m, next(takes).view)] if m.to == at.seat else []
    mine = _shuffled(mine, rng)
    if call.form == "batch":
        ops = [
            dist.P2POp(
                getattr(dist, verb), x, group=at.group, tag=m.tag,
                group_peer=m.to if verb == "isend" else m.source,
            )
            for verb, m, x in mine
        ]  # fmt: skip
        return dist.batch_isend_irecv(ops) if ops else []
    return [_say(call, at, verb, m, x) for verb, m, x in mine]


def _say(call: Call, at: At, verb: str, m: Message, x: Tensor) -> Any:
    side, seat = ("dst", m.to) if verb == "isend" else ("src", m.source)
    if call.form == "blocking" and (call.seed >> at.seat) % 2:
        verb = verb.removeprefix("i")
    work = getattr(dist, verb)(x, group=at.group, tag=m.tag, **at.peer(call, side, seat))
    if verb == "recv":
        assert work == call.members[m.source]
    return work if isinstance(work, dist.Work) else None


def _shuffled(
    mine: list[tuple[str, Message, Tensor]], rng: random.Random
) -> list[tuple[str, Message, Tensor]]:
    """Any order, but for those with the same ends and tag: they are told apart by it alone."""
    queues = defaultdict(list)
    for verb, m, x in mine:
        queues[verb, m.source, m.to, m.tag].append((verb, m, x))
    order = [key for key, queue in queues.items() for _ in queue]
    rng.shuffle(order)
    return [queues[key].pop(0) for key in order]


def _any(call: Call, at: At, reads: list[Placed], writes: list[Placed]) -> Begun:
    tag, to = ANY_TAG + at.step, at.peer(call, "dst", call.messages[0].to)
    if at.seat != call.messages[0].to:
        sent = [dist.isend(p.view, group=at.group, tag=tag, **to) for p in reads]
        return sent, list
    if call.form == "recv":
        sources = [dist.recv(p.view, group=at.group, tag=tag) for p in writes]
        return [], lambda: _by_source(sources, writes)
    works = [dist.irecv(p.view, group=at.group, tag=tag) for p in writes]

    def bring() -> Result:
        return _by_source([call.members[w._source_rank()] for w in works], writes)

    return works, bring


def _by_source(sources: list[int], came: list[Placed]) -> Result:
    pairs = [(source, fingerprint(p.view)) for source, p in zip(sources, came, strict=True)]
    return sorted(pairs, key=lambda pair: pair[0])


# Objects


def _all_gather_object(call: Call, at: At) -> Result:
    found: Result = [None] * len(call.members)
    dist.all_gather_object(found, an_object(call, at.seat), at.group)
    return found


def _gather_object(call: Call, at: At) -> Result:
    is_root = at.seat == call.root
    found: Result = [None] * len(call.members) if is_root else []
    peer = at.peer(call, "dst", call.root)
    dist.gather_object(an_object(call, at.seat), found or None, **peer, group=at.group)
    return found


def _broadcast_object(call: Call, at: At) -> Result:
    is_root = at.seat == call.root
    found = [an_object(call, call.root, i) if is_root else None for i in range(2)]
    dist.broadcast_object_list(found, **at.peer(call, "src", call.root), group=at.group)
    return found


def _scatter_object(call: Call, at: At) -> Result:
    is_root, found = at.seat == call.root, [None]
    given = [an_object(call, at.seat, i) for i in range(len(call.members))] if is_root else None
    peer = at.peer(call, "src", call.root)
    dist.scatter_object_list(found, given, **peer, group=at.group)
    return list(found)


def _send_object(call: Call, at: At) -> Result:
    last = (call.root + 1) % len(call.members)
    if at.seat == call.root:
        objects = [an_object(call, at.seat, i) for i in range(2)]
        dist.send_object_list(objects, **at.peer(call, "dst", last), group=at.group)
    if at.seat != last:
        return []
    found: Result = [None, None]
    dist.recv_object_list(found, **at.peer(call, "src", call.root), group=at.group)
    return found


_OBJECTS: dict[str, Callable[[Call, At], Result]] = {
    "all_gather_object": _all_gather_object,
    "gather_object": _gather_object,
    "broadcast_object": _broadcast_object,
    "scatter_object": _scatter_object,
    "send_object": _send_object,
}
