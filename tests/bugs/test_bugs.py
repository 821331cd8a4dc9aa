"""Each planted bug turns its case red, at the right tensor, and leaves its silent case green."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from parity.baseline import Baselines
from parity.case import Case, parse_axes
from parity.run import Result, Session
from tests.bugs.catalogue import BUGS, Bug
from tests.bugs.plans import plan, schedules

Kept = Callable[[str, int], Baselines]


@pytest.fixture(scope="module")
def baselines() -> Kept:
    """Made once per dtype and number of steps: which is all that they depend on."""
    return cache(lambda dtype, steps: Baselines(plan("tests.bridge:candidate", dtype, steps)))


def run(bug: Bug, case: Case, baselines: Kept) -> Result:
    planned = plan(bug.target, bug.dtype, bug.steps, case)
    return Session(planned, baselines(bug.dtype, bug.steps)).result(case)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught_at_the_right_tensor(bug: Bug, baselines: Kept) -> None:
    case = Case(parse_axes(bug.case))
    result = run(bug, case, baselines)
    assert result.status == "fail", result.error
    first = result.first_divergence
    assert first is not None
    red = [(j.run.variant["schedule"], v) for j in result.judged for v in j.verdicts if not v.good]
    assert str(first[1].key).startswith(bug.first), first[1].key
    assert first[1].status == bug.status
    assert {verdict.key.check for _, verdict in red} == set(bug.seen.split())
    assert {schedule for schedule, _ in red} == set(bug.schedules.split()) & set(schedules(case))


@pytest.mark.parametrize("bug", [b for b in BUGS if b.silent], ids=lambda bug: bug.name)
def test_bug_is_silent_where_it_changes_nothing(bug: Bug, baselines: Kept) -> None:
    assert bug.silent is not None
    result = run(bug, Case(parse_axes(bug.silent)), baselines)
    assert result.first_divergence is None
    assert result.status == "pass", result.error


def test_names_are_targets_of_their_own() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)
