"""Sketches add up as tensors do, and say how far apart two tensors are."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.offline.boxes import regions
from parity.offline.sketch import SIZE, digest, size, sketch

Shape = tuple[int, ...]
shapes = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


def whole(x: torch.Tensor) -> torch.Tensor:
    return sketch(x, (0,) * x.ndim, x.shape)


@given(shapes, st.data())
@settings(max_examples=60)
def test_the_sketches_of_the_pieces_add_up_to_that_of_the_whole(
    shape: Shape, data: st.DataObject
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    cuts = [[0, *sorted(data.draw(st.sets(st.integers(0, n), max_size=2))), n] for n in shape]
    total = torch.zeros(SIZE, dtype=torch.float64)
    for spans in product(*(list(pairwise(c)) for c in cuts)):
        part = x[tuple(slice(a, b) for a, b in spans)]
        total += sketch(part, [a for a, _ in spans], shape)
    torch.testing.assert_close(total, whole(x), rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 5000), st.floats(-8, 1), st.booleans())
@settings(max_examples=100, derandomize=True)
def test_the_relative_error_is_estimated_within_a_quarter(
    seed: int, n: int, exponent: float, is_sparse: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    error = torch.randn(n, generator=generator, dtype=torch.float64) * 10**exponent
    if is_sparse:
        error[torch.rand(n, generator=generator) < 0.9] = 0.0
    estimate = size(whole(x + error) - whole(x)) / float(x.norm())
    true = float(error.norm() / x.norm())
    # A quarter is three standard deviations: a hundred draws may go a little beyond.
    assert abs(estimate - true) <= 0.35 * true + 1e-14


def test_most_estimates_are_far_closer_than_that() -> None:
    x = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    off = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        error = torch.randn(10_000, dtype=torch.float64, generator=generator) * 1e-3
        off.append(size(whole(x + error) - whole(x)) / float(error.norm()) - 1)
    assert abs(sum(off) / len(off)) < 0.02
    assert sum(abs(e) < 0.25 for e in off) >= 0.98 * len(off)
    assert max(abs(e) for e in off) < 0.45


@pytest.mark.parametrize("n", [0, 1, 7, 64])
def test_what_is_no_larger_than_a_sketch_is_kept_exactly(n: int) -> None:
    x = torch.randn(n, dtype=torch.float64)
    assert size(whole(x)) == pytest.approx(float(x.norm()), rel=1e-14)


@pytest.mark.parametrize("n", [65, 100, 1000])
def test_two_errors_do_not_cancel(n: int) -> None:
    for i in range(1, 65):
        for sign in (1.0, -1.0):
            x = torch.zeros(n)
            x[0], x[i] = 1.0, sign
            assert 0.6 < size(whole(x)) < 2.1


def test_elements_of_one_sign_do_not_add_up_to_more() -> None:
    assert size(whole(torch.ones(10_000))) == pytest.approx(100.0, rel=0.3)


def test_a_rearrangement_is_seen() -> None:
    x = torch.randn(40, 40, dtype=torch.float64)
    off = size(whole(x.T.contiguous()) - whole(x)) / size(whole(x))
    assert off > 0.9


def test_complex_numbers_and_whole_numbers() -> None:
    x = torch.randn(100, dtype=torch.complex128)
    assert size(whole(x)) == pytest.approx(float(x.norm()), rel=0.4)
    assert size(whole(torch.arange(9))) == pytest.approx(float(torch.arange(9.0).norm()))


@given(shapes, st.integers(1, 30))
@settings(max_examples=60)
def test_regions_tile_the_whole_and_are_small(shape: Shape, limit: int) -> None:
    seen = torch.zeros(shape, dtype=torch.int64)
    for region in regions(shape, limit):
        assert region.numel <= limit
        seen[tuple(slice(i, j) for i, j in zip(region.offset, region.end, strict=True))] += 1
    assert bool((seen == 1).all())


def test_a_digest_is_that_of_the_bits() -> None:
    x = torch.zeros(3)
    assert digest(x) == digest(torch.zeros(3))
    assert digest(x) != digest(-x)
