"""Wherever an element lies, it is found; and what is not of the baseline is not taken for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parity.subject.alignment import Held, Wholes, align
from parity.subject.boxes import boxes_of
from tests.subject.cuts import CUTS, Cut, full

RANKS = 4
Keep = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def found(keep: Keep, parameters: Mapping[str, Tensor]) -> list[Held]:
    return align(keep, parameters, Wholes(parameters))


def check(held: list[Held], kept: Mapping[str, Tensor], wholes: Mapping[str, Tensor]) -> None:
    """By values that alignment has not seen: every element that is kept is where it is said to be,
    and those that are not said to be anywhere are zeros.
    """
    for h in held:
        flat = kept[h.name].reshape(-1)
        told = torch.zeros(len(flat), dtype=torch.bool)
        for part in h.parts:
            whole = wholes[part.whole]
            assert part.shape == tuple(whole.shape)
            for offset, positions in part.boxes:
                box = whole[
                    tuple(slice(i, i + n) for i, n in zip(offset, positions.shape, strict=True))
                ]
                assert flat[positions].equal(box.to(flat.dtype))
                assert not told[positions].any()
                told[positions] = True
        assert not flat[~told].any()
        assert h.padding == int((~told).sum())
        assert h.strange == 0


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.name)
def test_every_way_to_cut_and_store_is_found_exactly(cut: Cut) -> None:
    wholes = full()
    boxes = padding = 0
    for r in range(RANKS):
        held = found(lambda f, r=r: cut.keep(f, RANKS, r), wholes)
        check(held, cut.keep(wholes, RANKS, r), wholes)
        boxes += sum(len(part.boxes) for h in held for part in h.parts)
        padding += sum(h.padding for h in held)
    assert (boxes, padding) == (cut.boxes, cut.padding)


def test_there_are_many_ways() -> None:
    assert len({cut.name for cut in CUTS}) == len(CUTS) >= 20


def test_a_tensor_of_two_names_is_one_whole() -> None:
    wholes = full()
    held = found(lambda f: {"a": f["tied"], "b": f["w"]}, wholes)
    assert [h.parts[0].whole for h in held] == ["w", "w"]


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w + 1,
        lambda w: w * 2,
        lambda w: -w,
        lambda w: w.roll(1, 0) - w,
        lambda w: torch.randn_like(w),
        lambda w: torch.ones_like(w),
        lambda w: torch.full_like(w, math.nan),
        lambda w: torch.full_like(w, math.inf),
    ],
)
def test_what_is_not_loaded_as_it_is_is_of_nobody(change: Callable[[Tensor], Tensor]) -> None:
    (held,) = found(lambda f: {"w": change(f["w"])}, full())
    assert held.parts == []
    assert held.strange == 120


def test_a_part_that_is_not_loaded_is_told_from_padding() -> None:
    wholes = {"w": torch.randn(6, 4)}
    (held,) = found(
        lambda f: {"w": torch.cat([f["w"][:4], torch.ones(1, 4), torch.zeros(1, 4)])}, wholes
    )
    assert (held.padding, held.strange) == (4, 4)
    assert [b.offset for b in held.parts[0].boxes] == [(0, 0)]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_dtypes_of_few_digits_are_told_in_several_builds(dtype: torch.dtype) -> None:
    wholes = {"w": torch.randn(40, 50)}
    builds = []

    def keep(f: Mapping[str, Tensor]) -> dict[str, Tensor]:
        builds.append(f)
        return {"w": f["w"].to(dtype)[3:]}

    (held,) = found(keep, wholes)
    assert [(b.offset, b.positions.shape) for b in held.parts[0].boxes] == [((3, 0), (37, 50))]
    bits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}.get(
        dtype, 4
    )
    assert len(builds) == 1 + (bits < 50) * math.ceil(50 / bits)


@st.composite
def stored(draw: st.DrawFn) -> tuple[dict[str, Tensor], Keep]:
    """Parameters, and a random way to keep a part of them."""
    count = draw(st.integers(1, 3))
    shapes = [draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)) for _ in range(count)]
    wholes = {f"p{i}": torch.randn(shape) + 3 for i, shape in enumerate(shapes)}
    steps = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
    is_fused = draw(st.booleans())

    def keep(f: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: f[name] for name in wholes}
        if is_fused:
            kept = {"fused": torch.cat([x.reshape(-1) for x in kept.values()])}
        for step in steps:
            kept = {name: _moved(x, step) for name, x in kept.items()}
        return kept

    return wholes, keep


def _moved(x: Tensor, step: int) -> Tensor:
    """One of many ways to cut, pad, copy or reorder, drawn by a number."""
    kind, n = step % 8, step // 8
    if x.ndim == 0 or not x.numel():
        return x.reshape(1, *x.shape) if kind == 0 else x
    dim = n % x.ndim
    match kind:
        case 0:
            return x.reshape(-1)
        case 1:
            return x.transpose(dim, -1)
        case 2:
            return x.narrow(dim, 0, max(1, x.shape[dim] * 2 // 3))
        case 3:
            return x.narrow(dim, x.shape[dim] // 3, x.shape[dim] - x.shape[dim] // 3)
        case 4:
            return torch.cat([x, torch.zeros_like(x.narrow(dim, 0, 1))], dim)
        case 5:
            order = torch.randperm(x.shape[dim], generator=torch.Generator().manual_seed(n))
            return x.index_select(dim, order)
        case 6:
            return torch.cat(list(x.split(2, dim))[::-1], dim)
    return x.unsqueeze(0)


@given(stored())
@settings(max_examples=300)
def test_any_way_to_store_is_found_exactly(case: tuple[dict[str, Tensor], Keep]) -> None:
    wholes, keep = case
    check(found(keep, wholes), keep(wholes), wholes)


@given(st.data())
@settings(max_examples=200)
def test_boxes_tile_a_set(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    size = math.prod(shape)
    bits = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = torch.tensor(bits, dtype=torch.bool).reshape(shape)
    covered = torch.zeros(shape, dtype=torch.int64)
    for offset, span in boxes_of(mask):
        covered[tuple(slice(i, i + n) for i, n in zip(offset, span, strict=True))] += 1
    assert covered.equal(mask.long())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_piece_of_the_flattened_tensor_is_few_boxes(
    shape: list[int], data: st.DataObject
) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[start:end] = True
    assert len(boxes_of(mask.reshape(shape))) <= 2 * len(shape) - 1
