"""heiretsu on its matrix: the small topologies whole, and what the matrix file leaves out."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from parity import Backend
from parity.case import Case, parse_axes
from parity.plan import Plan, Wish
from parity.prepare import prepare
from parity.report import what_is_wrong
from parity.run import Result, Session

ROOT = Path(__file__).parents[2]
# To four ranks every topology; with more, one of each kind that has no smaller one: all three axes
# at once, three dp ranks under an uneven cut over tp, and under a tied embedding over pp.
LARGER = ("dp2-tp2-pp2", "dp3-tp2-pp1", "dp3-tp1-pp2")


def plan(**changes: object) -> Plan:
    base, _ = prepare(ROOT / "matrix.yaml", Wish(device="cpu"))
    options = {**base.options, **changes.pop("options", {})}  # type: ignore[dict-item]
    return replace(base, options=options, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(plan(steps=3))


def explain(result: Result) -> str:
    first = result.first_divergence
    return result.error or (f"{first[1].key}: {what_is_wrong(first[1])}" if first else "")


def small_ids() -> list[str]:
    cases = plan().cases
    return [c.id for c in cases if prod(c.axes.values()) <= 4 or c.id in LARGER]


@pytest.mark.parametrize("case", small_ids())
def test_case(case: str, session: Session) -> None:
    result = session.result(Case(parse_axes(case)))
    assert result.status == "pass", explain(result)
    for j in result.judged:
        for v in j.verdicts:
            if j.run.dtype == "float64" and v.key.check in ("forward", "gradient"):
                assert v.error < 1e-12
    if "tp1" in case:
        assert result.diff == 0.0  # rows of a batch are computed alike wherever they are
    copies = sum(v.copies for j in result.judged for v in j.verdicts)
    assert (copies > 0) == (case != "dp1-tp1-pp1")


@pytest.mark.parametrize(
    "options",
    [
        {"tied": False},
        {"micro_batches": 1},
        {"micro_batches": 3, "batch": 7},
        {"sequence": 20, "batch": 9, "micro_batches": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["dp2-tp1-pp2", "dp1-tp2-pp2", "dp1-tp3-pp1", "dp1-tp1-pp4"])
def test_other_shapes(case: str, options: dict[str, object]) -> None:
    session = Session(plan(options=options, steps=2, dtypes=["float64"]))
    result = session.result(Case(parse_axes(case)))
    assert result.status == "pass", explain(result)


@pytest.mark.parametrize("case", ["dp2-tp2-pp1", "dp1-tp2-pp2"])
def test_bfloat16(case: str) -> None:
    session = Session(plan(steps=2, dtypes=["bfloat16"]))
    result = session.result(Case(parse_axes(case)))
    assert result.status == "pass", explain(result)


@pytest.mark.parametrize("case", ["dp2-tp1-pp2", "dp1-tp2-pp2"])
def test_gloo_comes_to_the_same_verdicts(case: str, session: Session) -> None:
    """And to the same tensors, but for the order in which it adds: to 1e-13 in float64."""
    own = replace(session.plan, backend=Backend("gloo", deadline=session.plan.backend.deadline))
    here, there = (
        s.result(Case(parse_axes(case))) for s in (session, Session(own, session.baselines))
    )
    assert there.status == here.status == "pass", explain(there)
    for a, b in zip(here.judged, there.judged, strict=True):
        assert [v.key for v in a.verdicts] == [v.key for v in b.verdicts]
        if a.run.dtype == "float64":
            for v, w in zip(a.verdicts, b.verdicts, strict=True):
                assert {v.status, w.status} <= {"exact", "ok"}
                if v.key.check in ("forward", "gradient"):
                    assert v.error + w.error < 1e-13


def test_the_hard_task_is_hard() -> None:
    """Clipping is active; some microbatches, and a dp rank, score nothing, and others unevenly."""
    from tests import bridge

    task = bridge.Task()
    (batch,) = bridge.batches(task, seed=0, steps=1)
    counts = [int((batch.part(8, i).targets != -100).sum()) for i in range(8)]
    assert counts[0] == 0
    assert len(set(counts[1:])) > 4
    session = Session(plan(steps=1, dtypes=["float64"]))
    case = Case(parse_axes("dp1-tp1-pp1"))
    session.baselines.prepare(case)
    expected = session.baselines.expected(session.plan.baselines[0], "float64", case)
    norms = {
        key.name.split()[0]: e.truth.max() for key, e in expected.items() if key.check == "norm"
    }
    assert norms["adamw"] > 2 * bridge.MAX_NORM["adamw"]
    assert norms["sgd"] < bridge.MAX_NORM["sgd"] / 2
    scored = batch.targets[batch.targets >= 0]
    assert set(range(257)) <= set(batch.tokens.flatten().tolist())
    assert len(set(scored.tolist())) > 150
    wte = next(e for key, e in expected.items() if key == ("gradient", "wte.weight"))
    assert wte.exact.nbytes > task.training(case).bucket_bytes
