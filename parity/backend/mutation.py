"""Calls changed on purpose: the one place where a result can be altered between ranks.

Nothing is patched. A changed call is an ordinary one, whose result takes another way to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from parity.backend.settings import Rule

Pairs = Sequence[tuple[Tensor, Tensor]]  # (the caller's tensor, the result for it, flat)


class Mutation:
    """The rules of this rank, and what they need to remember."""

    def __init__(self, rules: Sequence[Rule], rank: int) -> None:
        self._rules, self._rank = rules, rank
        self._stale: dict[str, list[Tensor]] = {}

    def rule_for(self, text: str, number: int) -> Rule | None:
        return next((r for r in self._rules if r.covers(text, number, self._rank)), None)

    def change(self, rule: Rule, text: str, pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
        """What is to be handed over instead of `pairs`."""
        if rule.change == "drop":
            return []
        if rule.change == "scale":
            return [(x, result * float(rule.value)) for x, result in pairs]
        if rule.change == "stale":
            before = self._stale.get(text)
            self._stale[text] = [result.clone() for _, result in pairs]
            return (
                [] if before is None else [(x, r) for (x, _), r in zip(pairs, before, strict=True)]
            )
        return list(pairs)
