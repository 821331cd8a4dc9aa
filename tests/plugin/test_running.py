"""Sessions that start ranks. Each costs seconds, so each is asked many things."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from tests.plugin.mlp import MLP
from tests.plugin.test_items import SAY
from tests.unit.parity.test_launch import is_alive, wait_until

EVERYTHING = (
    """
from multiprocessing import forkserver

STARTED = forkserver._forkserver._forkserver_pid is not None  # before torch is imported here
"""
    + MLP
    + """
@parity.matrix(tp=[1, 2, 9])
def test_right(case):
    check(case)


@parity.matrix(tp=[2])
def test_wrong(case):
    check(case, reduce=False)


@pytest.mark.xfail(raises=parity.Differs, strict=True)
@parity.matrix(tp=[2])
def test_known(case):
    check(case, reduce=False)


def broken(module):
    raise RuntimeError("no such layer")


@parity.matrix(tp=[2])
def test_broken(case):
    check(case, change=broken)


@parity.matrix(tp=[2])
def test_misused(case):
    case.check(plain, lambda full, mesh: MyMLP(full, mesh), [torch.randn(3, 8)], data={"dp": 0})


@parity.matrix(tp=[2])
def test_own(case):
    check(case)
    assert case["tp"] == 3


def numbers(run):
    trace = parity.Trace()
    trace.add("forward", "y", torch.zeros(4))
    return trace


@parity.matrix(tp=[1])
def test_unsound(case):
    case.compare(numbers, numbers)


@pytest.fixture(scope="session")
def drawn():
    return torch.rand(3)


@parity.matrix(tp=[1])
def test_drawn(case, drawn):
    pytest.skip(f"drew {torch.randint(10**9, (1,)).item()}")


def test_other():
    assert STARTED
"""
)
FIRST = """FAIL tp2   first divergence: forward of output
  split: ranks 0 and 1 hold different copies (24 of 24 elements differ, by up to """
COUNTS = (
    "10 cases: 2 passed, 1 differs, 3 could not be run, 1 failed otherwise, "
    "1 failed as expected, 2 skipped"
)


def block(result: pytest.RunResult, name: str) -> list[str]:
    """What is printed for one failure."""
    lines = result.outlines
    start = next(i for i, line in enumerate(lines) if line.strip("_ ") == name) + 1
    ends = (i for i, line in enumerate(lines) if i > start and line[:3] in ("___", "==="))
    return lines[start : next(ends)]


def section(result: pytest.RunResult) -> list[str]:
    lines = result.outlines
    start = next(i for i, line in enumerate(lines) if line.strip("= ") == "parity") + 1
    return lines[start : next(i for i in range(start, len(lines)) if lines[i][:3] == "===")]


def properties(path: Path) -> dict[str, dict[str, str]]:
    return {
        case.attrib["name"]: {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        for case in ET.parse(path).iter("testcase")  # noqa: S314 (our own)
    }


@pytest.fixture
def everything(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    pytester.makepyfile(test_it=EVERYTHING)
    pytester.makeini(
        """
        [pytest]
        addopts = --junitxml=junit.xml --parity-json=report.json
        parity_device = cpu
        """
    )
    return pytester


def check_everything(pytester: pytest.Pytester, result: pytest.RunResult) -> None:
    """What must be the same with workers and without."""
    result.assert_outcomes(passed=3, failed=5, skipped=2, xfailed=1)
    found = section(result)
    assert found[0] == COUNTS
    assert found[1].startswith("compared: ")
    assert found[2].startswith("largest relative error in float64: ")
    assert " in test_it.py::test_right[tp" in found[2]
    assert float(found[2].split()[5].rstrip(",")) < 1e-14
    assert found[3].startswith("largest rho (1 = the baseline's own rounding): ")
    assert found[4].startswith("any relative error above these would have been flagged: forward ")
    assert ", gradient " in found[4]
    assert found[5:7] == [
        "DIFFERS test_it.py::test_wrong[tp2]   first divergence: forward of output",
        "  again: pytest 'test_it.py::test_wrong[tp2]'",
    ]
    assert sorted(found[7:13:2]) == [
        "COULD NOT BE RUN test_it.py::test_broken[tp2]   "
        "ranks 0, 1 raised: RuntimeError: no such layer",
        "COULD NOT BE RUN test_it.py::test_misused[tp2]   "
        "data={'dp': 0}: the case has no axis 'dp' (it has tp)",
        "COULD NOT BE RUN test_it.py::test_unsound[tp1]   the baseline 'baseline' gives the same "
        "bits under nudge 1 as without: call parity.nudge(parameter, name, run.nudge) for each of "
        "its initial parameters",
    ]
    assert found[13] == "FAILED test_it.py::test_own[tp2]   assert 2 == 3"
    junit = properties(pytester.path / "junit.xml")
    right = junit["test_right[tp2]"]
    assert list(right) == [
        "parity_case",
        "parity_status",
        "parity_tensors",
        "parity_elements",
        "parity_error",
        "parity_rho",
    ]
    assert junit["test_wrong[tp2]"]["parity_first"] == "first divergence: forward of output"
    assert junit["test_wrong[tp2]"]["parity_again"] == "pytest 'test_it.py::test_wrong[tp2]'"
    assert junit["test_right[tp9]"] == {"parity_case": "tp9", "parity_status": "skipped"}
    assert junit["test_other"] == {}
    report = json.loads((pytester.path / "report.json").read_text())
    assert report["schema"] == 1
    assert (report["device"], report["backend"], report["seed"]) == ("cpu", "parity", 0)
    assert report["exit_code"] == 1
    items = {item["id"]: item for item in report["items"]}
    assert len(items) == 10
    wrong = items["test_it.py::test_wrong[tp2]"]
    assert (wrong["status"], wrong["case"]) == ("differs", "tp2")
    assert wrong["comparisons"][0]["culprits"][0]["diagnoses"][0]["kind"]
    assert items["test_it.py::test_broken[tp2]"]["comparisons"][0]["status"] == "error"
    assert items["test_it.py::test_right[tp9]"]["comparisons"] == []
    total = sum(int(p.get("parity_tensors", 0)) for p in junit.values())
    assert report["compared"]["tensors"] == total
    assert found[1] == f"compared: {total:,} tensors, {report['compared']['elements']:,} elements"
    # The same numbers are drawn in any process.
    torch.manual_seed(0)
    drawn = torch.randint(10**9, (1,)).item()
    assert items["test_it.py::test_drawn[tp1]"]["said"] == f"drew {drawn}"


def test_what_is_said_of_every_kind_of_end(
    everything: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester = everything
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "step.md"))
    (pytester.path / "step.md").write_text("# before\n")
    pytester.makeconftest(
        """
        import torch
        from parity.plugin.shared import SHARED

        START = torch.initial_seed()

        def pytest_sessionfinish(session):
            kept = session.config.stash[SHARED].kept
            print("\\nsessions", len(kept._sessions), "folder", kept.folder(b"probe"))
            print("seed restored:", torch.initial_seed() == START)
        """
    )
    result = pytester.runpytest_subprocess("-s", "-rs")
    check_everything(pytester, result)
    out = result.stdout.str()
    wrong = block(result, "test_wrong[tp2]")
    assert "\n".join(wrong).startswith(FIRST)
    assert wrong[4:6] == [
        "  culprit: activation of output of the model",
        "    module the model: what it takes in agrees, what it puts out does not",
    ]
    assert "a sum over tp (an all-reduce) is missing" in wrong[6]
    assert wrong[-1] == "  again: pytest 'test_it.py::test_wrong[tp2]'"
    broken = block(result, "test_broken[tp2]")
    assert broken[:2] == [
        "ERROR tp2   could not be run",
        "  ranks 0, 1 raised: RuntimeError: no such layer",
    ]
    assert broken[-1] == "  again: pytest 'test_it.py::test_broken[tp2]'"
    assert block(result, "test_misused[tp2]") == [
        "data={'dp': 0}: the case has no axis 'dp' (it has tp)",
        "  again: pytest 'test_it.py::test_misused[tp2]'",
    ]
    assert "E       assert 2 == 3" in block(result, "test_own[tp2]")
    assert "check.py" not in out.replace("subject.check.TestCase", "")  # no frame of ours
    # One baseline for all cases that are held against it; its folder is gone.
    kept = next(line for line in result.outlines if line.startswith("sessions "))
    assert kept.split()[1] == "2"
    assert not Path(kept.split()[3]).exists()
    assert "seed restored: True" in out
    step = (pytester.path / "step.md").read_text()
    assert step.startswith(f"# before\n## parity\n\n{COUNTS}\n")
    assert "| test\\_it.py::test\\_wrong\\[tp2\\] | differs |" in step
    errors = [line for line in result.outlines if line.startswith("::error")]
    assert len(errors) == 5
    lines = (pytester.path / "test_it.py").read_text().splitlines()
    line = lines.index("def test_wrong(case):")  # counted from 1 that of its decorator
    assert errors[0] == (
        f"::error file=test_it.py,line={line},title=differs%3A test_it.py%3A%3Atest_wrong[tp2]::"
        "first divergence: forward of output%0Aagain: pytest 'test_it.py::test_wrong[tp2]'"
    )


TWO_GPUS = """
import pytest

@pytest.hookimpl(trylast=True)
def pytest_configure_node(node):
    assert node.workerinput["parity_gpus"] == 0
    node.workerinput["parity_gpus"] = 2

@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    from parity.plugin.shared import SHARED

    shared = session.config.stash[SHARED]
    if hasattr(session.config, "workerinput") and shared.gpus == 2 and "kept" in vars(shared):
        pathlib.Path("kept").write_text(shared.kept.folder(b"probe"))
"""


def test_workers_find_the_same_and_the_controller_says_it(
    everything: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "parity.plugin,xdist.plugin")
    everything.makeconftest(SAY + TWO_GPUS)
    result = everything.runpytest_subprocess("-n2", "--dist=loadfile")
    check_everything(everything, result)
    assert (everything.path / "loaded-first").read_text() == "torch False, server False"
    assert (everything.path / "loaded-worker").read_text() == "torch True, server True"
    # Workers take the number of GPUs from the controller, and leave no folder.
    assert not Path((everything.path / "kept").read_text()).exists()
    assert "::error" not in result.stdout.str()


HANGS = (
    MLP
    + """
import os
import pathlib
import time


class Hangs(MyMLP):
    def forward(self, x):
        pathlib.Path(f"rank{dist.get_rank()}").write_text(str(os.getpid()))
        if dist.get_rank() == 1:
            time.sleep(600)
        return super().forward(x)


@parity.matrix(tp=[2])
{mark}
def test_hangs(case):
    case.check(plain, lambda full, mesh: Hangs(full, mesh["tp"]), [torch.randn(3, 8)])
"""
)


def test_the_deadline_comes_before_another_plugins(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytest_timeout")
    monkeypatch.setenv("PYTEST_PLUGINS", "parity.plugin,pytest_timeout")
    pytester.makepyfile(test_it=HANGS.replace("{mark}", "@pytest.mark.timeout(9)"))
    result = pytester.runpytest_subprocess("-p", "no:terminal", "--parity-json=report.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    report = json.loads((pytester.path / "report.json").read_text())
    (item,) = report["items"]
    assert item["status"] == "could not be run"
    error = item["comparisons"][0]["error"].splitlines()
    written = (pytester.path / "test_it.py").read_text().splitlines()
    line = written.index("            time.sleep(600)") + 1
    assert error[0].startswith("not done after ")
    assert f'rank 1 is at "{pytester.path}/test_it.py", line {line} in forward' in error[0]
    assert error[1].startswith("rank 0 waits in all_reduce, called at ")
    assert 1 < float(error[0].split()[3]) < 6.1


def test_ctrl_c_leaves_no_rank_behind(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=HANGS.replace("{mark}", ""))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=pytester.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    files = [pytester.path / f"rank{rank}" for rank in (0, 1)]
    until = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    ranks = [int(file.read_text()) for file in files]
    assert all(map(is_alive, ranks))
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, out
    assert "KeyboardInterrupt" in out
    assert wait_until(lambda: not any(map(is_alive, ranks)), 5)


MATRIX = """
target: programs:candidate
baselines: {plain: programs:baseline}
objections: programs:objections
axes: {tp: [1, 2, 3, 16]}
steps: 1
"""
PROGRAMS = """
import torch
import torch.distributed as dist
from parity import Trace, nudge


def objections(case, options):
    return ["8 columns do not divide by 3"] if case.axes["tp"] == 3 else []


def whole(run):
    torch.manual_seed(run.seed)
    w, x = (torch.randn(8, 8).to(getattr(torch, run.dtype)) for _ in range(2))
    nudge(w, "w", run.nudge)
    return w, x


def baseline(run):
    w, x = whole(run)
    trace = Trace()
    trace.add("forward", "y", x @ w)
    return trace


def candidate(run):
    w, x = whole(run)
    n = run.case.axes["tp"]
    y = x.chunk(n, 1)[run.rank] @ w.chunk(n)[run.rank]
    dist.all_reduce(y)
    trace = Trace()
    trace.add("forward", "y", y)
    return trace
"""


def test_a_matrix_file_is_tests_when_it_is_asked_for(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pytester.mkdir("tests")
    (folder / "test_it.py").write_text("def test_other(): pass")
    (pytester.path / "programs.py").write_text(PROGRAMS.replace("dist.all_reduce(y)", "pass"))
    path = pytester.path / "matrix.yaml"
    path.write_text(MATRIX)
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(passed=1)  # it merely lies there
    result = pytester.runpytest_subprocess("matrix.yaml", "-rs", "-v")
    result.assert_outcomes(passed=1, failed=1, skipped=2)
    result.stdout.fnmatch_lines(
        [
            "matrix.yaml::tp1 PASSED*",
            "matrix.yaml::tp2 FAILED*",
            "matrix.yaml::tp3 SKIPPED (8 columns do not divide by 3)*",
            "matrix.yaml::tp16 SKIPPED (it has 16 ranks, and there is room for 8)*",
            "FAIL tp2   first divergence: forward of y",
            "  in float64, against the baseline 'plain'",
            "  again: pytest matrix.yaml::tp2",
            "4 cases: 1 passed, 1 differs, 2 skipped",
        ]
    )
    pytester.makeini("[pytest]\ntestpaths = tests\nparity_matrix = matrix.yaml")
    result = pytester.runpytest_inprocess("--co", "-q")
    assert [line for line in result.outlines if "::" in line] == [
        "tests/test_it.py::test_other",
        *(f"matrix.yaml::tp{n}" for n in (1, 2, 3, 16)),
    ]
    result = pytester.runpytest_inprocess("--co", "-q", "tests")
    assert "matrix.yaml" not in result.stdout.str()
    result = pytester.runpytest_inprocess("--co", "-q", ".")
    assert result.stdout.str().count("matrix.yaml::tp2") == 1
    monkeypatch.setenv("PYTEST_PLUGINS", "parity.plugin,xdist.plugin")
    result = pytester.runpytest_subprocess("-n1", "-k", "tp16 or other")
    result.assert_outcomes(passed=1, skipped=1)
    monkeypatch.setenv("PYTEST_PLUGINS", "parity.plugin")
    path.write_text(MATRIX.replace("steps: 1", "steps: 0\nfast: true"))
    result = pytester.runpytest_inprocess("-q", "matrix.yaml")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    place = next(i for i, line in enumerate(result.outlines) if "ERROR collecting" in line)
    assert [
        line.partition("matrix.yaml")[2] for line in result.outlines[place + 1 : place + 3]
    ] == [
        ":6: steps: must be 1 or more, got 0",
        result.outlines[place + 2].partition("matrix.yaml")[2],
    ]
    assert ":7: fast: unknown key" in result.outlines[place + 2]
    assert "Traceback" not in result.stdout.str()
