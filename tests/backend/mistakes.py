"""Mistakes that ranks make with each other, each planted once: what do they hear, and how soon?

A mistake is a function that every rank runs. `expected` is the error, and a piece of its text, that
at least the ranks in `hears` must get; `None` says that the program is right, and must stay silent.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from parity.errors import Deadlock, Lost, Mismatch, ParityError, Race


@dataclass(frozen=True)
class Mistake:
    program: Callable[[int], None]
    world: int
    expected: type[ParityError] | None
    text: str
    hears: tuple[int, ...]
    dies: tuple[int, ...] = ()
    watch: bool = False

    @property
    def name(self) -> str:
        return self.program.__name__


MISTAKES: list[Mistake] = []


def planted(
    expected: type[ParityError] | None,
    text: str = "",
    *,
    world: int = 2,
    hears: tuple[int, ...] | None = None,
    dies: tuple[int, ...] = (),
    watch: bool = False,
) -> Callable[[Callable[[int], None]], Callable[[int], None]]:
    def add(program: Callable[[int], None]) -> Callable[[int], None]:
        who = tuple(r for r in range(world) if r not in dies) if hears is None else hears
        MISTAKES.append(Mistake(program, world, expected, text, who, dies, watch))
        return program

    return add


def numbers(count: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(count, dtype=dtype)


@planted(Mismatch, "rank 1 calls broadcast (root 0) of float32[8] on group world")
def another_operation(rank: int) -> None:
    dist.broadcast(numbers(), 0) if rank == 1 else dist.all_reduce(numbers())


@planted(Mismatch, "rank 1 calls all_reduce (SUM) of float32[9]")
def another_size(rank: int) -> None:
    dist.all_reduce(numbers(8 + rank))


@planted(Mismatch, "rank 1 calls all_reduce (SUM) of float32[2, 4]")
def another_shape(rank: int) -> None:
    dist.all_reduce(numbers().view((4, 2) if rank == 0 else (2, 4)))


@planted(Mismatch, "rank 1 calls all_reduce (SUM) of int32[8]")
def another_type(rank: int) -> None:
    dist.all_reduce(numbers(dtype=torch.int32 if rank == 1 else torch.float32))


@planted(Mismatch, "rank 1 calls all_reduce (MAX)")
def another_reduction(rank: int) -> None:
    dist.all_reduce(numbers(), dist.ReduceOp.MAX if rank == 1 else dist.ReduceOp.SUM)


@planted(Mismatch, "rank 1 calls broadcast (root 1)")
def another_root(rank: int) -> None:
    dist.broadcast(numbers(), rank)


@planted(Mismatch, "call no. 2")
def another_order(rank: int) -> None:
    for count in (8, 4) if rank == 0 else (4, 8):
        dist.all_reduce(numbers(count))


@planted(Mismatch, "all_to_all_single of [4] split into [1, 3]")
def splits_that_do_not_fit(rank: int) -> None:
    dist.all_to_all_single(numbers(4), numbers(4), [2, 2], [1, 3] if rank else [2, 2])


@planted(Mismatch, "rank 1 calls recv from rank 0 of float32[9]")
def receiving_more_than_is_sent(rank: int) -> None:
    dist.recv(numbers(9), 0) if rank else dist.send(numbers(8), 1)


@planted(Lost, "waits for rank 1 in all_reduce (SUM) of float32[8] on group world", hears=(0,))
def a_member_that_never_calls(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(numbers())


@planted(Lost, "which has ended", hears=(0,))
def one_call_too_many(rank: int) -> None:
    for _ in range(2 - rank):
        dist.all_reduce(numbers())


@planted(Lost, "waits for rank 1 in send to rank 1 of float32[8]", hears=(0,))
def a_send_that_nobody_receives(rank: int) -> None:
    if rank == 0:
        dist.send(numbers(), 1)


@planted(Lost, "which has died", world=3, dies=(1,))
def a_rank_that_dies(rank: int) -> None:
    dist.barrier()
    if rank == 1:
        os._exit(9)
    dist.all_reduce(numbers())


@planted(Deadlock, "rank 1 waits for rank 0 in send to rank 0")
def both_send_first(rank: int) -> None:
    dist.send(numbers(), 1 - rank)
    dist.recv(numbers(), 1 - rank)


@planted(Deadlock, "rank 2 waits for rank 1 in recv from rank 1", world=3)
def a_ring_of_receives(rank: int) -> None:
    dist.recv(numbers(), (rank - 1) % 3)
    dist.send(numbers(), (rank + 1) % 3)


@planted(Deadlock, "in recv from rank 0, tag 7 of float32[8]")
def a_tag_that_nobody_uses(rank: int) -> None:
    if rank == 0:
        dist.send(numbers(), 1)
    else:
        dist.recv(numbers(), 0, tag=7)
        dist.recv(numbers(), 0)


@planted(Deadlock, "ranks wait for each other for ever")
def two_groups_in_opposite_order(rank: int) -> None:
    groups = [dist.new_group([0, 1], group_desc=name) for name in ("first", "second")]
    for group in groups if rank == 0 else groups[::-1]:
        dist.all_reduce(numbers(), group=group)


@planted(Deadlock, "rank 1 waits for rank 0 in recv from rank 0")
def a_collective_against_a_message(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(numbers())
        dist.send(numbers(), 1)
    else:
        dist.recv(numbers(), 0)
        dist.all_reduce(numbers())


@planted(Deadlock, "ranks wait for each other for ever", world=4)
def a_cycle_across_groups(rank: int) -> None:
    rows = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    columns = [dist.new_group(pair) for pair in ([0, 2], [1, 3])]
    own = [rows[rank // 2], columns[rank % 2]]
    for group in own if rank in (0, 3) else own[::-1]:
        dist.all_reduce(numbers(), group=group)


@planted(Deadlock, "rank 1 waits for rank 0 in recv from rank 0", hears=(1,))  # 0: from DDP
def a_future_that_the_main_thread_waits_for(rank: int) -> None:
    net = DistributedDataParallel(torch.nn.Linear(8, 1))
    if rank == 0:  # the reducer waits in C++, and a thread of the backend keeps its future
        net(numbers()).backward()
    else:
        dist.recv(numbers(), 0)


@planted(Deadlock, "rank 1 waits for rank 0 in recv from rank 0")
def a_thread_that_the_main_thread_waits_for(rank: int) -> None:
    if rank == 0:
        failed: list[ParityError] = []
        helper = threading.Thread(
            target=heard_by, args=(failed, lambda: dist.all_reduce(numbers()))
        )
        helper.start()
        helper.join()
        raise failed[0]
    dist.recv(numbers(), 0)


@planted(Deadlock, "ranks wait for each other for ever")
def a_call_of_a_thread_that_python_does_not_know(rank: int) -> None:
    failed: list[ParityError] = []
    is_over = _thread.allocate_lock()
    is_over.acquire()

    def call() -> None:
        heard_by(failed, lambda: dist.recv(numbers(), 1 - rank))
        is_over.release()

    _thread.start_new_thread(call, ())
    is_over.acquire()
    raise failed[0]


@planted(Race, "input [8] was written to before the wait", hears=(0,))
def writing_what_is_being_sent(rank: int) -> None:
    x = numbers()
    work = dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)
    if rank == 0:
        x += 1
    assert work is not None
    work.wait()


@planted(Race, "output [8] was written to before the wait")
def writing_what_is_being_reduced(rank: int) -> None:
    x = numbers()
    work = dist.all_reduce(x, async_op=True)
    x.zero_()
    work.wait()


@planted(Race, "was freed, resized or moved before the wait")
def freeing_what_is_being_sent(rank: int) -> None:
    x = numbers()
    work = dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)
    x.untyped_storage().resize_(0)
    assert work is not None
    work.wait()


@planted(Race, "nobody waited for all_reduce (SUM) of float32[8] on group world")
def never_waiting(rank: int) -> None:
    dist.all_reduce(numbers(), async_op=True)


@planted(Race, "output [8] was read (aten.mul.Tensor) at", watch=True)
def reading_too_early(rank: int) -> None:
    x = numbers()
    work = dist.all_reduce(x, async_op=True)
    y = x * 2
    work.wait()
    assert y.isfinite().all()


@planted(None)
def a_slow_rank(rank: int) -> None:
    if rank == 1:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            numbers().sum()
    dist.all_reduce(numbers())


@planted(None)
def a_slow_rank_under_ddp(rank: int) -> None:
    net = DistributedDataParallel(torch.nn.Linear(8, 1))
    if rank == 1:
        time.sleep(1.5)  # what is slow
    net(numbers()).backward()


@planted(None)
def a_slow_thread_that_wakes_the_main_one(rank: int) -> None:
    first, second = (dist.new_group([0, 1], group_desc=name) for name in ("first", "second"))
    if rank == 0:
        dist.all_reduce(numbers(), group=first)
        dist.all_reduce(numbers(), group=second)
        return
    is_time = threading.Event()
    timer = threading.Thread(target=lambda: (time.sleep(1.5), is_time.set()), daemon=True)
    caller = threading.Thread(target=lambda: dist.all_reduce(numbers(), group=second), daemon=True)
    caller.start()
    timer.start()
    is_time.wait()
    dist.all_reduce(numbers(), group=first)
    caller.join()


@planted(None)
def a_feeder_in_the_background(rank: int) -> None:
    def feed() -> None:
        time.sleep(1.5)
        dist.send(numbers(), 1)

    if rank == 0:
        threading.Thread(target=feed, daemon=True).start()
        dist.recv(numbers(), 1, tag=1)
    else:
        dist.recv(numbers(), 0)
        dist.send(numbers(), 0, tag=1)


@planted(None)
def a_thread_that_python_does_not_know(rank: int) -> None:
    groups = [dist.new_group([0, 1], group_desc=name) for name in ("first", "second")]
    is_time = threading.Event()
    own = threading.Thread(target=lambda: dist.all_reduce(numbers(), group=groups[rank]))
    own.start()
    _thread.start_new_thread(lambda: (time.sleep(1.5), is_time.set()), ())
    is_time.wait()
    dist.all_reduce(numbers(), group=groups[1 - rank])
    own.join()


@planted(None, world=3)
def sends_that_cross_without_waiting(rank: int) -> None:
    out, into = [numbers(300_000) for _ in range(3)], [numbers(300_000) for _ in range(3)]
    works = [dist.isend(out[r], r) for r in range(3) if r != rank]
    works += [dist.irecv(into[r], r) for r in range(3) if r != rank]
    for work in works[::-1]:
        assert work is not None
        work.wait()


@planted(None)
def a_flat_tensor_against_a_shaped_one(rank: int) -> None:
    dist.all_reduce(numbers() if rank else numbers().view(2, 4))


@planted(None)
def a_buffer_used_again(rank: int) -> None:
    x = numbers()
    for _ in range(20):
        dist.all_reduce(x, async_op=True).wait()
        x.mul_(0.5)
    assert torch.equal(x, numbers())


def heard_by(errors: list[ParityError], function: Callable[[], object]) -> None:
    try:
        function()
    except ParityError as error:
        errors.append(error)


def hear(name: str) -> tuple[str, str, float]:
    """Run on every rank: what this one hears, as (error, text, seconds)."""
    mistake = next(m for m in MISTAKES if m.name == name)
    dist.barrier()
    begin = time.monotonic()
    try:
        mistake.program(dist.get_rank())
        dist.destroy_process_group()
    except (ParityError, RuntimeError) as error:
        with suppress(ParityError):  # that there are calls which nobody will wait for now
            dist.destroy_process_group()
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin
