"""What is kept for the time of a run is gone after it, however the run ended."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from parity.scratch import LOCK, PREFIX, Scratch, sweep

HOLDS = """
import os, signal
from parity.scratch import Scratch
kept = Scratch()
(kept.path / "large").write_text("traces")
print(kept.path, flush=True)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    sweep.cache_clear()
    return tmp_path


def test_it_is_gone_behind_a_with_when_closed_and_when_forgotten(temporary: Path) -> None:
    with Scratch() as path:
        assert path.parent == temporary
        (path / "inner").mkdir()
    closed = Scratch()
    closed.close()
    closed.close()
    forgotten = Scratch()
    assert forgotten.path.is_dir()
    del forgotten
    gc.collect()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_goes_when_the_next_begins(
    temporary: Path, ending: signal.Signals
) -> None:
    end = f"os.kill(os.getpid(), {int(ending)})"
    killed = subprocess.run(
        [sys.executable, "-c", HOLDS + end], capture_output=True, text=True, timeout=60, check=False
    )
    assert killed.returncode == -ending
    left = Path(killed.stdout.strip())
    assert (left / "large").exists()
    with Scratch() as mine:
        assert list(temporary.iterdir()) == [mine]


def test_what_is_in_use_stays(temporary: Path) -> None:
    command = [sys.executable, "-c", HOLDS + "input()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with Scratch():
            is_there = (theirs / "large").exists()
        other.communicate("\n", timeout=60)
    assert is_there
    assert not theirs.exists()


def test_what_is_not_ours_stays(temporary: Path) -> None:
    named = temporary / f"{PREFIX}of-somebody"
    named.mkdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    link = temporary / f"{PREFIX}link"
    link.symlink_to(elsewhere)
    with Scratch():
        assert named.exists()
        assert (elsewhere / LOCK).exists()


def test_a_fork_leaves_it_to_its_parent(temporary: Path) -> None:
    script = HOLDS + (
        "child = os.fork()\n"
        "if child == 0:\n"
        "    raise SystemExit\n"
        "os.waitpid(child, 0)\n"
        "print((kept.path / 'large').exists())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stdout.splitlines()[1:] == ["True"]
    assert list(temporary.iterdir()) == []
