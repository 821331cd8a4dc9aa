"""Calls changed on purpose: the one place where a result can be altered between ranks.

Nothing is patched. A changed call is an ordinary one, whose result takes another way to the caller;
and what the caller gets is compared with what it would have got, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parity.backend.call import Call
from parity.backend.fold import Reduction
from parity.backend.settings import Rule


class Tally(NamedTuple):
    """What rules did on a rank: how many calls they covered, how many results (or parts of them)
    had other bits for it, and the largest change, relative to the result.
    """

    calls: int = 0
    changed: int = 0
    largest: float = 0.0


class Swap(NamedTuple):
    """A call that gets the message of another one: where it is, and where its own one is."""

    call: Call
    takes: list[Tensor]
    own: list[Tensor]


class Mutation:
    """The rules of this rank, what they need to remember, and what they have done."""

    def __init__(self, rules: Sequence[Rule], rank: int) -> None:
        self._rules, self._rank = rules, rank
        self.by_site = any(rule.site for rule in rules)
        self.tally = Tally()
        self._stale: dict[str, list[Tensor]] = {}
        self._swaps: dict[int, Swap | None] = {}  # by lane: the call that is still to come

    def rule_for(self, text: str, name: str, number: int) -> Rule | None:
        return next((r for r in self._rules if r.covers(text, name, number, self._rank)), None)

    def count(self) -> None:
        self.tally = self.tally._replace(calls=self.tally.calls + 1)

    def note(self, got: Tensor, true: Tensor) -> None:
        """Look whether the caller gets other bits than without a rule."""
        if not _same_bits(got, true):
            calls, changed, largest = self.tally
            self.tally = Tally(calls, changed + 1, max(largest, _distance(got, true)))

    def instead(self, kind: Reduction, other: Reduction) -> Reduction:
        """`other`, compared with what `kind` would have given."""

        def fold(terms: Sequence[Tensor], out: Tensor) -> None:
            true = torch.empty_like(out)
            kind.fold(terms, true)
            other.fold(terms, out)
            self.note(out, true)

        return other._replace(fold=fold)

    def results(
        self, rule: Rule, text: str, true: list[Tensor], elsewhere: Callable[[], list[Tensor]]
    ) -> list[Tensor] | None:
        """What is to be handed over instead; None leaves the caller's tensors as they were."""
        if rule.change == "drop":
            return None
        if rule.change == "scale":
            return [result * float(rule.value) for result in true]
        if rule.change == "noise":
            generator = torch.Generator().manual_seed(hash((int(rule.value), self.tally.calls)))
            return [x + x * _drawn(x, generator) for x in true]
        if rule.change == "stale":
            before = self._stale.get(text)
            self._stale[text] = [result.clone() for result in true]
            return before
        return elsewhere() if rule.change in ("group", "peer") else true

    def swap(
        self, call: Call, takes: list[Tensor], start: Callable[[Call, list[Tensor]], None]
    ) -> Swap:
        """The first two calls of a lane ask together: the first gets the second's message."""
        at = call.lane.at
        if at not in self._swaps:
            start(call, takes)
            twin = Call(call.lane, call.what, call.marks, call.site)
            rooms = [torch.empty_like(x) for x in takes]
            self._swaps[at] = Swap(call, takes, rooms)
            return Swap(twin, rooms, takes)
        second, self._swaps[at] = self._swaps[at], None
        return second or Swap(call, takes, takes)


def _drawn(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator).to(x)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def _distance(got: Tensor, true: Tensor) -> float:
    wide = torch.complex128 if true.is_complex() else torch.float64
    size = true.to(wide).norm().item()
    far = (got.reshape(true.shape).to(wide) - true.to(wide)).norm().item()
    return far / size if size and far == far else float("inf")
