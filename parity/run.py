"""Cases to results: every case in fresh processes, every record judged against every baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from parity.baseline import Baselines
from parity.bounds import Expected
from parity.case import Case, Run
from parity.culprit import Culprit, find
from parity.errors import RanksFailed
from parity.judge import LOGIC, Override, Verdict, judge
from parity.ledger import Sums, total
from parity.plan import Baseline, Plan
from parity.trace import CHECKS, DETAILS, Key, Recording
from parity.tracing import record
from parity.whole import Whole, join, on_one_thread, same_bits


@dataclass(frozen=True)
class Judged:
    """All verdicts of one run against one baseline, in the baseline's program order."""

    run: Run
    baseline: str
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Result:
    """What became of a case: `pass`, `fail`, or `error` (it could not be run; `error` says why).

    `seconds` are those of the whole case, `judging` those of them after its ranks had ended. `diff`
    is the relative difference of what the forward put out, in the working dtype, from the last
    baseline in the same dtype; 0.0 says equal to the bit.
    """

    case: Case
    status: str
    judged: list[Judged]
    seconds: float
    judging: float = 0.0
    diff: float | None = None
    ledger: Sums = field(default_factory=dict)  # of the first run, if one was asked for
    error: str = ""
    idle: Sequence[str] = ()  # axes of several ranks that all hold the same
    coarse: str = ""  # in which dtypes the baseline rounds more coarsely than they do
    culprit: Culprit | None = None  # of a detailed run
    culprits: Sequence[Culprit] | None = None  # of a failure that was investigated
    unexplained: str = ""  # why it could not be

    @property
    def compared(self) -> tuple[int, int]:
        """(tensors, elements), each counted once per run and baseline that it was held against."""
        verdicts = [v for j in self.judged for v in j.verdicts]
        return sum(v.elements > 0 for v in verdicts), sum(v.elements for v in verdicts)

    @property
    def first_divergence(self) -> tuple[Judged, Verdict] | None:
        """Where to look first: logic before precision, then the earliest record in the program."""
        bad = [
            ((j.run.dtype != LOGIC, place), (j, verdict))
            for j in self.judged
            for place, verdict in enumerate(j.verdicts)
            if not verdict.good
        ]
        return min(bad, key=lambda item: item[0])[1] if bad else None


class Session:
    """Runs cases one after the other; what baselines gave is kept for all of them."""

    def __init__(self, plan: Plan, baselines: Baselines | None = None) -> None:
        """`baselines` of another session can be used again, when only the target differs."""
        self.plan = plan
        self.baselines = baselines or Baselines(plan)

    @on_one_thread
    def result(self, case: Case, masks: str = "", masked: Container[Key] = ()) -> Result:
        """Raises BaselineFailed or TraceError when there is nothing sound to judge against.

        `masks` is a file of values that replace the candidate's; these are `masked`.
        """
        self.baselines.prepare(case)
        start = time.perf_counter()
        runs = [replace(run, masks=masks) for run in self.plan.runs(case)]
        judged: list[Judged] = []
        diffs: list[float] = []
        culprit = None
        try:
            with record(self.plan.target, runs, self.plan.backend) as recordings:
                ran = time.perf_counter() - start
                sums, idle = total(recordings[0].ledgers), idle_axes(case, recordings[0])
                for run, recording in zip(runs, recordings, strict=True):
                    wholes = _wholes(recording)
                    judged += self._judge(run, wholes)
                    if self.plan.detail and culprit is None:
                        culprit = self._culprit(judged[-1], recording, wholes, masked)
                    diffs += self._differences(run, wholes)
        except RanksFailed as error:
            return Result(case, "error", [], time.perf_counter() - start, error=str(error))
        seconds = time.perf_counter() - start
        if not judged:
            return Result(case, "error", [], seconds, error="its only baseline is the case itself")
        good = all(verdict.good for j in judged for verdict in j.verdicts)
        status = "pass" if good else "fail"
        diff = max(diffs, default=None)
        return Result(
            case,
            status,
            judged,
            seconds,
            seconds - ran,
            diff,
            sums,
            idle=idle,
            coarse=self.baselines.coarse,
            culprit=culprit,
        )

    def _judge(self, run: Run, wholes: dict[Key, Whole]) -> Iterator[Judged]:
        for baseline in self.plan.baselines:
            if not self._is_itself(baseline, run):
                expected = self.baselines.expected(baseline, run.dtype, run.case)
                yield Judged(
                    run,
                    baseline.name,
                    list(verdicts(wholes, wholes.__getitem__, expected, self.plan.overrides)),
                )

    def _culprit(
        self, judged: Judged, recording: Recording, wholes: dict[Key, Whole], masked: Container[Key]
    ) -> Culprit | None:
        run, verdicts = judged.run, judged.verdicts
        bad = next((v for v in verdicts if not v.good and v.key not in masked), None)
        if bad is None:
            return None
        expected = self.baselines.expected(self.plan.baselines[0], run.dtype, run.case)
        return find(run, verdicts, bad, recording, wholes, expected, masked)

    def _is_itself(self, baseline: Baseline, run: Run) -> bool:
        return (
            baseline.target == self.plan.target
            and dict(baseline.case.axes) == dict(run.case.axes)
            and run.variant == self.plan.first_variant
        )

    def _differences(self, run: Run, wholes: dict[Key, Whole]) -> Iterator[float]:
        if run.dtype != self.plan.dtypes[-1]:
            return
        last = self.baselines.expected(self.plan.baselines[-1], run.dtype, run.case)
        for key, e in last.items():
            whole = wholes.get(key)
            if key.check != CHECKS[0] or whole is None or whole.tensor is None:
                continue
            if same_bits(whole.tensor, e.exact):
                yield 0.0
            elif whole.tensor.shape == e.exact.shape:
                baseline = e.exact.double()
                yield ((whole.tensor.double() - baseline).norm() / baseline.norm()).item()


def verdicts(
    keys: Collection[Key],
    whole_of: Callable[[Key], Whole],
    expected: Mapping[Key, Expected],
    overrides: Sequence[Override],
) -> Iterator[Verdict]:
    """What is to be said of each record, in the baseline's program order. Modules that one side
    alone has are nobody's mistake.
    """
    for key, e in expected.items():
        if key in keys:
            override = next((o for o in overrides if o.covers(key)), None)
            yield judge(key, whole_of(key), e, override)
        elif key.check not in DETAILS:
            yield Verdict(key, "missing", "the candidate did not record it")
    for key in keys:
        if key not in expected and key.check not in DETAILS:
            yield Verdict(key, "extra", "the baseline did not record it")


def idle_axes(case: Case, recording: Recording) -> list[str]:
    """Axes along which every rank holds what its neighbours hold, of all records: whatever ranks
    are to do together over such an axis was not put to the test.
    """
    at = [recording.at(rank) for rank in range(case.world)]
    idle = [axis for axis, size in case.axes.items() if size > 1 and all(at)]
    for key in recording.keys if idle else ():
        held = recording.held(key)
        idle = [axis for axis in idle if not _differs_along(axis, at, held)]
    return idle


def _differs_along(
    axis: str, at: Sequence[Mapping[str, int]], held: Mapping[int, set[tuple[int, ...]]]
) -> bool:
    lines: dict[tuple[tuple[str, int], ...], set[frozenset[tuple[int, ...]]]] = {}
    for rank, place in enumerate(at):
        others = tuple((name, i) for name, i in place.items() if name != axis)
        lines.setdefault(others, set()).add(frozenset(held.get(rank, ())))
    return any(len(line) > 1 for line in lines.values())


def whole_of(recording: Recording, key: Key) -> Whole:
    return join(recording.pieces(key), recording.shapes(key))


def _wholes(recording: Recording) -> dict[Key, Whole]:
    return {key: whole_of(recording, key) for key in recording.keys}
