"""Random programs of calls bring, bit for bit, what a model on one process says, and leave nothing.

PARITY_PROGRAMS sets how many programs are run (default 2000).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from parity import Backend, RanksFailed, launch
from parity.backend import board
from parity.backend.group import CheckedGroup
from parity.backend.member import Place
from tests.backend.model import expected, fingerprint
from tests.backend.play import all_gather_single, play
from tests.backend.programs import Plan, decode, make_plan

PER_LAUNCH = 50
LAUNCHES = max(1, int(os.environ.get("PARITY_PROGRAMS", "2000")) // PER_LAUNCH)
DEADLINE = Backend(deadline=60)

# An integer is a call, 0 none: so programs shrink to the calls that matter.
a_program = st.lists(st.integers(0, 1 << 30), min_size=4, max_size=16).map(tuple)
programs = st.lists(a_program, min_size=PER_LAUNCH, max_size=PER_LAUNCH).map(tuple)


def differences(plan: Plan) -> list[str]:
    """The calls that brought something else than the model says, in words."""
    found = launch(play, plan.world, plan, backend=DEADLINE)
    return [
        f"program {number}, call {place}, rank {call.members[seat]}: {call}"
        for number, program in enumerate(plan.programs)
        for place, seed in enumerate(program)
        if (call := decode(seed, plan)) is not None
        for seat, result in enumerate(expected(call))
        if found[call.members[seat]][number].get(place) != result
    ]


@settings(
    max_examples=LAUNCHES,
    deadline=None,
    derandomize="PARITY_PROGRAMS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 1 << 20), world=st.integers(2, 5), programs=programs)
def test_any_program_of_calls_brings_what_one_process_says(
    seed: int, world: int, programs: tuple[tuple[int, ...], ...]
) -> None:
    plan = make_plan(seed, world, programs)
    try:
        wrong = differences(plan)
    except RanksFailed:
        calls = [decode(number, plan) for program in programs for number in program if number]
        note("\n".join(str(call) for call in calls[:20]))
        raise
    assert not wrong


def reduce_random(elements: int) -> bytes:
    x = random_of(dist.get_rank(), elements)
    dist.all_reduce(x)
    return fingerprint(x)


def random_of(rank: int, elements: int) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


@pytest.mark.parametrize("elements", [1000, 300_000])
@pytest.mark.parametrize("world", range(3, 9))
def test_a_sum_has_the_bits_of_rank_order_on_all_ranks_and_in_all_launches(
    world: int, elements: int
) -> None:
    total = random_of(0, elements)
    for rank in range(1, world):
        total = total + random_of(rank, elements)
    for _ in range(2):
        assert set(launch(reduce_random, world, elements, backend=DEADLINE)) == {fingerprint(total)}


def held() -> tuple[int, int, int, int, int]:
    """Bytes said about calls, which go in a ring; of the region, open files, threads, names of
    lanes.
    """
    world = Place.world
    assert world is not None
    first, slots = board._TABLE // 8, board._TABLE_SLOTS
    names = sum(1 for at in range(first, first + 4 * slots, 4) if world.board.words[at + 2])
    files = len(list(Path("/proc/self/fd").iterdir()))
    said = world.board._text_at
    return said, world.region.memory(), files, threading.active_count(), names


def many_calls(cycles: int) -> list[tuple[int, int, int, int, int]]:
    """Some hundred calls on groups that come and go, again and again; what is held after each."""
    rank, n, found = dist.get_rank(), dist.get_world_size(), []
    for _ in range(cycles):
        groups = [dist.new_group(list(range(n))), dist.new_group([0, 1])]
        mine = groups if rank < 2 else groups[:1]
        for step in range(100):
            for group in mine:
                _a_few_calls(group, step)
        for group in mine:
            dist.destroy_process_group(group)
        dist.barrier()
        found.append(held())
        dist.barrier()
    return found


def _a_few_calls(group: CheckedGroup, step: int) -> None:
    n, seat = dist.get_world_size(group), dist.get_rank(group)
    x, whole = torch.ones(1 + step % 7), torch.empty(n * (1 + step % 7))
    work = dist.all_reduce(x, group=group, async_op=True)
    dist.barrier(group)
    work.wait()
    all_gather_single(whole, x, group)
    to, back = (seat + 1) % n, (seat - 1) % n
    works = [
        dist.isend(x, group=group, group_dst=to, tag=step % 3),
        dist.irecv(whole[: len(x)], group=group, group_src=back, tag=step % 3),
    ]
    for work in works:
        work.wait()
    if step % 20 == 0:
        dist.all_reduce(x, group=group, async_op=True).get_future().wait()


def test_ten_thousand_calls_leave_no_more_than_a_few_do() -> None:
    found = launch(many_calls, 3, 25, backend=Backend(deadline=120))
    said = sum(rank[-1][0] - rank[2][0] for rank in found)
    slack = 64 * 4096  # lanes are used again in other parts; a lost one is 5 pages or more
    for rank in found:
        (_, memory, *others), (_, memory_now, *others_now) = rank[2], rank[-1]
        assert memory_now <= memory + said + slack
        assert others_now == others


def die_in_the_middle() -> None:
    x = torch.ones(100_000)
    dist.all_reduce(x)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    dist.all_reduce(x)


def left_on_the_machine() -> set[str]:
    """Shared memory and semaphores with names, and processes that hold a region of ours."""
    found = {str(path) for path in Path("/dev/shm").iterdir()}  # noqa: S108
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            maps = (process / "maps").read_text()
        except OSError:  # it has ended
            continue
        if "memfd:parity" in maps and parent in _forks():
            found.add(process.name)
    return found


def _forks() -> set[str]:
    """The children of this process: the fork server is one."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {pid for path in tasks for pid in path.read_text().split()}


def test_a_killed_rank_leaves_nothing_on_the_machine() -> None:
    before = left_on_the_machine()
    with pytest.raises(RanksFailed, match=r"rank 1 was killed by SIGKILL"):
        launch(die_in_the_middle, 3, backend=DEADLINE)
    assert left_on_the_machine() <= before


def short_of_parts() -> None:
    x, y = torch.ones(8), torch.zeros(8)
    dist.all_to_all_single(y, x)
    if dist.get_rank() == 1:
        dist.all_to_all_single(torch.zeros(4), torch.ones(4), [2, 2], [2, 2])


def short_of_lists() -> None:
    dist.all_to_all([torch.zeros(2)] * 2, [torch.ones(2)] * 2)


def test_every_member_has_a_part() -> None:
    """Two equal parts for four members would leave two of them what was there before."""
    said = "2 input splits; expected one for each of its 4 members"
    with pytest.raises(RanksFailed, match=f"ValueError: all_to_all_single on group world: {said}"):
        launch(short_of_parts, 4)
    with pytest.raises(RanksFailed, match="ValueError: all_to_all on group world: 2 inputs; expec"):
        launch(short_of_lists, 4)


def deadlock_in_a_helper() -> str:
    x = torch.ones(3)
    helper = threading.Thread(target=lambda: dist.recv(x, 1 - dist.get_rank()))
    helper.start()
    helper.join()
    return "fine"


def test_what_only_a_helper_thread_heard_fails_the_rank() -> None:
    with pytest.raises(RanksFailed, match="raised: Deadlock: ranks wait for each other for ever"):
        launch(deadlock_in_a_helper, 2)


def kinds_of_device() -> list[str]:
    return [device.type for device in dist.group.WORLD._device_types]


def test_a_group_says_which_devices_it_takes() -> None:
    """Asynchronous checkpoints ask for it, and loading from rank 0."""
    assert launch(kinds_of_device, 1)[0][0] == "cpu"
