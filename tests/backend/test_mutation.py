"""A rule changes what it names, on the ranks that it names, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import parity
from parity import Backend, launch
from parity.backend import Rule, Settings, Tally, tally
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
        (Rule("double", "all_reduce"), ([6.0, 6.0, 6.0, 5.0, 6.0],) * 2),
        (Rule("double", "all_gather"), (CLEAN, CLEAN)),
        (Rule("group", "all_reduce", value="nobody's"), (CLEAN, CLEAN)),
        (Rule("drop", "in nowhere"), (CLEAN, CLEAN)),
        (Rule("drop", site="all_reduce on world at nowhere"), (CLEAN, CLEAN)),
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


def over_two_axes() -> list[float]:
    """On a 2 by 2 mesh: a sum of 10 ** rank over b, and what came along a from the rank before."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    rank = dist.get_rank()
    x = torch.full((2,), 10.0**rank)
    dist.all_reduce(x, group=mesh.get_group("b"))
    message = torch.full((1,), float(rank))
    if rank < 2:
        dist.send(message, rank + 2, group=mesh.get_group("a"))
    else:
        dist.recv(message, rank - 2, group=mesh.get_group("a"))
    return [float(x[0]), float(message)]


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (None, [[11, 0], [11, 1], [1100, 0], [1100, 1]]),
        (Rule("group", "all_reduce", value="a"), [[101, 0], [1010, 1], [101, 0], [1010, 1]]),
        (Rule("peer", "recv", value="b"), [[11, 0], [11, 1], [1100, 1], [1100, 0]]),
    ],
    ids=str,
)
def test_a_call_goes_to_another_group(rule: Rule | None, want: list[list[float]]) -> None:
    with parity.world(4, rules=[rule] if rule else []) as w:
        assert w.run(over_two_axes) == want


def messages(at_once: bool) -> list[float]:
    rank, xs = dist.get_rank(), [torch.full((1,), float(i)) for i in range(4)]
    if rank == 0:
        for x in xs:
            dist.send(x, 1)
        return []
    xs = [torch.zeros(1) for _ in range(4)]
    if at_once:
        for work in reversed([dist.irecv(x, 0) for x in xs]):
            assert work is not None
            work.wait()
    else:
        for x in xs:
            dist.recv(x, 0)
    return [float(x) for x in xs]


@pytest.mark.parametrize("at_once", [False, True])
def test_two_messages_change_places(at_once: bool) -> None:
    with parity.world(2, rules=[Rule("swap", "recv")]) as w:
        assert w.run(messages, at_once)[1] == [1.0, 0.0, 2.0, 3.0]


def sums_of_threes() -> tuple[list[float], Tally]:
    """Asynchronous, of more than one step, and in place."""
    x = torch.ones(100_000, dtype=torch.float64)
    work = dist.all_reduce(x, async_op=True)
    assert work is not None
    work.wait()
    return x.unique().tolist(), tally()


@pytest.mark.parametrize(
    ("rule", "want", "largest"),
    [
        (Rule("double"), [9.0], 2.0),
        (Rule("op", value="MAX"), [1.0], 2 / 3),
        (Rule("scale", value=2.0), [6.0], 1.0),
        (Rule("drop"), [1.0], 2 / 3),
        (Rule("scale", value=1.0), [3.0], 0.0),
        (Rule("op", value="SUM"), [3.0], 0.0),
    ],
    ids=str,
)
def test_what_a_rule_changed_is_counted(rule: Rule, want: list[float], largest: float) -> None:
    with parity.world(3, rules=[rule]) as w:
        for value, done in w.run(sums_of_threes):
            assert value == want
            assert done.calls == 1
            assert (done.changed > 0) == (largest > 0)
            assert done.largest == pytest.approx(largest)


def deeper() -> float:
    return once()


def once() -> float:
    x = torch.ones(1)
    dist.all_reduce(x)
    return float(x)


def both_ways() -> list[float]:
    return [once(), deeper()]


def test_a_site_is_known_by_all_that_led_there() -> None:
    with parity.world(2, ledger=10) as w:
        assert w.run(both_ways) == [[2.0, 2.0]] * 2
    names = [[entry.name for entry in ledger] for ledger in w.ledger]
    assert names[0] == names[1]
    straight, around = names[0]
    assert straight != around
    assert "in once < " in around
    assert " in deeper < " in around
    with parity.world(2, rules=[Rule("drop", site=around)]) as w:
        assert w.run(both_ways) == [[2.0, 1.0]] * 2


def with_objects() -> list[object]:
    found: list[object] = [None, None]
    dist.all_gather_object(found, dist.get_rank())
    dist.barrier()
    return found


def test_the_ledger_knows_what_torch_said_in_the_users_stead() -> None:
    with parity.world(2, ledger=10) as w:
        w.run(with_objects)
    assert {(e.op, e.through) for e in w.ledger[0]} == {
        ("all_gather", "all_gather_object"),
        ("barrier", "barrier"),
    }
