"""What a review broke, held from then on: each program once gave a wrong result or a wrong word."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

import parity
from parity.backend import Rule
from parity.errors import Lost, ProtocolError, Race, RanksFailed


def a_group_after_its_end() -> list[float]:
    old = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=old)
    dist.destroy_process_group(old)
    new = dist.new_group([0, 1])
    x = torch.ones(1)
    with pytest.raises((ProtocolError, ValueError)):
        old.allreduce([x]).wait()
    found = []
    for i in range(1, 4):
        x = torch.full((1,), float(i) * 10 ** dist.get_rank())
        dist.all_reduce(x, group=new)
        found.append(float(x))
    return found


def a_group_that_ends_while_another_works() -> list[float]:
    group, x = dist.new_group([0, 1]), torch.ones(1)
    work = dist.all_reduce(x, async_op=True)
    dist.destroy_process_group(group)
    work.wait()
    return [float(x)]


def a_future_of_inference() -> list[float]:
    with torch.inference_mode():
        x = torch.ones(1)
        future = dist.all_reduce(x, async_op=True).get_future()
    future.wait()
    return [float(x)]


@pytest.mark.parametrize(
    ("program", "want"),
    [
        (a_group_after_its_end, [11.0, 22.0, 33.0]),
        (a_group_that_ends_while_another_works, [2.0]),
        (a_future_of_inference, [2.0]),
    ],
)
def test_gives_what_is_right(program: object, want: list[float]) -> None:
    with parity.world(2) as w:
        assert w.run(program) == [want, want]  # type: ignore[arg-type]


def test_a_checksum_sees_an_exchange_of_blocks() -> None:
    def swap() -> None:
        x, out = torch.randn(2, 1 << 17), torch.empty(4, 1 << 17)
        work = dist.all_gather_into_tensor(out, x, async_op=True)
        x.copy_(x.flip(0))
        with pytest.raises(Race, match=r"input .* was written to"):
            work.wait()

    with parity.world(2) as w:
        w.run(swap)


def test_a_rank_that_dies_in_the_middle_of_a_call_is_missed() -> None:
    def die() -> str:
        x = torch.ones(1 << 22)
        if dist.get_rank() == 1:
            dist.all_reduce(x, async_op=True)
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(Lost, match="which has died") as lost:
            dist.all_reduce(x)
        raise lost.value

    with parity.world(2) as w, pytest.raises(RanksFailed, match="rank 0 lost the others: Lost"):
        w.run(die)


def six_sums() -> list[float]:
    found = []
    for _ in range(6):
        x = torch.ones(1)
        dist.all_reduce(x)
        found.append(float(x))
    return found


def test_a_rule_with_a_number_changes_one_call() -> None:
    with parity.world(2, rules=[Rule("skip", "all_reduce", number=3)]) as w:
        assert w.run(six_sums) == [[2.0, 2.0, 1.0, 2.0, 2.0, 2.0]] * 2


def test_a_dropped_gather_leaves_what_was_there() -> None:
    def gather() -> list[float]:
        outs = [torch.full((1,), 7.0) for _ in range(2)]
        dist.all_gather(outs, torch.ones(1))
        return [float(out) for out in outs]

    with parity.world(2, rules=[Rule("drop", "all_gather")]) as w:
        assert w.run(gather) == [[7.0, 7.0]] * 2
