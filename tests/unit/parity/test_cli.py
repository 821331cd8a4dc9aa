"""The command line from outside: exit codes, messages, and the report of small matrices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from parity.cli import main

Call = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[3]
TARGETS = "tests.unit.parity.targets"
MATRIX = f"""
target: {TARGETS}:candidate
objections: {TARGETS}:objections
baselines:
  plain: {TARGETS}:baseline
  one-rank: {{case: n1}}
axes: {{n: auto}}
max_world: 3
steps: 1
options: {{wrong: '', size: 3}}
deadline: 20
"""


@pytest.fixture
def parity(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Call:
    """Call the command line on a small matrix: (exit code, stdout, stderr)."""
    path = tmp_path / "matrix.yaml"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def call(*args: str, matrix: str = MATRIX) -> tuple[int, str, str]:
        path.write_text(matrix)
        command, *rest = args
        try:
            code = main([command, str(path), *rest])
        except SystemExit as stopped:  # argparse's own way out
            code = int(stopped.code or 0)
        return code, *capfd.readouterr()

    return call


def test_the_command_line_from_outside(tmp_path: Path) -> None:
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    done = subprocess.run(
        [sys.executable, "-m", "parity", "run", "--set", "wrong=double", "--case", "n[13]"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("  n=3  (diff=5.00e-04)  first divergence")


def test_all_passed_is_0_and_the_summary_keeps_its_shape(parity: Call) -> None:
    code, out, err = parity("run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["PASS", "n1"],
        ["PASS", "n2"],
        ["PASS", "n3"],
    ]
    assert lines[lines.index("=== Summary ===") :] == [
        "=== Summary ===",
        "PASS (3):",
        "  n=1  (diff=0.0)",
        "  n=2  (diff=0.0)",
        "  n=3  (diff=0.0)",
        "FAIL (0):",
    ]
    assert any(line.startswith("compared: 20 tensors, 250 elements, 6 steps") for line in lines)
    assert any(line.startswith("any relative error above these") for line in lines)


def test_a_parity_failure_is_1_and_says_where_and_what_to_type(parity: Call) -> None:
    code, out, _ = parity("run", "--set", "wrong=double")
    assert code == 1
    assert "FAIL n3   first divergence: forward of doubled" in out
    assert "\n  bug: got 2.001, want 2 at [" in out or "  bug: got " in out
    assert "in float64, against the baseline 'plain'" in out
    assert "it is the first tensor; of the 1 after it, 0 do not" in out
    assert "again: parity run " in out
    assert "matrix.yaml --case n3 -v" in out
    summary = out[out.index("=== Summary ===") :]
    assert "FAIL (1):\n  n=3  (diff=5.00e-04)  first divergence: forward of doubled" in summary


def test_copies_that_differ_fail_without_any_bound(parity: Call) -> None:
    code, out, _ = parity("run", "--set", "wrong=sum", "--case", "n3", "-v")
    assert code == 1
    assert "split: ranks 0 and 1 hold different copies (1 of 1 elements differ" in out
    assert "! 2 differ" in out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("raise", "rank 1 raised: RuntimeError: rank 1 does not like n=2"),
        ("kill", "rank 1 was killed by SIGKILL"),
        ("hang", "not done after 4 s, the deadline; rank 1 is at "),
    ],
)
def test_a_case_that_cannot_be_run_is_3_and_the_others_go_on(
    parity: Call, wrong: str, said: str
) -> None:
    code, out, _ = parity("run", "--set", f"wrong={wrong}", "--deadline", "4")
    assert code == 3
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["PASS", "ERROR", "PASS"]
    assert f"ERROR n2   could not be run\n  {said}" in out
    assert f"ERROR (1):\n  n=2  {said}" in out
    assert "rank 1" in out


def test_fail_fast_stops_after_the_first_that_did_not_pass(parity: Call) -> None:
    code, out, _ = parity("run", "--set", "wrong=raise", "--fail-fast")
    assert code == 3
    assert "n3" not in out[: out.index("=== Summary ===")]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--case", "n9"], "--case n9: it has 9 ranks, and there is room for 3 (--max-world)"),
        (["--case", "nn2"], "--case nn2: no such case (parity list shows them); did you mean n2?"),
        (["--max-world", "7", "--case", "n7"], "--case n7: 7 is an unlucky number"),
        (["--device", "cuda"], "--device cuda: no GPU is visible; use --device cpu"),
        (["--dtype", "float31"], "--dtype float31: unknown (known: float64, float32, bfloat16, "),
        (["--set", "wrogn=x"], "--set wrogn=x: write it as KEY=VALUE, with a key of: wrong, size"),
        (
            ["--json", "/nothing/r.json"],
            "--json /nothing/r.json: it must be a file in a folder that ex",
        ),
        (["--thresh", "0"], "argument --thresh: 0 must be more than 0"),
        (["--deadline", "-1"], "argument --deadline: -1 must be more than 0"),
        (["--set", "size=x"], "--set size=x: expected a whole number"),
        (["--max-world", "0"], "argument --max-world: 0 must be 1 or more"),
    ],
)
def test_a_users_mistake_is_2_with_one_message_and_no_traceback(
    parity: Call,
    args: list[str],
    said: str,
) -> None:
    code, out, err = parity("run", *args)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        (":candidate", ":candidat", 2, "targets:candidat: AttributeError: module"),
        (
            "tests.unit.parity.targets:candidate",
            "nowhere:x",
            2,
            "nowhere:x: ModuleNotFoundError: No module named",
        ),
        (":baseline", ":empty", 3, "the baseline 'plain' recorded nothing"),
        (":baseline", ":deaf_baseline", 3, "call parity.nudge(parameter, name, run.nudge)"),
        (":baseline", ":infinite_baseline", 3, "forward of x: it is not finite, and no yardstick"),
        (
            f"  plain: {TARGETS}:baseline",
            f"  plain: {TARGETS}:baseline\n  wide: {TARGETS}:wider_baseline",
            3,
            "forward of doubled is (24,) torch.float64 in the baseline 'plain', and (24, 1)",
        ),
        (
            f"  plain: {TARGETS}:baseline",
            f"  plain: {TARGETS}:baseline\n  other: {TARGETS}:deaf_baseline",
            3,
            "forward of doubled is recorded by the baseline 'plain' and not by 'other'",
        ),
        (":baseline", ":no_trace", 3, "returned NoneType, not a parity.Trace"),
        (":candidate", ":empty", 3, "the baseline 'one-rank' recorded nothing"),
        ("max_world: 3", "max_world: 3\nexclude: [{n: 1}, {n: 2}, {n: 3}]", 2, "nothing to run"),
        (
            "  plain:",
            "  #",
            3,
            "ERROR n1   could not be run\n  its only baseline is the case itself",
        ),
    ],
)
def test_what_makes_a_run_worthless_is_an_error(
    parity: Call,
    old: str,
    new: str,
    code: int,
    said: str,
) -> None:
    got, out, err = parity("run", matrix=MATRIX.replace(old, new))
    assert (
        got,
        said in err + out,
        'Traceback (most recent call last):\n  File "<frozen' in err,
    ) == (
        code,
        True,
        False,
    ), err


def test_a_candidate_that_records_nothing_fails(parity: Call) -> None:
    matrix = MATRIX.replace(":candidate", ":empty").replace("  one-rank: {case: n1}\n", "")
    code, out, _ = parity("run", matrix=matrix)
    assert code == 1
    assert "missing: the candidate did not record it" in out


def test_the_json_report_holds_what_the_text_says(parity: Call, tmp_path: Path) -> None:
    code, _, _ = parity("run", "--set", "wrong=double", "--json", str(tmp_path / "r.json"))
    report = json.loads((tmp_path / "r.json").read_text())
    assert (code, report["schema"], report["exit_code"]) == (1, 1, 1)
    assert [(c["id"], c["status"]) for c in report["cases"]] == [
        ("n1", "pass"),
        ("n2", "pass"),
        ("n3", "fail"),
    ]
    wrong = report["cases"][2]["wrong"]
    assert {w["tensor"] for w in wrong} == {"doubled"}
    assert {w["status"] for w in wrong} == {"bug", "drift"}
    check = report["cases"][2]["checks"]["forward"]
    assert check["error"] == pytest.approx(5e-4, rel=1)
    assert check["allowed"] < 1e-12
    assert report["compared"] == {"tensors": 20, "elements": 250}


def test_ctrl_c_ends_the_ranks_and_reports_what_was_finished(tmp_path: Path) -> None:
    """n1 passes, n2 hangs; the signal goes to the whole group, as a terminal sends it."""
    (tmp_path / "matrix.yaml").write_text(MATRIX.replace("wrong: ''", "wrong: hang"))
    running = subprocess.Popen(
        [sys.executable, "-u", "-m", "parity", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline().startswith("PASS  n1")
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "PASS (1):\n  n=1  (diff=0.0)" in out
    assert err == "parity: interrupted; all ranks are ended\n"


def test_what_a_green_run_does_not_say_is_said(parity: Call) -> None:
    code, out, _ = parity("run", "--dtype", "float32")
    assert code == 0
    assert "logic was not judged: float64 is not among the dtypes" in out


def test_a_baseline_that_rounding_moves_by_its_own_size_is_refused(parity: Call) -> None:
    """Dropout without a seed, a seed made from the nudge, chaos: it would excuse everything."""
    code, _, err = parity("run", matrix=MATRIX.replace(":baseline", ":chaotic_baseline"))
    assert code == 3
    assert "forward of doubled: it moves by " in err
    assert "so nothing can be held against it" in err


def test_list_shows_cases_and_skips_with_reasons(parity: Call) -> None:
    code, out, _ = parity("list", "--max-world", "7", "--case", "n[67]", "--case", "n1")
    assert code == 0
    assert out.splitlines() == [
        "n1               1 rank",
        "n6               6 ranks",
        "n7               skipped: 7 is an unlucky number",
        "2 cases, 1 skipped",
    ]


def test_an_override_is_shown_with_its_reason(parity: Call) -> None:
    code, out, _ = parity("run", "--set", "wrong=double", "--thresh", "0.01")
    assert code == 0
    assert "bounds set by hand:\n  *: relative error up to 0.01 (--thresh, set by the user)" in out


def test_explain_shows_the_neighbourhood_and_writes_the_report(
    parity: Call, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    code, out, _ = parity("explain", "--set", "wrong=double", "--json", str(report))
    assert code == 1
    assert "n1: pass\n" in out
    assert "culprit: forward of doubled" in out
    assert "it is 1.0005 times the baseline" in out
    assert "forward of doubled, by rank" in out
    culprits = [case["culprits"] for case in json.loads(report.read_text())["cases"]]
    assert [len(found) for found in culprits] == [0, 0, 1]
    assert culprits[2][0]["diagnoses"][0]["kind"] == "scaled"


def test_explain_says_why_a_case_could_not_be_run(parity: Call) -> None:
    code, out, _ = parity("explain", "--set", "wrong=kill", "--case", "n2", "--deadline", "10")
    assert code == 3
    assert "n2: error\nrank 1 was killed by SIGKILL" in out


@pytest.mark.parametrize("option", ["--steps=3", "--json=x", "--ledger", "--fail-fast", "-v"])
def test_soak_has_no_option_that_it_would_not_heed(parity: Call, option: str) -> None:
    code, _, err = parity("soak", option)
    assert code == 2
    assert "unrecognized arguments" in err


def test_a_closer_look_that_fails_is_said_and_the_verdict_stands(parity: Call) -> None:
    code, out, _ = parity("run", "--set", "wrong=shy", "--case", "n3")
    assert code == 1
    assert "FAIL n3   first divergence: forward of doubled" in out
    assert "a closer look at it failed: RanksFailed: " in out
    assert "RuntimeError: not while somebody looks" in out
    assert "agreed" not in out
