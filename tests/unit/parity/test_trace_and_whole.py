"""Pieces to files and back to the whole: every cut joins, and every flaw in a cut is a finding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity import Trace, TraceError
from parity import strategies as ps
from parity.cutting import Part, boxes
from parity.trace import Key, Piece, Recording
from parity.whole import join, same_bits

KEY = Key("forward", "x")


def saved(folder: Path, *traces: Trace) -> Recording:
    paths = [folder / f"{rank}.safetensors" for rank in range(len(traces))]
    for trace, path in zip(traces, paths, strict=True):
        trace.save(path)
    return Recording(paths)


def pieces_of(whole: torch.Tensor, cut: Sequence[Part], copies: int = 1) -> list[Piece]:
    parts = [part for part in cut for _ in range(copies)]
    return [Piece(i, p.offset, whole[p.slices].contiguous()) for i, p in enumerate(parts)]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(1, 6), st.data())
def test_any_cut_in_any_order_joins_to_the_whole(
    shape: list[int], parts: int, data: st.DataObject
) -> None:
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    cut = data.draw(ps.cuts(shape, parts))
    pieces = data.draw(st.permutations(pieces_of(whole, cut, copies=data.draw(st.integers(1, 3)))))
    joined = join(pieces, [tuple(shape)] * len(pieces))
    assert joined.findings == []
    assert joined.tensor is not None
    assert same_bits(joined.tensor, whole)


def test_copies_that_differ_in_one_bit_are_split() -> None:
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, -0.0], dtype=torch.float64)
    joined = join([Piece(0, (0,), a), Piece(3, (0,), b)], [(2,), (2,)])
    assert [f.status for f in joined.findings] == ["split"]
    assert joined.findings[0].text.startswith("ranks 0 and 3 hold different copies")
    assert joined.copies == 1


def test_equal_nans_are_no_split() -> None:
    nan = torch.tensor([float("nan")])
    assert join([Piece(0, (0,), nan), Piece(1, (0,), nan.clone())], [(1,), (1,)]).findings == []


def test_a_missing_piece_is_a_hole() -> None:
    pieces = pieces_of(torch.arange(7.0), boxes([(3, 2, 2)]))[:2]
    joined = join(pieces, [(7,)] * 2)
    assert joined.tensor is None
    assert [tuple(f) for f in joined.findings] == [("hole", "2 of 7 elements are on no rank")]


def test_pieces_that_cover_the_same_elements_in_part_overlap() -> None:
    pieces = [Piece(0, (0,), torch.zeros(3)), Piece(1, (2,), torch.zeros(3))]
    findings = join(pieces, [(5,)] * 2).findings
    assert findings[0] == ("overlap", "the pieces of ranks 0 and 1 cover the same elements in part")


def test_an_overlap_does_not_hide_a_hole() -> None:
    pieces = [Piece(0, (0,), torch.zeros(3)), Piece(1, (2,), torch.zeros(3))]
    joined = join(pieces, [(9,)] * 2)
    assert joined.tensor is None
    assert {f.status for f in joined.findings} == {"overlap", "hole"}


def test_ranks_that_disagree_about_the_shape_are_a_finding() -> None:
    pieces = [Piece(0, (0,), torch.zeros(3)), Piece(1, (0,), torch.zeros(3))]
    joined = join(pieces, [(3,), (4,)])
    assert joined.tensor is None
    assert joined.findings[0].text == (
        "ranks disagree about the shape: rank 0 says (3,), rank 1 says (4,)"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_a_saved_trace_reads_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 6).to(dtype).T  # not contiguous
    trace = Trace()
    trace.add("forward", "x", tensor)
    trace.add("loss", "scalar", torch.tensor(3.5))
    recording = saved(tmp_path, trace)
    assert recording.keys == [KEY, Key("loss", "scalar")]
    (piece,) = recording.pieces(KEY)
    assert same_bits(piece.tensor, tensor.contiguous())
    assert recording.pieces(Key("loss", "scalar"))[0].tensor.shape == ()


def test_what_is_recorded_does_not_change_any_more(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    trace = Trace()
    trace.add("forward", "x", tensor)
    tensor.zero_()
    assert saved(tmp_path, trace).pieces(KEY)[0].tensor.tolist() == [1, 1, 1]


def test_a_piece_of_several_boxes_joins(tmp_path: Path) -> None:
    a, b = Trace(), Trace()
    for trace, start in ((a, 0), (b, 1)):
        for block in (0, 2):
            piece = torch.tensor([float(start + block)])
            trace.add("forward", "x", piece, shape=(4,), offset=(start + block,))
    recording = saved(tmp_path, a, b)
    joined = join(recording.pieces(KEY), recording.shapes(KEY))
    assert joined.tensor is not None
    assert joined.tensor.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("shape", "offset"), [((3,), (-1,)), ((3, 1), (0, 0)), ((3,), (0, 0))])
def test_a_box_outside_of_its_whole_is_refused(
    shape: tuple[int, ...], offset: tuple[int, ...]
) -> None:
    with pytest.raises(TraceError, match="does not lie in a whole of"):
        Trace().add("forward", "x", torch.zeros(2), shape=shape, offset=offset)


def test_a_box_that_reaches_beyond_its_whole_is_a_finding(tmp_path: Path) -> None:
    trace = Trace()
    trace.add("forward", "x", torch.zeros(2), shape=(3,), offset=(2,))
    recording = saved(tmp_path, trace)
    joined = join(recording.pieces(KEY), recording.shapes(KEY))
    assert joined.tensor is None
    assert joined.findings == [
        ("shape", "the piece of rank 0, (2,) at (2,) reaches beyond the whole of (3,)")
    ]


def test_a_whole_of_two_shapes_is_refused() -> None:
    trace = Trace()
    trace.add("forward", "x", torch.zeros(2), shape=(4,), offset=(0,))
    with pytest.raises(TraceError, match=r"its whole was \(4,\) before, and is \(5,\) now"):
        trace.add("forward", "x", torch.zeros(2), shape=(5,), offset=(2,))


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(TraceError, match=r"no such check \(known: forward, gradient"):
        Trace().add("gradients", "x", torch.zeros(1))


def test_a_box_recorded_twice_is_refused() -> None:
    trace = Trace()
    trace.add("norm", "n", torch.tensor(1.0))
    with pytest.raises(TraceError, match="norm of n: recorded twice by the same rank"):
        trace.add("norm", "n", torch.tensor(1.0))


def test_pieces_of_several_dtypes_are_a_finding() -> None:
    pieces = [Piece(0, (0,), torch.zeros(2)), Piece(1, (2,), torch.zeros(2).double())]
    joined = join(pieces, [(4,)] * 2)
    assert joined.tensor is None
    assert joined.findings[0].text == (
        "ranks disagree about the dtype: rank 1 holds torch.float64, rank 0 holds torch.float32"
    )
