"""Cases to results: baselines once, every case in fresh processes, every record judged."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from parity.bounds import NUDGES, Expected, measure
from parity.case import Case, Run, Scalar
from parity.errors import ParityError, RanksFailed, TraceError, UsageError
from parity.judge import LOGIC, Override, Verdict, judge
from parity.launch import Backend, launch
from parity.trace import CHECKS, Key, Recording, Trace
from parity.whole import Whole, join, same_bits


@dataclass(frozen=True)
class Baseline:
    """What candidates are held against: a target of its own on one rank, or a case of theirs."""

    name: str
    target: str
    case: Case


@dataclass(frozen=True)
class Plan:
    """Everything a matrix decides, checked and expanded: what `Session` needs, and no more."""

    target: str
    baselines: Sequence[Baseline]
    cases: Sequence[Case]
    dtypes: Sequence[str]
    variants: Mapping[str, Sequence[Scalar]]
    options: Mapping[str, Scalar]
    steps: int
    seed: int = 0
    overrides: Sequence[Override] = ()
    backend: Backend = field(default_factory=Backend)

    def runs(self, case: Case) -> list[Run]:
        """A case is computed once per dtype and combination of variants."""
        keys = list(self.variants)
        return [
            self.run(case, dtype, dict(zip(keys, values, strict=True)))
            for dtype in self.dtypes
            for values in product(*self.variants.values())
        ]

    def run(self, case: Case, dtype: str, variant: Mapping[str, Scalar]) -> Run:
        options = {**self.options, **case.options}
        return Run(case, dtype, self.steps, self.seed, variant, options)

    @property
    def first_variant(self) -> dict[str, Scalar]:
        return {key: values[0] for key, values in self.variants.items()}


@dataclass(frozen=True)
class Judged:
    """All verdicts of one run against one baseline, in the baseline's program order."""

    run: Run
    baseline: str
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Result:
    """What became of a case: `pass`, `fail`, or `error` (it could not be run; `error` says why)."""

    case: Case
    status: str
    judged: list[Judged]
    seconds: float
    diff: float | None = None
    error: str = ""

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


def resolve(path: str) -> Callable[..., Any]:
    """`package.module:function` to the function; raises UsageError when there is none."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{path}: {error} (write it as package.module:function)") from error
    if not callable(found):
        raise UsageError(f"{path}: is no function")
    return found  # type: ignore[no-any-return]


def trace_on_rank(target: str, runs: Sequence[Run], folder: str) -> None:
    """Runs on every rank: call the target once per run, and leave its traces in `folder`."""
    import torch.distributed as dist

    rank = dist.get_rank()
    device = f"cuda:{rank}" if dist.get_backend() == "nccl" else "cpu"
    function = resolve(target)
    for i, run in enumerate(runs):
        trace = function(replace(run, rank=rank, device=device))
        if not isinstance(trace, Trace):
            raise TraceError(f"{target} returned {type(trace).__name__}, not a parity.Trace")
        trace.save(Path(folder) / f"run{i}-rank{rank}.safetensors")


class Session:
    """Runs cases one after the other; what baselines gave is kept for all of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.baseline_seconds = 0.0
        self._expected: dict[tuple[str, str, str], dict[Key, Expected]] = {}

    def results(self) -> Iterator[Result]:
        for case in self.plan.cases:
            yield self.result(case)

    def result(self, case: Case) -> Result:
        start = time.perf_counter()
        self._prepare(case)
        started = time.perf_counter()
        self.baseline_seconds += started - start
        runs = self.plan.runs(case)
        try:
            with tempfile.TemporaryDirectory(prefix="parity-") as folder:
                recordings = record(self.plan.target, runs, self.plan.backend, folder)
                judged, diff = self._judge(case, runs, recordings)
        except RanksFailed as error:
            return Result(case, "error", [], time.perf_counter() - started, error=str(error))
        good = all(verdict.good for j in judged for verdict in j.verdicts)
        status = "pass" if good else "fail"
        return Result(case, status, judged, time.perf_counter() - started, diff)

    def _judge(
        self, case: Case, runs: list[Run], recordings: list[Recording]
    ) -> tuple[list[Judged], float | None]:
        judged, diffs = [], []
        for run, recording in zip(runs, recordings, strict=True):
            wholes = {
                key: join(recording.pieces(key), recording.shapes(key)) for key in recording.keys
            }
            for baseline in self.plan.baselines:
                if self._is_itself(baseline, run):
                    continue
                expected = self._expectation(baseline, run.dtype, case)
                judged.append(Judged(run, baseline.name, self._verdicts(wholes, expected)))
            if run.dtype == self.plan.dtypes[-1]:
                last = self._expectation(self.plan.baselines[-1], run.dtype, case)
                diffs += _forward_differences(wholes, last)
        return judged, max(diffs) if diffs else None

    def _is_itself(self, baseline: Baseline, run: Run) -> bool:
        same = baseline.target == self.plan.target and dict(baseline.case.axes) == dict(
            run.case.axes
        )
        return same and run.variant == self.plan.first_variant

    def _verdicts(self, wholes: dict[Key, Whole], expected: dict[Key, Expected]) -> list[Verdict]:
        verdicts = [
            judge(key, wholes[key], e, self._override(key))
            if key in wholes
            else Verdict(key, "missing", "the candidate did not record it")
            for key, e in expected.items()
        ]
        verdicts += [
            Verdict(key, "extra", "the baseline did not record it")
            for key in wholes
            if key not in expected
        ]
        return verdicts

    def _override(self, key: Key) -> Override | None:
        return next((o for o in self.plan.overrides if o.covers(key)), None)

    def _expectation(self, baseline: Baseline, dtype: str, case: Case) -> dict[Key, Expected]:
        return self._expected[baseline.name, dtype, _options_id(case)]

    def _prepare(self, case: Case) -> None:
        """Run the baselines, unless they have been for these options."""
        names = [(b.name, self.plan.dtypes[0], _options_id(case)) for b in self.plan.baselines]
        if all(name in self._expected for name in names):
            return
        wholes = {b.name: self._run_baseline(b, case) for b in self.plan.baselines}
        first = wholes[self.plan.baselines[0].name]
        for baseline in self.plan.baselines:
            for dtype in self.plan.dtypes:
                self._expected[baseline.name, dtype, _options_id(case)] = {
                    key: measure(
                        wholes[baseline.name][dtype, 0][key],
                        wholes[baseline.name][LOGIC, 0][key],
                        [first[dtype, n][key] for n in _disturbed(dtype)],
                    )
                    for key in wholes[baseline.name][dtype, 0]
                }

    def _run_baseline(
        self, baseline: Baseline, case: Case
    ) -> dict[tuple[str, int], dict[Key, torch.Tensor]]:
        """The wholes by (dtype, nudge); only the first baseline is disturbed, for all of them."""
        where = replace(baseline.case, options=case.options)
        dtypes = dict.fromkeys([LOGIC, *self.plan.dtypes])
        keys = [(dtype, 0) for dtype in dtypes]
        if baseline is self.plan.baselines[0]:
            keys += [(dtype, n) for dtype in dtypes for n in range(1, NUDGES + 1)]
        runs = [
            replace(self.plan.run(where, dtype, self.plan.first_variant), nudge=n)
            for dtype, n in keys
        ]
        try:
            with tempfile.TemporaryDirectory(prefix="parity-") as folder:
                recordings = record(baseline.target, runs, self.plan.backend, folder)
                wholes = {
                    key: _sound_wholes(baseline.name, recording)
                    for key, recording in zip(keys, recordings, strict=True)
                }
        except RanksFailed as error:
            raise BaselineFailed(f"the baseline '{baseline.name}' could not be run\n{error}") from error
        return wholes


class BaselineFailed(ParityError):
    """Without its baselines a matrix cannot be judged."""


def record(target: str, runs: Sequence[Run], backend: Backend, folder: str) -> list[Recording]:
    """Call the target on as many fresh ranks as the runs' case has: a recording per run."""
    world = runs[0].case.world
    launch(trace_on_rank, world, target, list(runs), folder, backend=backend)
    return [
        Recording([Path(folder) / f"run{i}-rank{rank}.safetensors" for rank in range(world)])
        for i in range(len(runs))
    ]


def _disturbed(dtype: str) -> range:
    return range(1, NUDGES + 1)


def _options_id(case: Case) -> str:
    return repr(sorted(case.options.items()))


def _sound_wholes(name: str, recording: Recording) -> dict[Key, torch.Tensor]:
    """The records of a baseline. It is the yardstick: pieces that do not join are an error."""
    wholes = {}
    for key in recording.keys:
        whole = join(recording.pieces(key), recording.shapes(key))
        if whole.tensor is None or whole.findings:
            raise TraceError(f"the baseline '{name}', {key}: {whole.findings[0].text}")
        wholes[key] = whole.tensor.clone()
    if not wholes:
        raise TraceError(f"the baseline '{name}' recorded nothing")
    return wholes


def _forward_differences(
    wholes: dict[Key, Whole], expected: dict[Key, Expected]
) -> Iterator[float]:
    """Relative to the baseline in the same dtype; 0.0 says equal to the bit."""
    for key, e in expected.items():
        whole = wholes.get(key)
        if key.check != CHECKS[0] or whole is None or whole.tensor is None:
            continue
        if whole.tensor.shape != e.exact.shape:
            yield float("nan")
        elif same_bits(whole.tensor, e.exact):
            yield 0.0
        else:
            baseline = e.exact.double()
            yield ((whole.tensor.double() - baseline).norm() / baseline.norm()).item()
