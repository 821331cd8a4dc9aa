"""Right code must stay green: random configurations of a matrix, until one of them is called wrong.

hypothesis draws them: options of the model and its data, a seed, dtypes, a few topologies, one way
to compute. Cases of one draw share their baselines. A failure is shrunk to the smallest draw that
still fails: fewest ranks, smallest sizes, one dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, Unsatisfiable

from parity.case import Case, Scalar
from parity.errors import ParityError, TraceError, UsageError
from parity.matrix_file import Range
from parity.plan import Plan
from parity.prepare import Space
from parity.run import Result, Session

CASES = 4  # topologies that share the baselines of a draw
STEPS = 3  # of training, at most


class Draw(NamedTuple):
    """One drawing: the plan of its options, and its cases."""

    plan: Plan
    cases: Sequence[Case]

    def command(self, matrix: object) -> str:
        """What to type to run it again."""
        plan = self.plan
        parts = [f"parity run {matrix}", *(f"--case {case.id}" for case in self.cases)]
        parts += [f"--dtype {dtype}" for dtype in plan.dtypes]
        parts += [f"--steps {plan.steps}", f"--seed {plan.seed}"]
        parts += [f"--set {key}={_yaml(value)}" for key, value in plan.options.items()]
        return " ".join(parts)


def _yaml(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class FalseAlarm(ParityError):
    """A configuration that was called wrong."""

    def __init__(self, draw: Draw, result: Result) -> None:
        super().__init__(f"{result.case.id}: {result.status}")
        self.draw, self.result = draw, result


@dataclass
class Soaked:
    """What a soak has seen. `counts`: configurations by dtype; `refused`: draws that had no sound
    baseline, by reason; `worst`: the largest error over its bound.
    """

    counts: Counter[str] = field(default_factory=Counter)
    topologies: set[str] = field(default_factory=set)
    draws: int = 0
    tensors: int = 0
    worst: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    alarm: FalseAlarm | None = None

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@st.composite
def drawn(draw: st.DrawFn, plan: Plan, space: Space) -> Draw:
    options = dict(plan.options)
    for name, choice in space.choices.items():
        values = (
            st.integers(choice.start, choice.to)
            if isinstance(choice, Range)
            else st.sampled_from(list(choice))
        )
        options[name] = draw(values)
    try:
        fitting = [case for case in space.cases if not space.objections(case, options)]
    except ParityError:
        fitting = []
    assume(fitting)
    cases = draw(
        st.lists(st.sampled_from(fitting), min_size=1, max_size=CASES, unique_by=lambda c: c.id)
    )
    some_dtypes = st.lists(st.sampled_from(plan.dtypes), min_size=1, max_size=2, unique=True)
    drawn_plan = replace(
        plan,
        options=options,
        cases=cases,
        dtypes=draw(some_dtypes),
        variants={key: [draw(st.sampled_from(values))] for key, values in plan.variants.items()},
        seed=draw(st.integers(0, 2**31 - 1)),
        steps=draw(st.integers(1, STEPS)),
    )
    return Draw(drawn_plan, cases)


def soak(plan: Plan, space: Space, count: int, seed: int, tell: Callable[[Soaked], None]) -> Soaked:
    """Run `count` configurations (one is a topology in a dtype); stops at the first false alarm."""
    seen = Soaked()

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(drawn(plan, space))
    def one(draw: Draw) -> None:
        if seen.total < count or seen.alarm is not None:
            _run(draw, seen)
            tell(seen)

    try:
        one()
    except FalseAlarm as alarm:
        seen.alarm = alarm
    except Flaky:
        pass  # `alarm` has been kept: it failed once, and that is enough
    except Unsatisfiable as error:
        raise UsageError("soak: the target objects to whatever is drawn; widen it") from error
    return seen


def _run(draw: Draw, seen: Soaked) -> None:
    session = Session(draw.plan)
    try:
        session.baselines.prepare(draw.cases[0])
    except TraceError as error:  # no yardstick: nothing can be said about such a draw
        seen.refused[str(error).split(", and ")[0].split(":")[-1].strip()] += 1
        return
    seen.draws += 1
    for case in draw.cases:
        result = session.result(case)
        for judged in result.judged:
            seen.counts[judged.run.dtype] += judged.baseline == draw.plan.baselines[0].name
            seen.tensors += len(judged.verdicts)
            seen.worst = max([seen.worst, *(v.excess for v in judged.verdicts)])
        seen.topologies.add(case.id)
        if result.status != "pass":
            seen.alarm = FalseAlarm(draw._replace(cases=[case]), result)
            raise seen.alarm


def text(seen: Soaked) -> str:
    """What a soak found, in a few lines."""
    by = ", ".join(f"{n:,} in {dtype}" for dtype, n in sorted(seen.counts.items()))
    lines = [
        f"{seen.total:,} configurations ({by}) of {len(seen.topologies)} topologies and "
        f"{seen.draws:,} models and data, {seen.tensors:,} tensors: "
        f"{'no false alarm' if seen.alarm is None else 'one was called wrong'}",
        f"closest to its bound: {seen.worst:.2g} of what it was allowed",
    ]
    if seen.refused:
        lines.append(f"{seen.refused.total()} more draws had no sound baseline, such as: ")
        lines[-1] += seen.refused.most_common(1)[0][0]
    return "\n".join(lines)
