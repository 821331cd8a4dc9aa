"""Each planted bug turns its case red, at the right tensor, and leaves its silent case green."""

from __future__ import annotations

import pytest

from parity.case import Case, parse_axes
from tests.bugs.__main__ import Hunt
from tests.bugs.catalogue import BUGS, Bug
from tests.bugs.plans import schedules


@pytest.fixture(scope="module")
def hunt() -> Hunt:
    return Hunt()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught_at_the_right_tensor(bug: Bug, hunt: Hunt) -> None:
    case = Case(parse_axes(bug.case))
    result = hunt.run(bug, case)
    assert result.status == "fail", result.error
    first = result.first_divergence
    assert first is not None
    red = [(j.run.variant["schedule"], v) for j in result.judged for v in j.verdicts if not v.good]
    assert str(first[1].key).startswith(bug.first), first[1].key
    assert first[1].status == bug.status
    assert {verdict.key.check for _, verdict in red} == set(bug.seen.split())
    assert {schedule for schedule, _ in red} == set(bug.schedules.split()) & set(schedules(case))


@pytest.mark.parametrize("bug", [b for b in BUGS if b.silent], ids=lambda bug: bug.name)
def test_bug_is_silent_where_it_changes_nothing(bug: Bug, hunt: Hunt) -> None:
    assert bug.silent is not None
    result = hunt.run(bug, Case(parse_axes(bug.silent)))
    assert result.first_divergence is None
    assert result.status == "pass", result.error
