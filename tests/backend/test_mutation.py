"""A rule changes what it names, on the ranks that it names, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import parity
from parity import Backend, launch
from parity.backend import Rule, Settings
from parity.errors import RanksFailed


def sums() -> list[float]:
    """Three sums of 1 + rank over two ranks: 3 each; then a gather."""
    rank, found = dist.get_rank(), []
    for _ in range(3):
        x = torch.full((2,), 1.0 + rank)
        dist.all_reduce(x)
        found.append(float(x[0]))
    outs = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(outs, torch.full((1,), 5.0 + rank))
    return found + [float(o[0]) for o in outs]


CLEAN = [3.0, 3.0, 3.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (Rule("drop", "all_reduce"), ([1.0, 1.0, 1.0, 5.0, 6.0], [2.0, 2.0, 2.0, 5.0, 6.0])),
        (Rule("drop", "all_reduce", ranks=(1,)), (CLEAN, [2.0, 2.0, 2.0, 5.0, 6.0])),
        (Rule("drop", "all_reduce", number=2), ([3.0, 1.0, 3.0, 5.0, 6.0],) * 1),
        (Rule("scale", "all_reduce", value=0.5), ([1.5, 1.5, 1.5, 5.0, 6.0],) * 2),
        (Rule("scale", number=4, value=2.0), ([3.0, 3.0, 3.0, 10.0, 12.0],) * 2),
        (Rule("stale", "all_reduce"), ([1.0, 3.0, 3.0, 5.0, 6.0], [2.0, 3.0, 3.0, 5.0, 6.0])),
        (Rule("op", "all_reduce", value="MAX"), ([2.0, 2.0, 2.0, 5.0, 6.0],) * 2),
        (Rule("drop", "in nowhere"), (CLEAN, CLEAN)),
    ],
    ids=str,
)
def test_a_rule_changes_what_it_names(rule: Rule, want: tuple[list[float], ...]) -> None:
    with parity.world(2, rules=[rule]) as w:
        assert tuple(w.run(sums))[: len(want)] == want


def test_another_reduction_on_one_rank_is_a_mismatch() -> None:
    with (
        parity.world(2, rules=[Rule("op", "all_reduce", ranks=(0,), value="MAX")]) as w,
        pytest.raises(RanksFailed, match=r"Mismatch(.|\n)*all_reduce \(MAX\)"),
    ):
        w.run(sums)


def test_a_call_that_is_skipped_on_one_rank_is_missed_by_the_other() -> None:
    with (
        parity.world(2, rules=[Rule("skip", number=4, ranks=(0,))]) as w,
        pytest.raises(RanksFailed, match=r"rank 1 waits for rank 0 in all_gather"),
    ):
        w.run(sums)


def test_a_change_that_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match=r"change 'lose' is unknown \(known: drop, scale"):
        Rule("lose")


def halves() -> list[bool]:
    """Which elements of a sum over three ranks have the bits of the sum in rank order."""
    terms = [torch.full((3,), value) for value in (1.0, 1e8, -1e8)]
    x = terms[dist.get_rank()].clone()
    dist.all_reduce(x)
    return (x == (terms[0] + terms[1]) + terms[2]).tolist()


def test_the_order_of_a_sum_may_depend_on_the_place() -> None:
    by_rank, by_place = (
        launch(halves, 3, backend=Backend(settings=Settings(order=order)))
        for order in ("rank", "place")
    )
    assert by_rank == [[True] * 3] * 3
    assert by_place == [[True, False, True]] * 3
