"""Who touches a tensor that a call has? Seen at the touch, by a look at every operation.

Without it an early read gives NaN and an early write is found at the wait. With it both are an
error where they happen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parity.backend.call import site
from parity.errors import Race

_OURS = ("c10d", "_c10d_functional")  # what waits for a tensor may touch it
_LOOKS_AT_NO_DATA = ("empty_like", "new_empty", "zeros_like", "ones_like", "full_like")


class Watch(TorchDispatchMode):
    """A context for the whole program of a rank."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flights: dict[int, tuple[Sequence[Tensor], Sequence[Tensor], str]] = {}

    def begin(
        self, call: int, reads: Sequence[Tensor], writes: Sequence[Tensor], text: str
    ) -> None:
        self._flights[call] = reads, writes, text

    def end(self, call: int) -> None:
        self._flights.pop(call, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._flights and func.namespace not in _OURS:
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, func: Any, args: Any, kwargs: Any) -> None:
        arguments = func._schema.arguments
        named = [*zip(arguments, args, strict=False)]
        named += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        for argument, value in named:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            reads = not writes and not is_view and func._opname not in _LOOKS_AT_NO_DATA
            for x in tree_leaves(value):
                if isinstance(x, Tensor):
                    self._check(func, x, writes=writes, reads=reads)

    def _check(self, func: Any, x: Tensor, *, writes: bool, reads: bool) -> None:
        for inputs, outputs, text in self._flights.values():
            for role, held, bad in (
                ("output", outputs, reads or writes),
                ("input", inputs, writes),
            ):
                if bad and any(_overlap(x, y) for y in held):
                    raise Race(
                        f"{text}:\n  its {role} {list(x.shape)} was "
                        f"{'written to' if writes else 'read'} ({func}) at {site()}, before the "
                        "wait; until then it belongs to the call"
                    )


def _overlap(x: Tensor, y: Tensor) -> bool:
    if x.device.type == "meta" or x.layout is not torch.strided:
        return False
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() or not x.numel():
        return False
    (a, b), (c, d) = (_span(t) for t in (x, y))
    return a < d and c < b


def _span(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize
