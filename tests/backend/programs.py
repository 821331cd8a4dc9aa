"""Random calls among ranks, each decoded from one integer, with the tensors they are made on.

A plan is for one launch: its groups, and programs of integers. Every integer means a call of some
group, the same one to all ranks; 0 means none. All members issue a call at the same place of the
program and wait for it there or later, so no program can lock up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8)
DTYPES = (*FLOATS, *INTEGERS, torch.complex64, torch.bool)
# Whether ranks of a group may stay in the order given: from torch 2.13 on.
UNSORTED = {"sort_ranks": False} if "sort_ranks" in signature(dist.new_group).parameters else {}
POOL = 1 << 17  # random elements of each dtype, from which all inputs are cut
FACTOR = 0.3  # of PREMUL_SUM
REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_single")
ROOTED = ("reduce", "broadcast", "gather", "scatter")
COLLECTIVES = (*REDUCING, "broadcast", "gather", "scatter", "all_gather", "all_gather_single",
               "all_to_all", "all_to_all_single")  # fmt: skip
OBJECTS = ("all_gather_object", "broadcast_object", "gather_object", "scatter_object",
           "send_object")  # fmt: skip
KINDS = (*COLLECTIVES, *COLLECTIVES, "exchange", "exchange", "exchange", "any", "any", "barrier",
         "objects")  # fmt: skip

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """`chunk` and `small`: what CHUNK and SMALL are set to on the ranks."""

    world: int
    groups: tuple[tuple[int, ...], ...]
    chunk: int
    small: int
    programs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Message:
    """Between two seats of a group."""

    source: int
    to: int
    tag: int
    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True)
class Call:
    """`splits` of all_to_all: rows from each seat to each; `shape` is then that of one row."""

    seed: int
    kind: str
    group: int
    members: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    shapes: tuple[Shape, ...] = ((),)  # one for each tensor of a coalesced call, or each seat
    op: str = "SUM"
    root: int = 0
    is_async: bool = False
    wait: str = "wait"
    form: str = ""
    splits: tuple[tuple[int, ...], ...] = ()
    messages: tuple[Message, ...] = ()

    @property
    def shape(self) -> Shape:
        return self.shapes[0]


def make_plan(seed: int, world: int, programs: tuple[tuple[int, ...], ...]) -> Plan:
    rng = random.Random(seed)  # noqa: S311
    groups = [rng.sample(range(world), rng.randint(1, world)) for _ in range(3)]
    if not UNSORTED:  # then torch sorts them itself
        groups = [sorted(group) for group in groups]
    chunk = rng.choice([1024, 4096])
    small = rng.choice([256, 1024])
    return Plan(world, (tuple(range(world)), *map(tuple, groups)), chunk, small, programs)


def ops_of(dtype: torch.dtype) -> tuple[str, ...]:
    if dtype in FLOATS:
        return "SUM", "AVG", "PREMUL_SUM", "PRODUCT", "MIN", "MAX"
    if dtype.is_complex:  # the last bit of their product depends on where a vector begins
        return "SUM", "AVG"
    rest = ("SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
    return rest if dtype is torch.bool else (*rest, "AVG")


# Which call an integer means


@lru_cache(1 << 12)
def decode(seed: int, plan: Plan) -> Call | None:
    if seed == 0:
        return None
    rng = random.Random(seed)  # noqa: S311
    group = rng.randrange(len(plan.groups))
    members, kind = plan.groups[group], rng.choice(KINDS)
    if len(members) == 1 and kind == "any":
        kind = "barrier"
    call = {
        "seed": seed,
        "kind": kind,
        "group": group,
        "members": members,
        "root": rng.randrange(len(members)),
        "is_async": rng.random() < 0.5,
        "wait": rng.choice(["wait", "wait", "wait", "poll", "future"]),
    }
    return Call(**call, **_details(rng, plan, kind, len(members)))


def _details(rng: random.Random, plan: Plan, kind: str, n: int) -> dict[str, object]:
    dtype = rng.choice(DTYPES)
    if kind == "barrier":
        return {}
    if kind == "objects":
        return {"form": rng.choice(OBJECTS if n > 1 else OBJECTS[:-1])}
    if kind == "exchange":
        return _exchange(rng, plan, n)
    if kind == "any":
        return {**_any(rng, plan, n, dtype), "dtype": dtype}
    found: dict[str, object] = {"dtype": dtype}
    if kind in REDUCING:
        found["op"] = rng.choice(ops_of(dtype))
    if kind.startswith("all_to_all"):
        return {**found, **_splits(rng, plan, kind, n, dtype)}
    found["form"] = form = rng.choice(
        {
            "all_reduce": ["", "", "coalesced", "manager"],
            "all_gather": ["", "", "uneven", "coalesced"],
            "all_gather_single": ["cat", "stack", "old name", "in place", "manager"],
            "reduce_scatter_single": ["cat", "stack", "old name", "in place", "manager"],
            "broadcast": ["", "", "", "bundle"],
        }.get(kind, [""])
    )
    many = {"uneven": n, "coalesced": 3, "manager": 3, "bundle": 3}.get(form, 1)
    found["shapes"] = tuple(_shape(rng, plan, dtype, n) for _ in range(many))
    if form == "uneven":
        found["shapes"] = tuple((torch.Size(s).numel(),) for s in found["shapes"])
    return found


def _elements(rng: random.Random, plan: Plan, dtype: torch.dtype, n: int) -> int:
    """Often few; else around the sizes at which a call takes another way."""
    luck = rng.random()
    if luck < 0.1:
        return 0
    if luck < 0.6:
        return rng.randint(1, 20)
    edge = rng.choice([plan.small, plan.chunk, plan.chunk // n // 64 * 64])
    return rng.choice([1, 1, 1, 2]) * edge // dtype.itemsize + rng.choice([-1, 0, 1, 7])


def _shape(rng: random.Random, plan: Plan, dtype: torch.dtype, n: int) -> Shape:
    count = _elements(rng, plan, dtype, n)
    if count == 0:
        return rng.choice([(0,), (0, 3), (3, 0)])
    if count == 1:
        return rng.choice([(), (), (1,), (1, 1)])
    rows = next((d for d in (rng.randint(2, 5), 2, 3) if count % d == 0), 1)
    return rng.choice([(count,), (rows, count // rows), (count // rows, 1, rows)])


def _splits(
    rng: random.Random, plan: Plan, kind: str, n: int, dtype: torch.dtype
) -> dict[str, object]:
    if kind == "all_to_all_single" and rng.random() < 0.4:
        rows = rng.choice([0, 1, 3, _elements(rng, plan, dtype, n)])
        return {"form": "even", "splits": ((rows,) * n,) * n, "shapes": (rng.choice([(), (2,)]),)}
    splits = tuple(
        tuple(rng.choice([0, 1, 2, _elements(rng, plan, dtype, n)]) for _ in range(n))
        for _ in range(n)
    )
    return {"splits": splits, "shapes": (rng.choice([(), (2,), (1, 3)]),)}


def _exchange(rng: random.Random, plan: Plan, n: int) -> dict[str, object]:
    form = rng.choice(["isend", "isend", "batch", "blocking"]) if n > 1 else "isend"
    messages = []
    for _ in range(1 if form == "blocking" else rng.randint(1, 6)):
        source = rng.randrange(n)
        others = [s for s in range(n) if s != source or form != "blocking"]
        dtype = rng.choice(DTYPES)
        shape, tag = _shape(rng, plan, dtype, n), rng.choice([0, 0, 1, 2])
        messages.append(Message(source, rng.choice(others), tag, dtype, shape))
    return {"form": form, "messages": tuple(messages)}


def _any(rng: random.Random, plan: Plan, n: int, dtype: torch.dtype) -> dict[str, object]:
    """Messages to one seat, who takes them as they come; the tag is the step's own."""
    to, shape = rng.randrange(n), _shape(rng, plan, dtype, n)
    senders = [s for s in range(n) if s != to]
    messages = [
        Message(rng.choice(senders), to, -1, dtype, shape) for _ in range(rng.randint(1, 4))
    ]
    return {"messages": tuple(messages), "form": rng.choice(["irecv", "recv"])}


# Its tensors


@dataclass
class Placed:
    """A tensor and the memory in which it lies, of which a call may touch nothing else."""

    base: Tensor
    view: Tensor


@lru_cache(None)
def _pool(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(str(dtype)))
    if dtype is torch.bool:
        return torch.rand(POOL, generator=generator) < 0.7
    if not dtype.is_floating_point and not dtype.is_complex:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, (POOL,), dtype=dtype, generator=generator)
    x = torch.randn(POOL, dtype=torch.complex64 if dtype.is_complex else dtype, generator=generator)
    x *= 10.0 ** torch.randint(-2, 3, (POOL,), generator=generator)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 0.0])
    if dtype.is_floating_point:
        x[7::191] = special.repeat(POOL)[: len(x[7::191])].to(dtype)
    return x


def place(shape: Shape, dtype: torch.dtype, luck: int) -> Placed:
    """Room for a tensor, laid out in one of several ways."""
    count, way = torch.Size(shape).numel(), luck % 7
    if way == 0:
        base = torch.ones(count + 8, dtype=dtype)
        return Placed(base, base[3 : 3 + count].view(shape))
    if way == 1:
        base = torch.ones((*shape, 2), dtype=dtype)
        return Placed(base, base[..., 1])
    if way == 2:
        base = torch.ones(shape[::-1], dtype=dtype)
        return Placed(base, base.permute(tuple(range(len(shape)))[::-1]))
    base = torch.ones(shape, dtype=dtype)
    return Placed(base, base)


def given(call: Call, seat: int, slot: int, shape: Shape, dtype: torch.dtype) -> Placed:
    """What a seat gives, as its tensor number `slot`."""
    luck = (call.seed * 31 + seat * 7919 + slot * 104729) % (1 << 31)
    x = place(shape, dtype, luck)
    count = x.view.numel()
    begin = luck % (POOL - count) if count < POOL else 0
    x.view.copy_(_pool(dtype)[begin : begin + count].view(shape))
    return x


Sides = tuple[list[Placed], list[Placed]]


def tensors(call: Call, seat: int) -> Sides:
    """What a seat gives, and what will be written; where it is the same tensor, in both."""
    if call.messages:
        reads = [
            given(call, seat, i, m.shape, m.dtype)
            for i, m in enumerate(call.messages)
            if m.source == seat
        ]
        return reads, [
            place(m.shape, m.dtype, call.seed + 3 * i)
            for i, m in enumerate(call.messages)
            if m.to == seat
        ]
    if call.kind in ("barrier", "objects"):
        return [], []
    return _SIDES[call.kind](call, seat)


def _gives(call: Call, seat: int, *shapes: Shape) -> list[Placed]:
    return [given(call, seat, i, shape, call.dtype) for i, shape in enumerate(shapes)]


def _room(call: Call, seat: int, *shapes: Shape) -> list[Placed]:
    return [place(s, call.dtype, call.seed + 5 * seat + 3 * i) for i, s in enumerate(shapes)]


def _joined(call: Call, shape: Shape) -> Shape:
    n = len(call.members)
    return (n * shape[0], *shape[1:]) if shape and call.form != "stack" else (n, *shape)


def _all_reduce(call: Call, seat: int) -> Sides:
    x = _gives(call, seat, *call.shapes)
    return x, x


def _reduce(call: Call, seat: int) -> Sides:
    x = _gives(call, seat, call.shape)
    return x, x if seat == call.root else []


def _broadcast(call: Call, seat: int) -> Sides:
    x = _gives(call, seat, *call.shapes)
    return x, [] if seat == call.root else x


def _all_gather(call: Call, seat: int) -> Sides:
    n = len(call.members)
    if call.form == "uneven":
        return _gives(call, seat, call.shapes[seat]), _room(call, seat, *call.shapes)
    outs = [shape for shape in call.shapes for _ in range(n)]
    return _gives(call, seat, *call.shapes), _room(call, seat, *outs)


def _all_gather_single(call: Call, seat: int) -> Sides:
    whole = [_joined(call, s) for s in call.shapes]
    if call.form == "in place":
        base = torch.ones(whole[0], dtype=call.dtype)
        part = base.view(len(call.members), *call.shape)[seat]
        part.copy_(given(call, seat, 0, call.shape, call.dtype).view)
        return [Placed(base, part)], [Placed(base, base)]
    return _gives(call, seat, *call.shapes), _room(call, seat, *whole)


def _gather(call: Call, seat: int) -> Sides:
    outs = [call.shape] * len(call.members) if seat == call.root else []
    return _gives(call, seat, call.shape), _room(call, seat, *outs)


def _scatter(call: Call, seat: int) -> Sides:
    gives = [call.shape] * len(call.members) if seat == call.root else []
    return _gives(call, seat, *gives), _room(call, seat, call.shape)


def _reduce_scatter(call: Call, seat: int) -> Sides:
    return _gives(call, seat, *[call.shape] * len(call.members)), _room(call, seat, call.shape)


def _reduce_scatter_single(call: Call, seat: int) -> Sides:
    whole = _gives(call, seat, *(_joined(call, s) for s in call.shapes))
    if call.form == "in place":
        base = whole[0].view.clone(memory_format=torch.contiguous_format)
        part = base.view(len(call.members), *call.shape)[seat]
        return [Placed(base, base)], [Placed(base, part)]
    return whole, _room(call, seat, *call.shapes)


def _all_to_all(call: Call, seat: int) -> Sides:
    gives, takes = call.splits[seat], [row[seat] for row in call.splits]
    return (
        _gives(call, seat, *((rows, *call.shape) for rows in gives)),
        _room(call, seat, *((rows, *call.shape) for rows in takes)),
    )


def _all_to_all_single(call: Call, seat: int) -> Sides:
    gives, takes = sum(call.splits[seat]), sum(row[seat] for row in call.splits)
    return _gives(call, seat, (gives, *call.shape)), _room(call, seat, (takes, *call.shape))


_SIDES: dict[str, Callable[[Call, int], Sides]] = {
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
