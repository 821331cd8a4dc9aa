"""Does anybody notice? Calls among ranks are changed one at a time, and the case is judged anew.

A clean run of the case gives the call sites. Each mutant is a launch of its own with one rule of
the backend in force: what ranks hang or die of is nobody else's. It is `killed` by the first check
that is red, or by the backend; `equivalent` if no rule changed a single bit of a result, by the
backend's own count; and `survived` if something changed and every check is green. Of survivors that
gave all ranks the same other value, it is then tried whether any value would do, so long as ranks
agree on it: if so, they are `invariant`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from parity.backend import Rule, Settings, Tally, tally
from parity.baseline import Baselines
from parity.case import Run
from parity.errors import (
    COULD_NOT_RUN,
    PARITY_FAILURE,
    PASSED,
    ParityError,
    RanksFailed,
    UsageError,
)
from parity.judge import LOGIC, Verdict
from parity.launcher import launch
from parity.ledger import SIZE
from parity.mutants import KINDS, Ledgers, Mutant, Site, labels, matches, mutants, sites
from parity.plan import Plan, Wish
from parity.prepare import prepare
from parity.report import what_is_wrong
from parity.run import verdicts, whole_of
from parity.scratch import Scratch
from parity.trace import Recording
from parity.tracing import recording, trace_on_rank
from parity.whole import on_one_thread

STEPS = 2
LETTERS = {"killed": "k", "equivalent": "=", "invariant": "~", "survived": "S", "error": "!"}
SHARED = ("op", "scale")  # kinds of change that all ranks get alike
DRAWS = (1, 2, 3)  # seeds of the values that are tried then
# A mutant that takes this many times as long as the clean run, and seconds, hangs.
PATIENCE, LEAST = 10, 20.0


class Unclean(ParityError):
    """The case is red without any change: there is nothing to be noticed."""

    code = PARITY_FAILURE


class Fate(NamedTuple):
    """What became of a mutant. `by` is the check, or the error, that killed it."""

    mutant: Mutant
    verdict: str  # killed survived equivalent invariant, or error: nothing can be said
    by: str
    reason: str
    tally: Tally
    seconds: float


@dataclass(frozen=True)
class Report:
    """Everything that was found about one case."""

    command: str  # what to type to do it again
    run: Run
    sites: Sequence[Site]
    fates: Sequence[Fate]
    seconds: float
    clean_seconds: float

    def count(self, verdict: str) -> int:
        return sum(fate.verdict == verdict for fate in self.fates)

    @property
    def score(self) -> float:
        """The share that was killed, of those that changed anything."""
        killed = self.count("killed")
        return killed / max(killed + self.count("survived"), 1)

    @property
    def exit_code(self) -> int:
        if self.count("survived"):
            return PARITY_FAILURE
        return COULD_NOT_RUN if self.count("error") else PASSED


@dataclass(frozen=True)
class Choice:
    """Which mutants; empty chooses all."""

    only: Sequence[str] = ()
    kinds: Sequence[str] = ()

    def of(self, all_sites: Sequence[Site], ledgers: Ledgers) -> list[Mutant]:
        """Raises UsageError where a pattern names nothing, or nothing is left."""
        names = labels(all_sites)
        open_sites = [site for site in all_sites if not site.why_not]
        if not open_sites:
            raise UsageError("its ranks say nothing to each other: choose a case with more ranks")
        known = "; ".join(names[site.name] for site in open_sites)
        wrong = [
            f"--only {pattern}: no such site (known: {known})"
            for pattern in self.only
            if not any(matches(names[site.name], pattern) for site in open_sites)
        ]
        if wrong:
            raise UsageError(*wrong)
        found = [
            mutant
            for site in open_sites
            if not self.only or any(matches(names[site.name], p) for p in self.only)
            for mutant in mutants(site, ledgers)
            if not self.kinds or mutant.kind in self.kinds
        ]
        if not found:
            raise UsageError(f"--kind {', '.join(self.kinds)}: no site has a mutant of that kind")
        return found

    @property
    def objections(self) -> list[str]:
        known = ", ".join(KINDS)
        return [f"--kind {k}: unknown (known: {known})" for k in self.kinds if k not in KINDS]


def plan_for(path: Path, wish: Wish, objections: Sequence[str] = ()) -> Plan:
    """One case, dtype, variant and baseline. `objections` are told along with those found here."""
    wish = replace(wish, backend="parity", dtypes=[LOGIC], steps=wish.steps or STEPS)
    try:
        plan, _ = prepare(path, wish)
    except UsageError as error:
        raise UsageError(*objections, *str(error).splitlines()) from error
    wrong = list(objections)
    if len(plan.cases) != 1:
        some = ", ".join(case.id for case in plan.cases[:3])
        wrong.append(f"--case: one case at a time, and not {len(plan.cases)} ({some}, ...)")
        raise UsageError(*wrong)
    axes = dict(plan.cases[0].axes)
    others = [b for b in plan.baselines if (b.target, dict(b.case.axes)) != (plan.target, axes)]
    if not others:
        wrong.append(f"--case {plan.cases[0].id}: its only baseline is the case itself")
    if wrong:
        raise UsageError(*wrong)
    first = {key: values[:1] for key, values in plan.variants.items()}
    return replace(plan, baselines=others[:1], variants=first)


class Bench:
    """A case, its expectations, and how long it takes when nothing is changed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        (self.case,) = plan.cases
        (self.run,) = plan.runs(self.case)
        self.baselines = Baselines(plan)
        self.clean_seconds = 0.0

    def clean(self) -> Ledgers:
        """The ledgers of the case as it is. Raises Unclean when it is red."""
        self.baselines.prepare(self.case)
        start = time.perf_counter()
        with Scratch() as folder:
            self._launch(folder, Settings(ledger=SIZE, order="place"), self.plan.backend.deadline)
            found = recording(str(folder), 0, self.case.world)
            self.clean_seconds = time.perf_counter() - start
            red, _ = self._judge(found)
            if red is not None:
                raise Unclean(
                    f"{self.case.id} is red as it is, so no change could be noticed: {red.key}: "
                    f"{what_is_wrong(red)}"
                )
            return found.ledgers

    def fate(self, mutant: Mutant) -> Fate:
        start = time.perf_counter()
        done = Tally()
        settings = Settings(rules=(mutant.rule,), order="place")
        deadline = min(self.plan.backend.deadline, LEAST + PATIENCE * self.clean_seconds)
        try:
            with Scratch() as folder:
                done = self._launch(folder, settings, deadline)
                red, near = self._judge(recording(str(folder), 0, self.case.world))
            verdict, by, reason = _fate(done, red, near)
        except RanksFailed as error:
            verdict, by, reason = "killed", _cause(str(error)), str(error).splitlines()[0]
        return Fate(mutant, verdict, by, reason, done, time.perf_counter() - start)

    def _launch(self, folder: Path, settings: Settings, deadline: float) -> Tally:
        backend = replace(self.plan.backend, settings=settings, deadline=deadline)
        args = self.plan.target, self.run, str(folder), backend.device
        ranks: list[Tally] = launch(_on_rank, self.case.world, *args, backend=backend)
        return Tally(
            sum(t.calls for t in ranks),
            sum(t.changed for t in ranks),
            max(t.largest for t in ranks),
        )

    @on_one_thread
    def _judge(self, found: Recording) -> tuple[Verdict | None, Verdict | None]:
        """The first record that is red, in the order of the program, and the nearest to be."""
        near: Verdict | None = None
        expected = self.baselines.expected(self.plan.baselines[0], LOGIC, self.case)
        one_by_one = partial(whole_of, found)  # so that a red one is the last to be joined
        for verdict in verdicts(found.keys, one_by_one, expected, self.plan.overrides):
            if not verdict.good:
                return verdict, None
            if near is None or verdict.excess > near.excess:
                near = verdict
        return None, near


def _on_rank(target: str, run: Run, folder: str, device: str) -> Tally:
    trace_on_rank(target, [(0, run)], folder, device)
    return tally()


def _fate(done: Tally, red: Verdict | None, near: Verdict | None) -> tuple[str, str, str]:
    """Verdict, by what, and the reason, of a mutant whose ranks all returned."""
    if not done.calls:
        return (
            "error",
            "",
            "no call was met by the rule: the run took another way than the clean one",
        )
    if red is not None:
        said = f"{red.key}: {what_is_wrong(red)}"
        if done.changed:
            return "killed", red.key.check, said
        return "error", "", f"no result was changed, and yet {said}; is the target seeded?"
    if not done.changed:
        return "equivalent", "", f"{done.calls} calls, and not a bit was changed"
    nearest = f" (the nearest: {near.key}, at {near.excess:.2g} of its bound)" if near else ""
    return "survived", "", f"{_size(done)}, and every check passed{nearest}"


def _size(done: Tally) -> str:
    if done.largest == float("inf"):  # a result of zeros, or one that is no number any more
        return f"{done.changed} results changed, beyond all measure"
    return f"{done.changed} results changed, by up to {done.largest:.2g} of their size"


def _cause(text: str) -> str:
    if text.startswith("not done after"):
        return "hang"
    found = re.search(r"(?:raised|lost the others): (\w+)", text)
    return found[1] if found else "crash"


def run(
    plan: Plan, choice: Choice, command: str, tell: Callable[[int, int, Fate | None], None]
) -> tuple[Report, bool]:
    """All mutants, one by one; `tell` hears of each. On Ctrl-C what there is, and False."""
    start = time.perf_counter()
    bench = Bench(plan)
    ledgers = bench.clean()
    all_sites = sites(ledgers)
    chosen, fates = choice.of(all_sites, ledgers), list[Fate]()
    tell(0, len(chosen), None)
    try:
        for mutant in chosen:
            fates.append(bench.fate(mutant))
            tell(len(fates), len(chosen), fates[-1])
        fates = settled(bench, fates)
    except KeyboardInterrupt:
        if not fates:
            raise
    seconds = time.perf_counter() - start
    report = Report(command, bench.run, all_sites, fates, seconds, bench.clean_seconds)
    return report, len(fates) == len(chosen)


def settled(bench: Bench, fates: Sequence[Fate]) -> list[Fate]:
    """Survivors of a site where ranks have to agree, and on what does not matter, are no holes."""
    invariant: dict[str, bool] = {}
    for fate in fates:
        site = fate.mutant.site
        if fate.verdict == "survived" and fate.mutant.kind in SHARED and site.name not in invariant:
            alone = {
                f.verdict for f in fates if f.mutant.site is site and f.mutant.kind == "one-rank"
            }
            invariant[site.name] = "killed" in alone <= {"killed", "equivalent"} and all(
                bench.fate(_noise(site, seed)).verdict == "survived" for seed in DRAWS
            )
    return [
        fate._replace(verdict="invariant", reason=f"any value will do, if shared: {fate.reason}")
        if fate.verdict == "survived"
        and fate.mutant.kind in SHARED
        and invariant[fate.mutant.site.name]
        else fate
        for fate in fates
    ]


def _noise(site: Site, seed: int) -> Mutant:
    return Mutant(site, "noise", f"seed {seed}", Rule("noise", site=site.name, value=seed))
