"""Ranks that return, raise, die and hang: each is reported by name, and none is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from parity import Backend, RanksFailed, launch, world
from parity.launcher import _read_stack
from tests.unit.parity import targets

ROOT = Path(__file__).parents[3]


def is_alive(pid: int) -> bool:
    """Whether a process runs. A zombie is dead: its parent has only not asked yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        os.sched_yield()
    return bool(condition())


@pytest.mark.parametrize("world", [1, 3])
def test_every_rank_returns_in_order(world: int) -> None:
    total = sum(5 + rank for rank in range(world))
    assert launch(targets.add_up, world, 5) == [(rank, world, total) for rank in range(world)]


def test_ranks_are_fresh_single_threaded_batch_processes() -> None:
    first, second = launch(targets.environment, 2), launch(targets.environment, 2)
    pids = {pid for pid, *_ in first + second}
    assert len(pids) == 4
    assert os.getpid() not in pids
    assert all((omp, policy, n) == ("1", os.SCHED_BATCH, 1) for _, omp, policy, n in first)


def test_a_rank_that_raises_is_named_with_its_traceback_and_output() -> None:
    with pytest.raises(RanksFailed) as caught:
        launch(targets.raise_on_1, 3)
    text = str(caught.value)
    assert text.startswith("rank 1 raised: ZeroDivisionError: nothing to divide by\n")
    assert "in raise_on_1" in text
    assert "the last words of rank 1" in text
    assert caught.value.ranks == (1,)


def test_a_rank_that_is_killed_is_named_with_its_signal() -> None:
    with pytest.raises(RanksFailed, match=r"^rank 1 was killed by SIGKILL\n") as caught:
        launch(targets.die_on_1, 3)
    assert caught.value.ranks == (1,)


def test_a_rank_that_exits_is_named_with_its_code() -> None:
    with pytest.raises(RanksFailed, match=r"^rank 0 ended with exit code 7 and without a result"):
        launch(targets.exit_on_0, 2)


def test_a_rank_that_hangs_is_named_with_the_place_where_it_is() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        launch(targets.hang_on_1, 2, backend=Backend(deadline=6))
    assert time.monotonic() - start < 60  # the deadline, not the group's own timeout
    text = str(caught.value)
    start, *waiting = text.splitlines()
    assert start.startswith("not done after 6 s, the deadline; rank 1 is at ")
    assert start.endswith("in wait_for_ever")
    assert "targets.py" in start
    assert waiting[0].startswith("rank 0 waits in all_reduce, called at ")
    assert waiting[0].endswith("in hang_on_1")
    assert caught.value.ranks == (1,)


@pytest.mark.parametrize("fail", [True, False])
def test_what_a_rank_has_started_ends_with_it(tmp_path: Path, fail: bool) -> None:
    with pytest.raises(RanksFailed) if fail else nullcontext():
        launch(targets.leave_a_child, 1, str(tmp_path), fail)
    child = int((tmp_path / "child").read_text())
    assert wait_until(lambda: not is_alive(child))


def test_a_result_that_cannot_be_pickled_is_that_ranks_failure() -> None:
    with pytest.raises(RanksFailed, match="rank 0 raised: "):
        launch(targets.unpicklable, 1)


def test_the_next_launch_works_after_each_kind_of_failure() -> None:
    for bad in (targets.raise_on_1, targets.die_on_1):
        with pytest.raises(RanksFailed):
            launch(bad, 2)
        assert launch(targets.add_up, 2, 0) == [(0, 2, 1), (1, 2, 1)]


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name
)
def test_no_rank_outlives_its_parent(how: signal.Signals, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from parity import launch\n"
        "from tests.unit.parity.targets import write_pid_and_hang\n"
        "if __name__ == '__main__':\n"
        "    launch(write_pid_and_hang, 2, sys.argv[1])\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    files = [tmp_path / "0", tmp_path / "1"]
    assert wait_until(lambda: all(file.exists() for file in files))
    pids = [int(file.read_text()) for file in files]
    parent.send_signal(how)
    parent.wait(20)
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from parity import launch\n"
        "from tests.unit.parity.targets import add_up\n"
        "launch(add_up, 2, 0)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    line = (
        "parity: the rank that is to run add_up loads your script first, and came to the call that "
        'starts ranks there: put that call under `if __name__ == "__main__":`'
    )
    assert set(done.stderr.split("Traceback")[0].splitlines()) == {line}
    assert "rank 0 ended with exit code 1 and without a result" in done.stderr
    assert done.returncode == 1


def test_two_threads_may_launch_ranks() -> None:
    """Each puts the main program aside meanwhile: it must be there in the end."""
    main = sys.modules["__main__"]
    with world(1) as w:

        def several() -> None:
            for _ in range(4):
                w.run(int)

        threads = [threading.Thread(target=several) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sys.modules["__main__"] is main


def test_processes_of_a_rank_start_as_elsewhere() -> None:
    assert launch(multiprocessing.get_start_method, 1) == [multiprocessing.get_start_method()]


def test_a_stack_is_read_to_its_end(tmp_path: Path) -> None:
    """On a busy machine the rank is interrupted in the middle of its dump."""
    path = tmp_path / "stack.txt"
    path.write_text("Thread 1:\n")

    def write_on() -> None:
        time.sleep(0.03)
        with path.open("a") as file:
            file.write('  File "user.py", line 3 in forward\n')

    writer = threading.Thread(target=write_on)
    writer.start()
    text = _read_stack(path, time.monotonic() + 10)
    writer.join()
    assert text.endswith("in forward\n")
    began = time.monotonic()
    assert _read_stack(tmp_path / "none", began + 0.1) == ""
    assert time.monotonic() < began + 5
