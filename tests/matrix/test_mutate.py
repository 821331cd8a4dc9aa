"""Changes to calls are noticed where anybody looks, and said loudly where nobody does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from parity import mutate, mutation_report
from parity.backend import Settings
from parity.case import Case
from parity.cli import main
from parity.launcher import Backend
from parity.plan import Baseline, Plan, Wish

ROOT = Path(__file__).parents[2]
WEAK = "tests.matrix.weak"


def plan(target: str, ranks: int = 2) -> Plan:
    return Plan(
        target=f"{WEAK}:{target}",
        baselines=[Baseline("plain", f"{WEAK}:baseline", Case({"n": 1}))],
        cases=[Case({"n": ranks})],
        dtypes=["float64"],
        variants={},
        options={},
        steps=1,
        backend=Backend(deadline=60, settings=Settings(order="place")),
    )


def fates(target: str, kinds: Sequence[str] = (), only: Sequence[str] = ()) -> mutate.Report:
    report, is_whole = mutate.run(
        plan(target), mutate.Choice(only, kinds), "parity mutate", lambda *_: None
    )
    assert is_whole
    return report


def verdicts(report: mutate.Report, function: str) -> dict[str, str]:
    return {
        str(fate.mutant): fate.verdict
        for fate in report.fates
        if fate.mutant.site.trail[0].endswith(f"in {function}")
    }


@pytest.fixture(scope="module")
def weak() -> mutate.Report:
    return fates("candidate")


def test_what_is_needed_is_missed(weak: mutate.Report) -> None:
    found = verdicts(weak, "needed")
    assert set(found.values()) == {"killed"}
    assert set(found) == {
        "drop", "double", "op MAX", "op AVG", "scale by 0.5", "scale by 2", "one-rank rank 0",
        "one-rank rank 1",
    }  # fmt: skip


def test_what_changes_no_bit_is_equivalent_by_measure(weak: mutate.Report) -> None:
    assert verdicts(weak, "redundant") == {
        "drop": "equivalent",
        "double": "equivalent",
        "op SUM": "killed",
        "op AVG": "equivalent",
        "scale by 0.5": "killed",
        "scale by 2": "killed",
        "one-rank rank 0": "equivalent",
        "one-rank rank 1": "equivalent",
    }
    assert all(f.tally.calls for f in weak.fates)
    assert all((f.verdict == "equivalent") == (f.tally.changed == 0) for f in weak.fates)


def test_what_nobody_looks_at_survives_and_is_said(weak: mutate.Report) -> None:
    found = verdicts(weak, "unseen")
    assert set(found.values()) == {"survived"}
    assert weak.exit_code == 1
    text = mutation_report.text(weak)
    assert "SURVIVED (8):" in text
    assert "weak.py:" in text
    assert "double" in text
    assert "2 results changed, by up to 1 of their size, and every check passed" in text
    document = json.loads(json.dumps(mutation_report.as_json(weak), allow_nan=False))
    assert document["survived"] == 8
    assert document["exit_code"] == 1
    assert sum(document[verdict] for verdict in mutate.LETTERS) == len(document["mutants"]) == 40


def test_where_any_shared_value_will_do_is_tried_and_not_supposed(weak: mutate.Report) -> None:
    found = verdicts(weak, "shared")
    killed = {"drop", "one-rank rank 0"}  # rank 1 has the largest element itself
    assert {mutant for mutant, verdict in found.items() if verdict == "killed"} == killed
    assert {found[f"op {op}"] for op in ("SUM", "AVG")} == {"invariant"}
    assert {found[f"scale by {factor}"] for factor in ("0.5", "2")} == {"invariant"}
    assert found["double"] == "equivalent"
    assert set(verdicts(weak, "added").values()) == {"killed"}
    assert "4 invariant" in mutation_report.text(weak)


def test_a_rank_that_dies_of_a_change_has_noticed_it() -> None:
    report = fates("hasty", kinds=["drop"])
    (fate,) = report.fates
    assert (fate.verdict, fate.by) == ("killed", "AssertionError")
    assert report.exit_code == 0


def test_red_without_a_changed_bit_is_not_decided() -> None:
    report = fates("moody", kinds=["scale"])
    assert {fate.verdict for fate in report.fates} == {"error"}
    assert "no result was changed, and yet forward of sum" in report.fates[0].reason
    assert report.exit_code == 3


def test_a_case_that_is_red_as_it_is() -> None:
    with pytest.raises(mutate.Unclean, match=r"n2 is red as it is(.|\n)*forward of sum: bug: got"):
        fates("wrong")


def test_ranks_that_are_silent() -> None:
    with pytest.raises(mutate.UsageError, match="say nothing to each other"):
        fates("silent")


@pytest.fixture(scope="module")
def bench() -> mutate.Bench:
    wish = Wish(cases=["dp1-tp2-pp1"], device="cpu", steps=1)
    return mutate.Bench(mutate.plan_for(ROOT / "matrix.yaml", wish))


def test_heiretsu_over_tp(bench: mutate.Bench) -> None:
    """Every fourth mutant, for the time they take."""
    ledgers = bench.clean()
    chosen = mutate.Choice().of(mutate.sites(ledgers), ledgers)
    assert len(chosen) > 40
    found = [bench.fate(mutant) for mutant in chosen[::4]]
    # Any shift that all ranks share does for the softmax: their largest logit is only the safest.
    free = [fate for fate in found if "in all_max <" in " < ".join(fate.mutant.site.trail)]
    assert {fate.verdict for fate in found if fate not in free} == {"killed"}
    assert {fate.verdict for fate in free} & {"survived", "killed"}


def matrix(folder: Path, target: str) -> Path:
    path = folder / "matrix.yaml"
    path.write_text(
        f"target: {WEAK}:{target}\nbaselines: {{plain: {WEAK}:baseline}}\naxes: {{n: [1, 2, 3]}}\n"
    )
    return path


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = matrix(tmp_path, "candidate"), tmp_path / "found.json"
    words = ["mutate", str(path), "--device", "cpu", "--case", "n3", "--only", "*in needed*"]
    assert main([*words, "--kind", "drop", "--kind", "op", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "killed by: forward 3" in out
    assert (
        "n3, float64, 2 steps: 3 mutants: 3 killed, 0 equivalent, 0 survived; score 100.0%" in out
    )
    assert [m["verdict"] for m in json.loads(file.read_text())["mutants"]] == ["killed"] * 3
    assert main([*words[:-1], "*in unseen*", "--kind", "drop"]) == 1
    out = capsys.readouterr().out
    assert "SURVIVED (1):" in out
    assert "again: parity mutate" in out


def test_mistakes_are_said_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = matrix(tmp_path, "candidate")
    words = ["mutate", str(path), "--device", "cpu", "--kind", "lose", "--json", str(tmp_path)]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "--kind lose: unknown (known: drop, double," in err
    assert "it must be a file in a folder that exists" in err
    assert "--case: one case at a time, and not 3 (n1, n2, n3, ...)" in err
    assert main(["mutate", str(path), "--device", "cpu", "--case", "n2", "--only", "moon"]) == 2
    assert "--only moon: no such site (known: all_reduce on world, " in capsys.readouterr().err


def test_a_red_case_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = matrix(tmp_path, "wrong")
    assert main(["mutate", str(path), "--device", "cpu", "--case", "n2"]) == 1
    assert "parity: n2 is red as it is" in capsys.readouterr().err
