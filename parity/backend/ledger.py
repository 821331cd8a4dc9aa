"""Who has said how much to whom, when, and from where: the calls of one rank, the latest ones.

The phase is that of the training step: `backward` while autograd runs, else what the functions that
led here are called (a `forward`, a `backward`, a `step`), else `step` after a backward, and
`forward` before one.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

PHASES = ("forward", "backward", "step")
_MODULE_CALL = nn.Module._call_impl.__code__


@dataclass
class Entry:
    """One call: `bytes` are what this rank gave, or of a recv what it got; `waited` in seconds.
    `detail` is the reduction, the root, or the other end of a message, `result` the bytes that this
    rank got, `through` the function of torch.distributed that the user's code had called, and
    `trail` all places of that code, the innermost first.
    """

    op: str
    group: str
    bytes: int
    dtype: str
    phase: str
    module: str
    site: str
    detail: str = ""
    members: tuple[int, ...] = ()
    result: int = 0
    through: str = ""
    trail: str = ""
    waited: float = 0.0

    @property
    def name(self) -> str:
        return name_of(self.op, self.group, self.trail)


def name_of(op: str, group: str, trail: str) -> str:
    """The name of a call site, the same for all calls of it, and on every rank."""
    return f"{op} on {group} at {trail}"


class Ledger:
    def __init__(self, size: int) -> None:
        self.entries: deque[Entry] = deque(maxlen=size)
        self.lost = 0  # entries that had to go because the ledger was full
        self._last = "forward"
        self._names: WeakKeyDictionary[nn.Module, dict[int, str]] = WeakKeyDictionary()
        register_optimizer_step_post_hook(self._after_step)

    def add(self, entry: Entry) -> None:
        self.lost += len(self.entries) == self.entries.maxlen
        self.entries.append(entry)

    def place(self) -> tuple[str, str]:
        """The phase, and the path of the innermost module whose forward is under way."""
        modules: list[nn.Module] = []
        said = ""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code is _MODULE_CALL:
                modules.append(frame.f_locals["self"])
            said = said or next((p for p in PHASES if p in code.co_name), "")
            frame = frame.f_back
        if torch._C._current_graph_task_id() != -1:
            said = "backward"
        phase = said or ("step" if self._last == "backward" else "forward")
        if phase != "step":
            self._last = phase
        return phase, self._path(modules)

    def _after_step(self, *_: object) -> None:
        self._last = "forward"

    def _path(self, modules: Sequence[nn.Module]) -> str:
        if not modules:
            return ""
        inner, root = modules[0], modules[-1]
        names = self._names.get(root)
        if names is None:
            names = self._names[root] = {id(m): name for name, m in root.named_modules()}
        return names.get(id(inner), type(inner).__name__)


def by_axis(entries: Sequence[Entry]) -> dict[tuple[str, str, str], tuple[int, int, float]]:
    """(group, op, phase) to (calls, bytes, seconds of waiting)."""
    sums: dict[tuple[str, str, str], tuple[int, int, float]] = {}
    for e in entries:
        key = e.group, e.op, e.phase
        calls, size, waited = sums.get(key, (0, 0, 0.0))
        sums[key] = calls + 1, size + e.bytes, waited + e.waited
    return sums
