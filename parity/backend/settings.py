"""What is asked of the checking backend in one launch. Values: they travel to the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CHANGES = ("drop", "scale", "stale", "op", "double", "group", "peer", "swap", "noise", "skip")


@dataclass(frozen=True)
class Rule:
    """A change to some calls, to see whether anybody notices.

    Calls are chosen by a part of their text (`all_reduce (SUM) of float32[8] on group tp, at
    model.py:12 in forward`), by the whole name of their site (`Entry.name` of the ledger), by their
    number in the group's sequence, counted from 1, and by rank; what is left out chooses all. The
    change is one of

        drop    the call is made, and its result thrown away
        scale   the result is multiplied by `value`
        stale   the result of the call before at the same place is given (of the first: dropped)
        op      reduce by `value` (as in MAX) instead
        noise   the result is multiplied by numbers from 1 to 2, drawn from `value`: random, and the
                same on all ranks
        double  the result of a reduction is reduced again: a sum becomes n times the sum
        group   the call is made by the group called `value` instead (a reduction, all_gather, ...)
        peer    of a message: that of the next member of the group called `value` is given
        swap    the first two messages change places
        skip    the call is not made at all: others may then wait for ever, and are told so
    """

    change: str
    where: str = ""
    number: int | None = None
    ranks: tuple[int, ...] | None = None
    value: float | str = 0.0
    site: str = ""

    def __post_init__(self) -> None:
        if self.change not in CHANGES:
            raise ValueError(f"change '{self.change}' is unknown (known: {', '.join(CHANGES)})")

    def covers(self, text: str, name: str, number: int, rank: int) -> bool:
        return (
            self.where in text
            and self.site in ("", name)
            and self.number in (None, number)
            and (self.ranks is None or rank in self.ranks)
        )


@dataclass(frozen=True)
class Settings:
    """`ledger`: how many calls each rank remembers, the latest ones; 0 keeps no ledger. `order` of
    reductions: by `rank`, or by `place`, where the i-th part of a buffer starts at rank i.
    """

    ledger: int = 0
    rules: tuple[Rule, ...] = field(default=())
    watch: bool = False
    order: Literal["rank", "place"] = "rank"
