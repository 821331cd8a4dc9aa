"""The calls of a clean run to mutants: every site, changed in every way that makes sense there.

Nothing is known of the program but its ledger: which ranks called what, from where, with whom.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.distributed as dist

from parity.backend import Entry, Rule
from parity.backend.fold import reduction
from parity.ledger import short

KINDS = {
    "drop": "the buffer keeps what it held",
    "double": "the result is reduced again",
    "op": "another reduction",
    "scale": "the result times 1/n, and times 2",
    "stale": "the result of the call before",
    "one-rank": "dropped on the first rank only, or on the last",
    "wrong-group": "with the members of another group",
    "wrong-peer": "what another rank was sent",
    "wrong-order": "the first two messages swapped",
}
OPS = ("SUM", "MAX", "AVG")
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter")
# Whose members all do the same; of other calls there is a root, which another group lacks.
ALIKE = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_single")
# What torch says on its own to make groups, and pickled objects: no tensor of the program.
SET_UP = ("init_device_mesh", "new_", "split_group", "init_process_group")

Ledgers = Sequence[Sequence[Entry]]
Groups = Sequence[
    Mapping[str, tuple[int, ...]]
]  # of each rank: members by what the group is called


@dataclass(frozen=True)
class Site:
    """A place of the program that calls others: its calls, by rank."""

    name: str
    calls: Mapping[int, Sequence[Entry]]

    @property
    def first(self) -> Entry:
        return next(iter(self.calls.values()))[0]

    @property
    def trail(self) -> list[str]:
        return [short(place) for place in self.first.trail.split(" < ")]

    @property
    def takers(self) -> list[int]:
        """The ranks that get something from it."""
        return [rank for rank, calls in self.calls.items() if any(e.result for e in calls)]

    @property
    def why_not(self) -> str:
        """Why it is not changed, if it is not."""
        through = self.first.through
        if "object" in through or through.startswith(SET_UP):
            return f"{through}: set-up, no tensor of the program"
        if not self.takers:
            sent = "what it sends is changed where it is received"
            return sent if self.first.bytes else "it has no result"
        return ""


class Mutant(NamedTuple):
    """`detail` is which one of its kind: by how much, over which group, on which rank."""

    site: Site
    kind: str
    detail: str
    rule: Rule

    def __str__(self) -> str:
        return f"{self.kind} {self.detail}".rstrip()


def sites(ledgers: Ledgers) -> list[Site]:
    found: dict[str, dict[int, list[Entry]]] = {}
    for rank, entries in enumerate(ledgers):
        for entry in entries:
            found.setdefault(entry.name, {}).setdefault(rank, []).append(entry)
    return [Site(name, calls) for name, calls in found.items()]


def labels(all_sites: Sequence[Site]) -> dict[str, str]:
    """What to call each site: by the first place, from the call outwards, that sets it apart."""
    trails = {tuple(site.trail) for site in all_sites}
    found: dict[str, list[str]] = {}  # a short name, and one that goes all the way
    for site in all_sites:
        trail = tuple(site.trail)
        alone = (n for n in range(1, len(trail)) if sum(t[:n] == trail[:n] for t in trails) == 1)
        n, call = next(alone, len(trail)), f"{site.first.op} on {site.first.group}"
        found[site.name] = [f"{call}, {trail[n - 1]}", f"{call}, {' < '.join(trail[:n])}"]
    count = Counter(short for short, _ in found.values())
    return {name: short if count[short] == 1 else far for name, (short, far) in found.items()}


def matches(label: str, pattern: str) -> bool:
    return pattern in label or fnmatchcase(label, pattern)


def mutants(site: Site, ledgers: Ledgers) -> Iterator[Mutant]:
    def make(kind: str, change: str, detail: str = "", **rest: object) -> Mutant:
        return Mutant(site, kind, detail, Rule(change, site=site.name, **rest))  # type: ignore[arg-type]

    entry, n = site.first, len(site.first.members)
    yield make("drop", "drop")
    if entry.op == "all_reduce":  # whose result is its input: all others give the same again
        yield make("double", "double")
    if entry.op in REDUCTIONS:
        for op in _other_ops(site):
            yield make("op", "op", op, value=op)
    for factor in dict.fromkeys((1 / n, 2.0)):
        if factor != 1:
            yield make("scale", "scale", f"by {factor:.3g}", value=factor)
    if max(map(len, site.calls.values())) > 1:
        yield make("stale", "stale")
    if len(takers := site.takers) > 1:
        for rank in (takers[0], takers[-1]):  # of a pipeline, on the first and the last stage
            yield make("one-rank", "drop", f"rank {rank}", ranks=(rank,))
    for group in _other_groups(site, _groups(ledgers)):
        if entry.op in ALIKE:
            yield make("wrong-group", "group", f"over {group}", value=group)
        elif entry.op == "recv":
            yield make("wrong-peer", "peer", f"over {group}", value=group)
    if entry.op == "recv" and _come_in_twos(site):
        yield make("wrong-order", "swap")


def _other_ops(site: Site) -> list[str]:
    """Reductions that every call of the site could have made, and did not."""
    calls = [e for calls in site.calls.values() for e in calls]
    own = {e.detail.partition(",")[0] for e in calls}
    dtypes = {getattr(torch, e.dtype) for e in calls}
    return [
        op
        for op in OPS
        if op not in own
        and not any(reduction(getattr(dist.ReduceOp, op), dtype).objection for dtype in dtypes)
    ]


def _groups(ledgers: Ledgers) -> Groups:
    return [{e.group: tuple(e.members) for e in entries} for entries in ledgers]


def _other_groups(site: Site, groups: Groups) -> Iterator[str]:
    """Groups in whose members' programs the site occurs as often, with as many bytes."""
    sizes = {rank: [(e.bytes, e.dtype) for e in calls] for rank, calls in site.calls.items()}
    own = {rank: tuple(calls[0].members) for rank, calls in site.calls.items()}
    seen = [own]
    for group in dict.fromkeys(name for rank in site.calls for name in groups[rank]):
        members = {rank: groups[rank].get(group, ()) for rank in site.calls}
        if members in seen or not all(members.values()):
            continue
        fits = site.first.op in ("all_reduce", "recv") or all(
            len(members[rank]) == len(own[rank]) for rank in own
        )
        if fits and all(sizes.get(m) == sizes[r] for r, ms in members.items() for m in ms):
            seen.append(members)
            yield group


def _come_in_twos(site: Site) -> bool:
    """Whether every rank gets two messages of one size, at least, from everyone who sends here."""
    for calls in site.calls.values():
        count = Counter(e.detail for e in calls)
        if min(count.values()) < 2 or len({(e.bytes, e.dtype) for e in calls}) > 1:
            return False
        if any(detail.startswith("from any") for detail in count):
            return False
    return True
