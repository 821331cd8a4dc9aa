"""What one process says a call brings to every member: plain torch on the inputs of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.backend.programs import FACTOR, Call, Placed, tensors

Result = list[object]  # of one call at one member: bytes of its tensors, or objects


def fingerprint(x: Tensor) -> bytes:
    """The bits; all NaNs count as one."""
    if x.dtype.is_complex:
        x = torch.view_as_real(x)
    if x.dtype.is_floating_point:
        x = x.masked_fill(x.isnan(), float("nan"))
    flat = x.clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def fingerprints(placed: Sequence[Placed]) -> Result:
    """Of the memory that tensors lie in: what is around them must stay as it is."""
    bases = {id(p.base): p.base for p in placed}
    return [fingerprint(base) for base in bases.values()]


def an_object(call: Call, seat: int, slot: int = 0) -> object:
    return {"who": (seat, slot), "what": "x" * (call.seed % 997 * (seat + 1)), "n": call.seed}


def fold(op: str, terms: Sequence[Tensor]) -> Tensor:
    """In rank order: ((x0 + x1) + x2) + ..."""
    dtype = terms[0].dtype
    if dtype is torch.bool:
        op = {"SUM": "BOR", "PRODUCT": "BAND", "MIN": "BAND", "MAX": "BOR"}.get(op, op)
    wide = torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
    xs = [x.to(wide) for x in terms]
    if op == "PREMUL_SUM":
        xs = [x * FACTOR for x in xs]
    total = xs[0].clone()
    for x in xs[1:]:
        total = _STEPS[op](total, x)
    if op == "AVG":
        is_whole = not (dtype.is_floating_point or dtype.is_complex)
        total = torch.div(total, len(xs), rounding_mode="trunc" if is_whole else None)
    return total.to(dtype)


_STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "AVG": torch.add,
    "PREMUL_SUM": torch.add,
    "PRODUCT": torch.mul,
    "MIN": lambda a, b: torch.where(a.isnan() | (a < b), a, b),
    "MAX": lambda a, b: torch.where(a.isnan() | (a > b), a, b),
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}

Inputs = list[list[Tensor]]  # of each seat, what it gives


def reduced(call: Call, inputs: Inputs, slot: int) -> Tensor:
    terms = [x[slot] for x in inputs]
    if terms[0].dtype.is_complex and call.kind == "all_reduce":  # torch passes these as reals
        return torch.view_as_complex(fold(call.op, [torch.view_as_real(x) for x in terms]))
    return fold(call.op, terms)


def _joined(call: Call, inputs: Inputs, slot: int) -> Tensor:
    parts = [x[slot] for x in inputs]
    return torch.cat(parts) if parts[0].dim() and call.form != "stack" else torch.stack(parts)


def _slices(call: Call, inputs: Inputs, seat: int) -> list[Tensor]:
    """Reduce scatter of whole tensors: of each, this seat's part."""
    n = len(inputs)
    wholes = [reduced(call, inputs, i) for i in range(len(call.shapes))]
    return [x.reshape(n, *s)[seat] for x, s in zip(wholes, call.shapes, strict=True)]


def _exchanged(call: Call, inputs: Inputs, seat: int) -> list[Tensor]:
    """To all_to_all_single: the rows that each seat gives to this one, joined."""
    sizes = [list(row) for row in call.splits]
    parts = [inputs[i][0].split(sizes[i])[seat] for i in range(len(inputs))]
    return [torch.cat(parts)]


def written(call: Call, inputs: Inputs, seat: int) -> list[Tensor]:
    """The values of the tensors that are written at a seat."""
    many, is_root = range(len(call.shapes)), seat == call.root
    bring: dict[str, Callable[[], list[Tensor]]] = {
        "all_reduce": lambda: [reduced(call, inputs, i) for i in many],
        "reduce": lambda: [reduced(call, inputs, 0)] if is_root else [],
        "broadcast": lambda: [] if is_root else inputs[call.root],
        "gather": lambda: [x[0] for x in inputs] if is_root else [],
        "scatter": lambda: [inputs[call.root][seat]],
        "all_gather": lambda: [x[i] for i in range(len(inputs[0])) for x in inputs],
        "all_gather_single": lambda: [_joined(call, inputs, i) for i in range(len(inputs[0]))],
        "reduce_scatter": lambda: [reduced(call, inputs, seat)],
        "reduce_scatter_single": lambda: _slices(call, inputs, seat),
        "all_to_all": lambda: [x[seat] for x in inputs],
        "all_to_all_single": lambda: _exchanged(call, inputs, seat),
        "exchange": lambda: _messages(call, inputs, seat),
        "barrier": list,
    }
    return bring[call.kind]()


def _messages(call: Call, inputs: Inputs, seat: int) -> list[Tensor]:
    """What comes to a seat, in the order of the messages."""
    queues = [iter(x) for x in inputs]
    sent = [(m, next(queues[m.source])) for m in call.messages]
    return [x for m, x in sent if m.to == seat]


def expected(call: Call) -> list[Result]:
    """Of each member."""
    n = len(call.members)
    if call.kind == "objects":
        return [_objects(call, seat) for seat in range(n)]
    sides = [tensors(call, seat) for seat in range(n)]
    inputs = [[p.view.clone() for p in reads] for reads, _ in sides]
    if call.kind == "any":
        return [_from_any(call, inputs, seat) for seat in range(n)]
    results = []
    for seat, (reads, writes) in enumerate(sides):
        for place, value in zip(writes, written(call, inputs, seat), strict=True):
            place.view.copy_(value)
        results.append(fingerprints([*reads, *writes]))
    return results


def _from_any(call: Call, inputs: Inputs, seat: int) -> Result:
    """Pairs of a sender and what it sent, by sender; of one sender in the order of sending."""
    if seat != call.messages[0].to:
        return []
    sources = sorted({m.source for m in call.messages}, key=lambda s: call.members[s])
    return [(call.members[s], fingerprint(x)) for s in sources for x in inputs[s]]


def _objects(call: Call, seat: int) -> Result:
    n, root, last = len(call.members), call.root, (call.root + 1) % len(call.members)
    everyone = [an_object(call, s) for s in range(n)]
    return {
        "all_gather_object": everyone,
        "gather_object": everyone if seat == root else [],
        "broadcast_object": [an_object(call, root, i) for i in range(2)],
        "scatter_object": [an_object(call, root, seat)],
        "send_object": [an_object(call, root, i) for i in range(2)] if seat == last else [],
    }[call.form]
