"""Ranks for whoever wants only them: `parity exec` for a script, `parity.world` for a function."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import parity
from parity.cli import main

ROOT = Path(__file__).parents[3]
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist

dist.init_process_group("nccl")
x = torch.ones(3) * int(os.environ["RANK"])
dist.all_reduce(x)
pair = dist.new_group([0, 1], backend="gloo")
if dist.get_rank() < 2:
    dist.all_reduce(x, group=pair)
if dist.get_rank() == 0:
    print(sys.argv[1:], x.tolist(), dist.get_world_size(), os.environ["LOCAL_WORLD_SIZE"])
dist.destroy_process_group()
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """parity's main, without lasting effects on this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return lambda *words: main(words)


def run(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    python = [sys.executable, "-m", "parity", "exec", "--ranks", "3"]
    return subprocess.run(
        [*python, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_script_for_torchrun_runs_as_it_is(tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT, "script.py", "0", "--more")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['0', '--more'] [6.0, 6.0, 6.0] 3 3\n"


def test_a_script_ends_when_its_threads_have(tmp_path: Path) -> None:
    script = SCRIPT.partition("dist.all_reduce(x)\n")[0] + (
        "import threading, time\n"
        "def later():\n"
        "    time.sleep(0.3)\n"
        "    dist.all_reduce(x)\n"
        "    print(x.tolist())\n"
        "threading.Thread(target=later).start()\n"
    )
    done = run(tmp_path, script, "script.py", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[3.0, 3.0, 3.0]\n" * 3


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_of_ranks_stay_whole_and_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    script = """
import os
import torch.distributed as dist
dist.init_process_group()
class Pause:
    def __str__(self):
        dist.barrier()
        dist.barrier()
        return "line"
if dist.get_rank() == 0:
    print("one", Pause())
    os._exit(0)
dist.barrier()
print("another")
dist.barrier()
"""
    done = run(tmp_path, script, "script.py")
    assert sorted(done.stdout.splitlines()) == ["another", "another", "one line"]


def test_a_script_that_fails_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT, "script.py", "4")
    assert done.returncode == 3
    assert "ranks 0, 1, 2 raised: RuntimeError: the script ended with sys.exit(4)" in done.stderr


def test_an_early_read_is_seen_where_it_happens(tmp_path: Path) -> None:
    script = SCRIPT.replace(
        "dist.all_reduce(x)\n",
        "work = dist.all_reduce(x, async_op=True)\ny = x + 1\nwork.wait()\n",
        1,
    )
    done = run(tmp_path, script, "--watch", "script.py", "0")
    assert done.returncode == 3
    assert "its output [3] was read (aten.add.Tensor) at script.py:9" in done.stderr


def test_a_script_that_is_not_there(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("exec", "--ranks", "2", "nowhere.py") == 2
    said = capsys.readouterr().err
    assert said == "parity: nowhere.py: no such file; give the path of a Python script\n"


def test_a_world_runs_what_has_no_name() -> None:
    import torch.distributed as dist

    with parity.world(3) as w:
        assert w.run(lambda k: dist.get_rank() * k, 2) == [0, 2, 4]
        assert w.ledger == [[], [], []]


def test_a_world_keeps_a_ledger_of_the_latest_calls() -> None:
    def talk() -> None:
        import torch.distributed as dist
        from torch import ones

        for size in (1, 2, 3):
            dist.all_reduce(ones(size))

    with parity.world(2, ledger=2) as w:
        w.run(talk)
    for entries in w.ledger:
        assert [(e.op, e.group, e.bytes, e.dtype) for e in entries] == [
            ("all_reduce", "world", 8, "float32"),
            ("all_reduce", "world", 12, "float32"),
        ]
        assert "in talk" in entries[0].site


def test_a_world_has_a_rank() -> None:
    with pytest.raises(ValueError, match="a world has at least one rank, not 0"):
        parity.world(0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backend", "nccl"], "--backend nccl: it needs GPUs; use parity or gloo"),
        (
            ["--ledger", "--backend", "gloo"],
            "--ledger: gloo keeps none; leave --backend out, or choose parity",
        ),
    ],
)
def test_a_backend_that_does_not_fit_is_refused(
    command: Callable[..., int], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = str(ROOT / "matrix.yaml")
    assert command("run", matrix, "--device", "cpu", *words) == 2
    assert capsys.readouterr().err == f"parity: {said}\n"


def test_a_plain_script_needs_no_guard(tmp_path: Path) -> None:
    """Ranks do not run the main program again: it would start ranks in its turn."""
    (tmp_path / "plain.py").write_text(
        "import parity, torch.distributed as dist\n"
        "offset = 10\n"
        "print(parity.world(2).run(lambda: dist.get_rank() + offset))\n"
    )
    done = subprocess.run(
        [sys.executable, "plain.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("[10, 11]\n", "")
