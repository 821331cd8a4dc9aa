"""A soak draws what the matrix allows, stays silent for right code, and shrinks what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity.case import Case
from parity.errors import UsageError
from parity.matrix_file import Range
from parity.plan import Plan, Wish
from parity.prepare import prepare_soak
from parity.soak import Draw, Soaked, soak, text
from tests.unit.parity.test_cli import MATRIX, Call, parity

__all__ = ["parity"]  # the fixture

SOAK = MATRIX + "soak: {size: {from: 3, to: 40}, wrong: ['', %s]}\n"


def test_right_code_stays_green(parity: Call) -> None:
    code, out, err = parity("soak", "--count", "12", "--seed", "3", matrix=SOAK % "''")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert " configurations (" in first
    assert first.endswith(" tensors: no false alarm")
    assert second.startswith("closest to its bound: ")


def test_a_failure_is_shrunk_to_the_smallest_draw(parity: Call, tmp_path: Path) -> None:
    code, out, _ = parity("soak", "--count", "100", matrix=SOAK % "large")
    assert code == 1
    assert out.splitlines()[-2:] == [
        "FAIL  n2  forward of doubled",
        f"  again: parity run {tmp_path}/matrix.yaml --case n2 --dtype float64 --steps 1 --seed 0 "
        "--set wrong=large --set size=5",
    ]
    words = out.splitlines()[-1].split()[4:]
    code, out, _ = parity("run", *words, matrix=SOAK % "large")
    assert code == 1  # as it was said


def test_only_what_the_target_allows_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_text(MATRIX + "soak: {size: {from: 0, to: 1}}\n")
    plan, space = prepare_soak(path, Wish())
    draws: list[int] = []

    def objections(case: Case, options: object) -> list[str]:
        draws.append(case.world)
        return ["never"]

    with pytest.raises(UsageError, match="objects to whatever is drawn; widen it"):
        soak(plan, space._replace(objections=objections), 3, 0, lambda seen: None)
    assert draws
    assert isinstance(space.choices["size"], Range)
    assert space.objections(Case({"n": 1}), {"size": 0}) == ["nothing has no size"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "nothing to draw from; add soak: with options and what they may be, as in soak: {"),
        ("soak: {colour: [red]}", "options: known are wrong, size"),
    ],
)
def test_a_soak_that_cannot_be(parity: Call, lines: str, said: str) -> None:
    code, _, err = parity("soak", matrix=f"{MATRIX}{lines}\n")
    assert code == 2
    assert said in err


def test_what_is_said_at_the_end() -> None:
    seen = Soaked(draws=2, tensors=1500, worst=0.123)
    seen.counts.update({"float64": 3, "float32": 2})
    seen.topologies.update({"dp1", "dp2"})
    seen.refused["it is not finite"] += 1
    assert text(seen) == (
        "5 configurations (2 in float32, 3 in float64) of 2 topologies and 2 models and data, "
        "1,500 tensors: no false alarm\n"
        "closest to its bound: 0.12 of what it was allowed\n"
        "1 more draws had no sound baseline, such as: it is not finite"
    )


def test_a_draw_can_be_typed_again() -> None:
    plan = Plan("t:f", [], [], ["float64"], {}, {"tied": True, "batch": 3}, steps=2, seed=7)
    assert Draw(plan, [Case({"dp": 2})]).command("m.yaml") == (
        "parity run m.yaml --case dp2 --dtype float64 --steps 2 --seed 7 --set tied=true "
        "--set batch=3"
    )
