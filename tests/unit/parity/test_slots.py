"""Slots between processes: who has them, who waits, and what is said. The processes are real ones,
and told what to do by pipes: nothing here depends on how long anything takes.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parity import launch, launcher, rank, slots
from parity.errors import UsageError
from parity.slots import INSIDE, UnsafeFolder
from tests.unit.parity import holder, targets

ROOT = Path(__file__).parents[3]
CORES = "core-0,core-1"
GPUS = "3,5,GPU-abc"


class Process:
    """One that holds slots (holder.py), or waits for them: it says so at once."""

    def __init__(self, *words: str) -> None:
        pipe = subprocess.PIPE
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.parity.holder", *words],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            bufsize=0,
            cwd=ROOT,
            # So that what it is called is known.
            env={**os.environ, "PYTEST_CURRENT_TEST": f"test of {words[0]}"},
        )

    @property
    def name(self) -> str:
        return f"pid {self.popen.pid} (test of {self.popen.args[3]})"  # type: ignore[index]

    def says(self) -> str:
        return self._line(self.popen.stdout)

    def complains(self) -> str:
        return self._line(self.popen.stderr)

    def _line(self, pipe: object) -> str:
        assert select.select([pipe], [], [], 60)[0], "it hangs"
        return pipe.readline().decode().strip()  # type: ignore[attr-defined]

    def goes_on(self) -> None:
        self.popen.stdin.write(b"\n")  # type: ignore[union-attr]

    def gives_back(self) -> None:
        self.goes_on()
        assert self.says() == "gave back"

    def ends(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            pipe.close()  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / f"parity-slots-{os.geteuid()}"


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*words: str) -> Process:
        started.append(Process(*words))
        return started[-1]

    yield start
    for one in started:
        one.ends()


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPUS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


Start = Callable[..., Process]


def test_who_finds_no_slots_says_who_has_them_and_gets_them_next(process: Start) -> None:
    first = process(CORES, "2")
    assert first.says() == "has core-0 core-1"
    second = process(CORES, "1")
    assert (
        second.complains() == f"parity: waits for 1 of 2 CPU cores, held by pid {first.popen.pid} "
        "(test of core-0,core-1)"
    )
    first.gives_back()
    assert second.says().startswith("has core-")  # the one that was free first


def test_small_launches_go_side_by_side(process: Start) -> None:
    assert process(CORES, "1").says() == "has core-0"
    assert process(CORES, "1").says() == "has core-1"


def test_processes_that_come_and_go_never_meet(process: Start, tmp_path: Path) -> None:
    crowd = [process("meet", str(tmp_path), "200") for _ in range(3)]
    assert [one.says() for one in crowd] == ["never met"] * 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_slots_of_a_process_that_is_killed_are_free(process: Start, how: signal.Signals) -> None:
    first = process(CORES, "2")
    assert first.says() == "has core-0 core-1"
    second = process(CORES, "2")
    assert first.name in second.complains()
    first.popen.send_signal(how)
    assert second.says() == "has core-0 core-1"


def test_whichever_gpu_becomes_free_is_taken(process: Start) -> None:
    a = process(GPUS, "1")
    assert a.says() == "has gpu-3"
    b = process(GPUS, "1")
    assert b.says() == "has gpu-5"
    both = process(GPUS, "2")
    said = both.complains()
    assert said == f"parity: waits for 2 of 3 GPUs, held by {a.name}; {b.name}"
    b.gives_back()  # and not the first one
    assert both.says() == "has gpu-5 gpu-GPU-abc"


def test_a_large_launch_is_not_overtaken_by_small_ones(process: Start) -> None:
    first = process(CORES, "1")
    assert first.says() == "has core-0"
    large = process(CORES, "2")
    assert large.complains() == f"parity: waits for 2 of 2 CPU cores, held by {first.name}"
    small = process(CORES, "1")
    said = small.complains()
    assert said == f"parity: waits for 1 of 2 CPU cores, held by {first.name}; {large.name}"
    first.gives_back()
    assert large.says() == "has core-0 core-1"
    large.gives_back()
    assert small.says().startswith("has core-")


def test_who_sees_other_gpus_does_not_stand_in_the_queue(process: Start) -> None:
    assert process("3,5", "2").says() == "has gpu-3 gpu-5"
    assert process("5,3", "1").complains().startswith("parity: waits for 1 of 2 GPUs")
    assert process("7", "1").says() == "has gpu-7"


def test_ctrl_c_while_waiting_leaves_nothing_behind(process: Start) -> None:
    first = process(CORES, "1")
    assert first.says() == "has core-0"
    second = process(CORES, "2")  # waits for a slot, and has another one
    assert second.complains()
    third = process(CORES, "2")  # waits in the queue
    assert third.complains()
    for one in (third, second):
        one.popen.send_signal(signal.SIGINT)
        assert one.says() == "interrupted 1"  # no file is open, and one thread is there
    assert process(CORES, "1").says() == "has core-1"


def test_threads_of_one_process_wait_for_each_other() -> None:
    which = holder.parse(CORES)
    took = threading.Event()

    def other() -> None:
        with slots.take(which, 1):
            took.set()

    with slots.take(which, 2):
        thread = threading.Thread(target=other)
        thread.start()
        assert not took.is_set()
    thread.join(60)
    assert took.is_set()


# Nothing but the process itself has them.


def test_neither_ranks_nor_the_fork_server_inherit_slots(folder: Path) -> None:
    for open_files in launch(open_of_rank_and_server, 1, str(folder)):
        assert open_files == ([], [])


def open_of_rank_and_server(folder: str) -> tuple[list[str], list[str]]:
    return holder.open_files(folder), holder.open_files(folder, os.getppid())


def test_what_a_process_has_started_does_not_keep_its_slots(process: Start) -> None:
    first = process(CORES, "2", "and starts a child")
    child = int(first.says())
    try:
        assert first.says() == "has core-0 core-1"
        first.ends()
        assert process(CORES, "2").says() == "has core-0 core-1"
    finally:
        os.kill(child, signal.SIGKILL)


# Launches.


def test_a_launch_has_its_cores_while_its_ranks_run_and_not_after(
    process: Start, folder: Path
) -> None:
    names = ",".join(slot.name for slot in slots.cores())
    world = len(slots.cores())
    taken = launch(who_has, world, names, str(folder))
    assert taken == [[os.getpid()] * world] * world
    assert process(names, str(world)).says().startswith("has ")


def who_has(names: str, folder: str) -> list[int]:
    """The process that has each of these; 0 for none."""
    found = []
    for slot in holder.parse(names):
        path = Path(folder) / slot.name
        fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            # Shared, so that ranks that ask at the same time do not find each other.
            fcntl.flock(fifo, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found.append(0)
        except BlockingIOError:
            found.append(int(Path(f"{path}.holder").read_text().split()[0]))
        os.close(fifo)
    return found


def test_a_rank_that_launches_does_not_wait_for_its_own_launch(tmp_path: Path) -> None:
    world = len(slots.cores())
    backend = launcher.Backend(deadline=40)
    total = sum(range(world))
    inner = [(i, world, total) for i in range(world)]
    found = launch(launch_again, world, str(tmp_path), backend=backend)
    assert found == [inner, *[[]] * (world - 1)]


def launch_again(runtime: str) -> list[object]:
    os.environ["XDG_RUNTIME_DIR"] = runtime  # the fork server may be older than this test
    return [] if dist.get_rank() else launch(targets.add_up, len(slots.cores()), 0)


def test_what_is_started_by_who_has_slots_takes_none(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv(INSIDE, "17")
    with slots.hold("cpu", 1) as inner:
        assert inner == {INSIDE: "17"}
        assert not folder.exists()
    monkeypatch.delenv(INSIDE)
    with slots.hold("cpu", 1) as outer:
        assert outer == {INSIDE: str(os.getpid())}
        assert folder.exists()


def test_waiting_for_slots_is_none_of_the_deadlines_time(monkeypatch: pytest.MonkeyPatch) -> None:
    late = [0.0]
    now = time.monotonic

    @contextmanager
    def hold(*words: object, **named: object) -> Iterator[Mapping[str, str]]:
        late[0] = 1000.0
        yield {}

    monkeypatch.setattr(slots, "hold", hold)
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now() + late[0])
    assert launch(targets.add_up, 1, 0) == [(0, 1, 0)]


def test_a_launch_says_what_it_needs_and_its_ranks_are_told_what_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    @contextmanager
    def hold(*words: object, **named: object) -> Iterator[Mapping[str, str]]:
        asked.append((words, named))
        yield {"CUDA_VISIBLE_DEVICES": "5,GPU-abc"}

    monkeypatch.setattr(slots, "hold", hold)
    groups = [(1,), (2,), (3,)]
    found = launcher.launch_groups(visible_and, 2, groups)
    assert found == [[("5,GPU-abc", number)] * 2 for number in (1, 2, 3)]
    assert asked == [(("cpu", 2, 3), {"alone": False})]


@pytest.mark.usefixtures("three_gpus")
def test_ranks_of_nccl_need_a_gpu_each() -> None:
    with pytest.raises(UsageError, match="4 ranks need a GPU each"):
        launch(targets.add_up, 4, 0, backend=launcher.Backend("nccl", "cuda"))


def visible_and(number: int) -> tuple[str, int]:
    return os.environ["CUDA_VISIBLE_DEVICES"], number


# GPUs.


@pytest.mark.parametrize(
    ("environ", "count", "entries"),
    [
        ({}, 2, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": GPUS}, 3, ["3", "5", "GPU-abc"]),
        ({"CUDA_VISIBLE_DEVICES": " 3, 5 "}, 2, ["3", "5"]),
        ({"CUDA_VISIBLE_DEVICES": "0,9,1"}, 1, ["0"]),  # CUDA stops at what is not there
        ({"CUDA_VISIBLE_DEVICES": ""}, 2, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 2, []),
        ({"CUDA_VISIBLE_DEVICES": "1,1"}, 2, ["1"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-abc/1/2"}, 1, ["MIG-GPU-abc/1/2"]),
        ({"HIP_VISIBLE_DEVICES": "1"}, 2, ["0", "1"]),  # means nothing to CUDA
    ],
)
def test_gpus_are_those_of_the_callers_list(
    environ: dict[str, str], count: int, entries: list[str]
) -> None:
    variable, found = slots.gpus(environ, count)
    assert variable == "CUDA_VISIBLE_DEVICES"
    assert [slot.entry for slot in found] == entries
    assert [slot.name for slot in found] == [f"gpu-{e.replace('/', '%2F')}" for e in entries]


@pytest.mark.parametrize(
    ("environ", "variable", "found"),
    [
        ({}, "HIP_VISIBLE_DEVICES", {"0": "gpu-0", "1": "gpu-1"}),
        ({"HIP_VISIBLE_DEVICES": "4,2"}, "HIP_VISIBLE_DEVICES", {"4": "gpu-4", "2": "gpu-2"}),
        ({"CUDA_VISIBLE_DEVICES": "4"}, "CUDA_VISIBLE_DEVICES", {"4": "gpu-4"}),
        ({"ROCR_VISIBLE_DEVICES": "6,7"}, "HIP_VISIBLE_DEVICES", {"0": "gpu-6", "1": "gpu-7"}),
        (
            {"ROCR_VISIBLE_DEVICES": "6,GPU-f", "HIP_VISIBLE_DEVICES": "1"},
            "HIP_VISIBLE_DEVICES",
            {"1": "gpu-GPU-f"},
        ),
    ],
)
def test_rocm_has_lists_of_its_own(
    environ: dict[str, str], variable: str, found: dict[str, str]
) -> None:
    named, listed = slots.gpus(environ, 2, is_rocm=True)
    assert (named, {slot.entry: slot.name for slot in listed}) == (variable, found)


@pytest.mark.usefixtures("three_gpus")
def test_ranks_see_the_gpus_that_were_taken_for_them(
    process: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert process("5", "1").says() == "has gpu-5"
    with slots.hold("cuda", 2, alone=True) as told:
        assert told == {INSIDE: str(os.getpid()), "CUDA_VISIBLE_DEVICES": "3,GPU-abc"}
        # In a rank, which sees these alone:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for key, value in told.items():
            monkeypatch.setenv(key, value)
        with slots.hold("cuda", 2, alone=True) as nested:
            assert nested == told


@pytest.mark.usefixtures("three_gpus")
def test_ranks_share_gpus_unless_they_need_them_alone() -> None:
    with slots.hold("cuda", 8) as told:
        assert told["CUDA_VISIBLE_DEVICES"] == GPUS
    with slots.hold("cuda", 1, 2) as told:
        assert told["CUDA_VISIBLE_DEVICES"] == "3,5"
    with pytest.raises(UsageError) as caught, slots.hold("cuda", 4, alone=True):
        pass
    assert str(caught.value) == (
        "4 ranks need a GPU each, and 3 are visible; use fewer ranks, or the backend parity, "
        "where ranks share them"
    )


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with (
        pytest.raises(UsageError, match="no GPU is visible; use the device cpu"),
        slots.hold("cuda", 1),
    ):
        pass


class Enough(Exception):
    """So much of a launch is to be seen, and no more."""


def test_groups_side_by_side_have_places_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seats: list[rank.Seat] = []

    def start(seat: rank.Seat, *_: object) -> None:
        seats.append(seat)
        if len(seats) == 4:
            raise Enough

    monkeypatch.setattr(launcher, "_start", start)
    monkeypatch.setattr(launcher, "_end", lambda _: None)
    with pytest.raises(Enough):
        launcher.launch_groups(targets.add_up, 2, [(1,), (2,)])
    assert [(seat.rank, seat.place) for seat in seats] == [(0, 0), (1, 1), (0, 2), (1, 3)]
    with monkeypatch.context() as patched:

        def gpu(place: int) -> None:
            assert place == 3
            raise Enough

        patched.setattr(rank, "_gpu", gpu)
        with pytest.raises(Enough):
            rank._call(seats[3]._replace(device="cuda"), targets.add_up, (1,))


@pytest.mark.usefixtures("three_gpus")
def test_a_rank_sits_down_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [rank._gpu(place).index for place in range(4)] == [0, 1, 2, 0]
    assert [device.index for device in chosen] == [0, 1, 2, 0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA was used while the function was imported"):
        rank._gpu(0)


# The folder.


def take_one() -> None:
    with slots.take(holder.parse(CORES), 1):
        pass


def test_the_folder_is_the_users_alone(folder: Path) -> None:
    take_one()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_without_a_runtime_folder_it_is_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nowhere in ("", str(tmp_path / "nowhere")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", nowhere)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        own = tmp_path / "temporary" / f"parity-slots-{os.geteuid()}"
        assert slots.folder_path() == own


def test_a_folder_of_somebody_else_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(mode=0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    folder.rename(folder.with_name(f"parity-slots-{me + 1}"))
    with pytest.raises(UnsafeFolder) as caught:
        take_one()
    assert str(caught.value) == (
        f"{folder.parent}/parity-slots-{me + 1}: belongs to somebody else (user {me})"
    )


def test_a_folder_that_others_may_use_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o750)
    with pytest.raises(UnsafeFolder) as caught:
        take_one()
    assert str(caught.value) == (
        f"{folder}: others may write or read it; remove it, or chmod 700 it"
    )


@pytest.mark.parametrize("is_link", [True, False])
def test_what_is_no_folder_is_refused(folder: Path, tmp_path: Path, is_link: bool) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere) if is_link else folder.touch()
    with pytest.raises(UnsafeFolder, match=f"{folder}: no folder for locks: Not a directory"):
        take_one()
    assert not list(elsewhere.iterdir())


def test_a_link_in_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    (folder / "core-0.holder").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        take_one()
    assert precious.read_text() == "as it was"
