"""One script, on one process and on four ranks of torchrun; DTensors say how they lie."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from parity.offline.report import text
from tests.offline.ranks import compare

ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(__file__).parent / "program.py"


def start(words: Sequence[str], folder: Path, *modes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*words, str(PROGRAM), str(folder), *modes],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of one process (one/clean) and of four ranks (four/clean, factor, sketch)."""
    folder = tmp_path_factory.mktemp("recorded")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    runs = [
        start([sys.executable, *torchrun], folder / "four", "clean", "factor", "sketch"),
        start([sys.executable], folder / "one", "clean"),
    ]
    for run in runs:
        said, _ = run.communicate(timeout=120)
        assert run.returncode == 0, said
    return folder


def test_it_agrees(recorded: Path) -> None:
    report = compare(recorded / "one" / "clean", recorded / "four" / "clean")
    assert not report.wrong, text(report)
    assert report.steps == [0, 1, 2]
    # Of each of 12 parameters: gradient, itself, three states; and once what it was; and the loss.
    assert len(report.judged) == 3 * (12 * 5 + 1) + 12
    assert all(j.verdict.elements for j in report.judged)
    assert sum(j.verdict.copies for j in report.judged) > 100


def test_a_gradient_that_is_twice_what_it_should_be(recorded: Path) -> None:
    report = compare(recorded / "one" / "clean", recorded / "four" / "factor")
    said = text(report)
    assert "first divergence: step 0, gradient of 1.up.weight\n  differs: got " in said
    assert "\n  it is 2 (dp or tp) times the baseline: summed over dp once too often" in said
    first_step = {j.verdict.key.name for j in report.wrong if j.step == 0}
    assert first_step == {"1.up.weight", "exp_avg of 1.up.weight", "exp_avg_sq of 1.up.weight"}


def test_sketches_of_it_agree_too_and_are_small(recorded: Path) -> None:
    report = compare(recorded / "one" / "clean", recorded / "four" / "sketch")
    assert not report.wrong, text(report)
    assert compare(recorded / "four" / "sketch", recorded / "four" / "factor").wrong
