"""Where pieces lie: by placements, by a layout, or found by shapes and values."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

import parity
from parity.offline.place import shard
from parity.subject.alignment import Box, Held, Part
from tests.offline.ranks import Model, compare, recorder, write, write_all, wrong
from tests.subject.cuts import CUTS, Cut, full

At = dict[str, int]


class Cutting(NamedTuple):
    """`axes` of these sizes; each dimension of `shape` is cut at `ends` over some of them."""

    shape: tuple[int, ...]
    axes: dict[str, int]
    over: dict[int, str]
    ends: dict[int, list[int]]

    def ranks(self) -> list[At]:
        places = product(*(range(n) for n in self.axes.values()))
        return [dict(zip(self.axes, place, strict=True)) for place in places]

    def part(self, whole: Tensor, at: Mapping[str, int]) -> Tensor:
        for dim, axis in self.over.items():
            start, end = self.ends[dim][at[axis] : at[axis] + 2]
            whole = whole.narrow(dim, start, end - start)
        return whole.contiguous()


@st.composite
def cuttings(draw: st.DrawFn) -> Cutting:
    axes = {axis: draw(st.integers(1, 3)) for axis in ("dp", "tp", "cp")}
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)))
    free = draw(st.permutations(list(axes)))
    dims = draw(st.sets(st.integers(0, len(shape) - 1), max_size=2))
    over = dict(zip(sorted(dims), free, strict=False))
    ends = {}
    for dim, axis in over.items():
        count = axes[axis] - 1
        inner = draw(st.lists(st.integers(0, shape[dim]), min_size=count, max_size=count))
        ends[dim] = [0, *sorted(inner), shape[dim]]
    return Cutting(shape, axes, over, ends)


@given(cuttings(), st.booleans())
@settings(max_examples=40)
def test_the_place_of_every_piece_is_found(cutting: Cutting, has_layout: bool) -> None:
    """By the shapes; of several ways that fit, by the values. With a layout, by that."""
    whole = torch.randn(cutting.shape)
    layout = {"w": cutting.over} if has_layout else None
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "a", {"w": whole}, {"w": 2 * whole})
        ranks = cutting.ranks()
        for rank, at in enumerate(ranks):
            part = cutting.part(whole, at)
            write(
                folder / "b", {"w": part}, {"w": 2 * part}, rank, len(ranks), at=at, layout=layout
            )
        report = compare(folder / "a", folder / "b")
    assert not report.wrong, [(j.name, j.verdict) for j in report.wrong]
    assert {j.verdict.status for j in report.judged} == {"exact"}
    assert {j.verdict.elements for j in report.judged} == {whole.numel()}


@given(cuttings(), st.data())
@settings(max_examples=40)
def test_one_wrong_element_of_one_rank_is_found(cutting: Cutting, data: st.DataObject) -> None:
    whole, ranks = torch.randn(cutting.shape), cutting.ranks()
    parts = [cutting.part(whole, at) for at in ranks]
    held = [rank for rank, part in enumerate(parts) if part.numel()]
    bad = data.draw(st.sampled_from(held))
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "a", {"w": whole}, {"w": whole})
        for rank, at in enumerate(ranks):
            gradient = parts[rank].clone()
            if rank == bad:
                gradient.view(-1)[data.draw(st.integers(0, gradient.numel() - 1))] += 5.0
            parameter, gradients = {"w": parts[rank]}, {"w": gradient}
            layout = {"w": cutting.over}
            write(folder / "b", parameter, gradients, rank, len(ranks), at=at, layout=layout)
        report = compare(folder / "a", folder / "b")
    assert list(wrong(report)) == ["gradient of w"]
    assert wrong(report)["gradient of w"] in ("split", "differs")


@given(
    st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["shard", "strided"])
)
@settings(max_examples=60)
def test_shards_are_where_torch_says(n: int, dp: int, tp: int, kind: str) -> None:
    first = Shard(0) if kind == "shard" else _StridedShard(0, split_factor=tp)
    for i, j in product(range(dp), range(tp)):
        rows = shard(torch.arange(n), dp, i, getattr(first, "split_factor", 1))
        rows = shard(rows, tp, j)
        size, offset = _compute_local_shape_and_global_offset(
            (n,), (dp, tp), [i, j], [first, Shard(0)]
        )
        assert size == (len(rows),)
        if len(rows):
            assert offset == (int(rows[0]),)


def test_two_axes_that_cut_one_dimension_are_told_apart_by_values(tmp_path: Path) -> None:
    whole = torch.randn(8, 3)
    write(tmp_path / "a", {"w": whole}, {"w": whole})
    for rank, (dp, tp) in enumerate(product(range(2), range(2))):
        part = {"w": whole.chunk(4)[2 * tp + dp]}
        write(tmp_path / "b", part, part, rank, 4, at={"dp": dp, "tp": tp})
    assert not compare(tmp_path / "a", tmp_path / "b").wrong


def test_the_place_of_a_parameter_is_that_of_its_wrong_gradient(tmp_path: Path) -> None:
    """Whose own values would not tell: it could be cut over dp or over tp."""
    whole = torch.randn(8, 3)
    write(tmp_path / "a", {"w": whole}, {"w": whole})
    for rank, (dp, tp) in enumerate(product(range(2), range(2))):
        part = {"w": whole.chunk(2)[tp]}
        gradient = {"w": 2 * part["w"]}
        write(tmp_path / "b", part, gradient, rank, 4, at={"dp": dp, "tp": tp})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert wrong(report) == {"gradient of w": "differs"}
    assert report.wrong[0].hints[0].startswith("it is 2 (dp or tp) times the baseline")


def test_where_neither_shapes_nor_values_tell_the_line_to_add_is_said(tmp_path: Path) -> None:
    gradient = torch.randn(8, 3)
    write(tmp_path / "a", {"up.w": torch.ones(8, 3)}, {"up.w": gradient})
    ranks = [({"dp": dp, "tp": tp}, {"up.w": torch.randn(4, 3)}) for dp in (0, 1) for tp in (0, 1)]
    report = compare(tmp_path / "a", write_all(tmp_path / "b", ranks))
    assert wrong(report) == {"gradient of up.w": "place"}
    assert report.wrong[0].verdict.text == (
        'how it is cut is not known, shapes allow {0: "dp"} or {0: "tp"}, and by none of these is '
        'it the baseline: add to parity.record layout={"up.w": {0: "dp"}}, or what is true'
    )


def test_pieces_that_are_of_no_whole(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": torch.ones(8)}, {"w": torch.ones(8)})
    ranks = [({"tp": tp}, {"w": torch.ones(3)}) for tp in range(2)]
    report = compare(tmp_path / "a", write_all(tmp_path / "b", ranks))
    assert wrong(report)["gradient of w"] == "shape"
    assert report.wrong[0].verdict.text == (
        "along no axis do its pieces add up to the baseline's (8,): rank 0 (3,), rank 1 (3,); "
        "if it is packed in another way, give `layout` what parity.held finds"
    )


def test_boxes_say_which_element_belongs_where(tmp_path: Path) -> None:
    """Rank 1 of 2 holds its columns of two fused blocks, transposed."""
    whole = torch.arange(48.0).view(12, 4) + 1
    write(tmp_path / "a", {"w": whole}, {"w": whole})
    for rank in range(2):
        rows = [slice(3 * rank, 3 * rank + 3), slice(6 + 3 * rank, 9 + 3 * rank)]
        local = torch.cat([whole[r] for r in rows]).T.contiguous()
        places = torch.arange(24).view(4, 6).T
        boxes = [Box((r.start, 0), places[3 * i : 3 * i + 3]) for i, r in enumerate(rows)]
        layout = {"w": Held("w", (4, 6), [Part("w", (12, 4), boxes)])}
        write(tmp_path / "b", {"w": local}, {"w": local}, rank, 2, at={"tp": rank}, layout=layout)
    report = compare(tmp_path / "a", tmp_path / "b")
    assert {j.verdict.status for j in report.judged} == {"exact"}


@pytest.mark.parametrize(
    ("offsets", "status", "text"),
    [
        ((0, 3), "hole", "1 of 8 elements are on no rank"),
        ((0, 5), "shape", "the piece of rank 1, (4,) at (5,) reaches beyond the whole of (8,)"),
        ((0, 2), "overlap", "the pieces of ranks 0 and 1 cover the same elements"),
    ],
)
def test_pieces_that_do_not_tile_the_whole(
    offsets: tuple[int, int], status: str, text: str, tmp_path: Path
) -> None:
    write(tmp_path / "a", {"w": torch.ones(8)}, {"w": torch.ones(8)})
    for rank, offset in enumerate(offsets):
        n = 3 if status == "hole" and rank == 0 else 4
        n = 4 if status == "hole" and rank == 1 else n
        part = {"w": torch.ones(n)}
        boxes = Held("w", (n,), [Part("w", (8,), [Box((offset,), torch.arange(n))])])
        write(tmp_path / "b", part, part, rank, 2, at={"tp": rank}, layout={"w": boxes})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert wrong(report)["gradient of w"] == status
    assert report.wrong[0].verdict.text == text


def test_ranks_that_disagree_about_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": torch.ones(8)}, {"w": torch.ones(8)})
    part = {"w": torch.ones(4)}
    for rank, n in enumerate((8, 9)):
        boxes = Held("w", (4,), [Part("w", (n,), [Box((4 * rank,), torch.arange(4))])])
        write(tmp_path / "b", part, part, rank, 2, at={"tp": rank}, layout={"w": boxes})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report.wrong[0].verdict.text == (
        "ranks disagree about the shape: rank 0 says (8,), rank 1 says (9,)"
    )


def test_pieces_that_add_up_for_some_ranks_only(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": torch.ones(8)}, {"w": torch.ones(8)})
    sizes = {(0, 0): 4, (0, 1): 4, (1, 0): 3, (1, 1): 3}
    ranks = [({"dp": dp, "tp": tp}, {"w": torch.ones(n)}) for (dp, tp), n in sizes.items()]
    report = compare(tmp_path / "a", write_all(tmp_path / "b", ranks))
    assert report.wrong[0].verdict.text.startswith("along no axis do its pieces add up to")


def test_activations_of_parts_of_the_batch_are_put_together(tmp_path: Path) -> None:
    x = torch.randn(8, 3)
    for name, count, scale in (("a", 1, 1.0), ("b", 2, 1.0), ("c", 2, 1.1)):
        for rank in range(count):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
            options: dict[str, Any] = {"model": model, "at": {"dp": rank}, "activations": True}
            with recorder(tmp_path / name, {}, rank, count, **options):
                model(x.chunk(count)[rank] * scale)
    assert not compare(tmp_path / "a", tmp_path / "b").wrong
    report = compare(tmp_path / "a", tmp_path / "c")
    assert list(wrong(report)) == [
        "forward of output of 0",
        "forward of output of 1",
        "forward of output of the model",
    ]


OF_CUTS = [cut for cut in CUTS if cut.name not in ("tied", "held twice", "flat in bfloat16")]


@pytest.mark.parametrize("cut", OF_CUTS, ids=lambda cut: cut.name)
def test_however_parameters_are_stored_their_place_is_found_by_parity_held(
    cut: Cut, tmp_path: Path
) -> None:
    """Fused, flat, padded, renamed: recorded under the baseline's names, gradients too."""
    wholes = full()
    slopes = {name: w.cos() for name, w in wholes.items()}

    def build(values: Mapping[str, Tensor], rank: int) -> nn.Module:
        return Model(cut.keep(values, 4, rank))

    kept: set[str] = set()
    for rank in range(4):
        layout = parity.held(lambda f, rank=rank: build(f, rank), wholes)
        kept |= {part.whole for h in layout.values() for part in h.parts}
        local, slope = build(wholes, rank), build(slopes, rank)
        write(
            tmp_path / "b",
            {name: p.detach() for name, p in local.named_parameters()},
            {name: p.detach() for name, p in slope.named_parameters()},
            rank,
            4,
            at={"tp": rank},
            layout=layout,
        )
    own = {name: wholes[name] for name in wholes if name in kept}
    write(tmp_path / "a", own, {name: slopes[name] for name in own})
    report = compare(tmp_path / "a", tmp_path / "b")
    statuses = {str(j.verdict.key): j.verdict.status for j in report.judged}
    assert set(statuses.values()) == {"exact"}, statuses
    assert {f"gradient of {name}" for name in own} <= set(statuses)
