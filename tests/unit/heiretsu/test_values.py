"""Topologies, layouts and schedules: pure values, held by what must be true of all of them."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heiretsu.config import PRESETS, Run, problems
from heiretsu.layout import Cut, Layout, share
from heiretsu.mesh import AXES, Topology
from heiretsu.model import stage_units
from heiretsu.rng import stream
from heiretsu.schedule import SCHEDULES, Action, gpipe, one_f_one_b, peak_alive, simulate

sizes = st.integers(1, 5)
topologies = st.builds(Topology, dp=sizes, tp=sizes, pp=sizes)


@given(topologies)
def test_ranks_and_coordinates_are_each_others_inverse(topology: Topology) -> None:
    places = [topology.at(rank) for rank in range(topology.world)]
    assert len(set(places)) == topology.world
    assert [topology.rank(at) for at in places] == list(range(topology.world))


@given(topologies)
def test_the_lines_of_an_axis_partition_the_ranks(topology: Topology) -> None:
    for axis in AXES:
        lines = topology.lines(axis)
        assert all(len(line) == topology.size(axis) for line in lines)
        assert sorted(rank for line in lines for rank in line) == list(range(topology.world))
        for line in lines:
            assert all(topology.peers(axis, rank) == line for rank in line)
            assert [getattr(topology.at(r), axis) for r in line] == list(range(len(line)))


@given(topologies)
def test_a_topology_reads_back(topology: Topology) -> None:
    assert Topology.parse(str(topology)) == topology


@pytest.mark.parametrize("text", ["", "dp0", "ep2", "dp2-dp2", "dp2tp2"])
def test_what_is_no_topology_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it as in dp2-tp2-pp1"):
        Topology.parse(text)


def test_a_size_and_a_rank_must_exist() -> None:
    with pytest.raises(ValueError, match="dp=0: an axis has at least one rank"):
        Topology(dp=0)
    with pytest.raises(ValueError, match="rank 2 is outside of dp2-tp1-pp1, which has 2 ranks"):
        Topology(dp=2).at(2)


@given(st.integers(0, 100), st.integers(1, 12))
def test_shares_are_those_of_tensor_split(size: int, parts: int) -> None:
    cut = torch.arange(size).tensor_split(parts)
    assert [share(size, parts, i)[1] for i in range(parts)] == [len(part) for part in cut]
    starts = [share(size, parts, i)[0] for i in range(parts)]
    assert starts == [sum(len(part) for part in cut[:i]) for i in range(parts)]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dim, blocks = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 3))
    shape[dim] *= blocks
    return Layout(tuple(shape), draw(st.sampled_from([None, Cut("tp", dim, blocks)])))


@given(layouts(), st.integers(1, 6))
def test_pieces_are_allocated_taken_and_placed_alike(layout: Layout, parts: int) -> None:
    """What `take` cuts off has the shape that was allocated, and `place` puts it back."""
    whole = torch.arange(torch.Size(layout.shape).numel()).reshape(layout.shape)
    rebuilt = torch.full(layout.shape, -1)
    times = torch.zeros(layout.shape, dtype=torch.int64)
    for i in range(parts):
        local = layout.take(whole, parts, i)
        assert tuple(local.shape) == layout.local_shape(parts, i)
        for offset, box in layout.place(local, parts, i):
            window = tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))
            rebuilt[window] = box
            times[window] += 1
    assert torch.equal(rebuilt, whole)
    assert (times == (1 if layout.cut else parts)).all()


def test_a_fused_projection_is_cut_in_each_block() -> None:
    qkv = Layout((12,), Cut("tp", 0, blocks=3))
    assert qkv.take(torch.arange(12), 2, 0).tolist() == [0, 1, 4, 5, 8, 9]


stages = st.integers(1, 8)
microbatches = st.integers(1, 16)


@given(st.sampled_from(sorted(SCHEDULES)), stages, microbatches)
def test_every_schedule_runs_to_its_end_and_does_all_work_once(name: str, p: int, m: int) -> None:
    schedule = SCHEDULES[name](p, m)
    assert len(simulate(schedule)) == 2 * (m + p - 1)
    for actions in schedule:
        assert sorted(actions) == sorted(Action(op, mb) for op in "FB" for mb in range(m))
        # Backwards in order of the microbatches: gradients add up alike under every schedule.
        assert [mb for op, mb in actions if op == "B"] == list(range(m))


@given(stages, microbatches)
def test_1f1b_holds_fewer_activations_and_gpipe_all(p: int, m: int) -> None:
    assert [peak_alive(a) for a in gpipe(p, m)] == [m] * p
    assert [peak_alive(a) for a in one_f_one_b(p, m)] == [min(p - s, m) for s in range(p)]


def test_a_schedule_that_cannot_run_is_refused_with_who_waits_for_what() -> None:
    schedule = one_f_one_b(2, 3)
    schedule[1][0], schedule[1][1] = schedule[1][1], schedule[1][0]
    message = "the schedule is stuck at tick 2: stage 0 waits to run B0, stage 1 waits to run B0"
    with pytest.raises(ValueError, match=re.escape(message)):
        simulate(schedule)


def test_an_unknown_action_order_across_stages_is_refused() -> None:
    schedule = gpipe(2, 2)
    schedule[1].reverse()
    with pytest.raises(ValueError, match="stuck at tick"):
        simulate(schedule)


@given(st.integers(0, 30), stages)
def test_stages_cover_all_units_once_and_evenly(layers: int, p: int) -> None:
    runs = [stage_units(layers, p, stage) for stage in range(p)]
    assert [unit for units in runs for unit in units] == list(range(layers + 2))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_a_stream_depends_on_its_purpose_alone() -> None:
    draw = [
        torch.rand(4, generator=stream(*key)) for key in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0], draw[3])


def test_every_preset_can_be_made_and_the_matrix_one_cuts_unevenly() -> None:
    for model in PRESETS.values():
        assert problems(Run(model=model)) == []
    small = PRESETS["matrix"]
    possible = [tp for tp in range(1, 9) if small.heads % tp == 0]
    assert possible == [1, 2, 3, 4, 6, 8]
    assert all(small.vocab % tp for tp in possible if tp > 1)
    assert all((small.layers + 2) % pp for pp in (3, 5, 6, 7))


def test_all_objections_to_a_run_are_said_at_once() -> None:
    run = Run(
        model=PRESETS["matrix"],
        topology=Topology(dp=3, tp=5, pp=9),
        batch=20,
        sequence=21,
        schedule="zigzag",
        optimizer="lion",
        dtype="float8",
    )
    assert problems(run) == [
        "24 heads cannot be cut over tp=5 (tp can be 1, 2, 3, 4, 6, 8, 12, 24)",
        "6 layers, the embedding and the head make 8 units, too few for pp=9 stages",
        "a batch of 20 sequences cannot be cut into dp=3 x 8 microbatches "
        "(batch must be 24 or more)",
        "sequence=21 is longer than context=20",
        "schedule=zigzag is unknown (known: gpipe, 1f1b)",
        "optimizer=lion is unknown (known: sgd, adamw)",
        "dtype=float8 is unknown (known: float64, float32, bfloat16)",
    ]
