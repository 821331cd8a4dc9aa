"""Each planted bug turns its case red, at the right tensor, and leaves its silent case green."""

from __future__ import annotations

import pytest

from parity import Backend
from parity.backend import Settings
from parity.baseline import Baselines
from parity.case import Case, parse_axes
from parity.plan import Baseline, Plan
from parity.run import Result, Session
from tests.bugs.bugs import BUGS, Bug

ONE = Case({"dp": 1, "tp": 1, "pp": 1})


def plan(target: str, dtype: str) -> Plan:
    return Plan(
        target=target,
        baselines=[Baseline("plain", "tests.bridge:plain", ONE)],
        cases=[],
        dtypes=[dtype],
        variants={"schedule": ["gpipe", "1f1b"]},
        options={},
        steps=3,
        backend=Backend(settings=Settings(order="place")),  # as `parity run` has it
    )


@pytest.fixture(scope="module")
def baselines() -> dict[str, Baselines]:
    return {
        dtype: Baselines(plan("tests.bridge:candidate", dtype)) for dtype in ("float64", "float32")
    }


def run(bug: Bug, case: str, baselines: dict[str, Baselines]) -> Result:
    session = Session(plan(f"tests.bugs.bugs:{bug.name}", bug.dtype), baselines[bug.dtype])
    return session.result(Case(parse_axes(case)))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught_at_the_right_tensor(bug: Bug, baselines: dict[str, Baselines]) -> None:
    result = run(bug, bug.case, baselines)
    assert result.status == "fail", result.error
    first = result.first_divergence
    assert first is not None
    red = {v.key.check for j in result.judged for v in j.verdicts if not v.good}
    assert str(first[1].key).startswith(bug.first), first[1].key
    assert red == set(bug.seen.split())


@pytest.mark.parametrize("bug", [b for b in BUGS if b.silent], ids=lambda bug: bug.name)
def test_bug_is_silent_where_it_changes_nothing(bug: Bug, baselines: dict[str, Baselines]) -> None:
    assert bug.silent is not None
    result = run(bug, bug.silent, baselines)
    assert result.first_divergence is None
    assert result.status == "pass", result.error
