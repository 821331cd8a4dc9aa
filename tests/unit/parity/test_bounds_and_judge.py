"""The bound is measured: rounding stays below it in every dtype, the smallest mistakes do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.bounds import (
    ALLOWED,
    NUDGES,
    Expected,
    coarser,
    hidden_bits,
    measure,
    nudge,
    rows,
    t_quantile,
)
from parity.judge import Override, judge
from parity.trace import Key
from parity.whole import Whole

KEY = Key("gradient", "w")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("chance", "dof", "t"),
    [(0.05, 2, 4.303), (0.05, 8, 2.306), (0.01, 4, 4.604), (0.001, 8, 5.041), (1e-6, 8, 13.26)],
)
def test_t_quantile_agrees_with_the_tables(chance: float, dof: int, t: float) -> None:
    assert t_quantile(chance, dof) == pytest.approx(t, rel=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nudge_moves_every_element_by_one_rounding_and_is_repeatable(dtype: torch.dtype) -> None:
    start = torch.randn(1000).to(dtype)
    a, b, c = start.clone(), start.clone(), start.clone()
    nudge(a, "w", 1)
    nudge(b, "w", 1)
    nudge(c, "w", 2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    moved = (a.double() - start.double()).abs() / start.double().abs()
    eps = torch.finfo(dtype).eps
    assert moved.min() > 0.4 * eps
    assert moved.max() < 2.1 * eps


def test_nudge_0_changes_nothing() -> None:
    x = torch.randn(10)
    y = x.clone()
    nudge(y, "w", 0)
    assert torch.equal(x, y)


def test_a_nudge_may_be_as_coarse_as_another_type_rounds() -> None:
    x = torch.randn(1000)
    y = x.clone()
    nudge(y, "w", coarser(3, 7))
    assert torch.allclose((y / x - 1).abs(), torch.full_like(x, 2.0**-7), rtol=1e-4)


def test_the_bits_that_a_program_keeps_are_seen_through_its_dtype() -> None:
    exact = expected(torch.float64)
    truth = exact.truth

    def bits(short: torch.dtype) -> int:
        """Of a program whose factors are cast to `short` and whose results are float32."""

        def run(seed: int) -> torch.Tensor:
            return program(torch.float32, seed, short=short)

        e = measure(run(0), truth, [run(seed) for seed in range(1, NUDGES + 1)], 1.0)
        return hidden_bits([(exact, e)], torch.float32)

    assert bits(torch.float32) == 0
    assert bits(torch.float16) == 10
    assert bits(torch.bfloat16) == 7
    assert hidden_bits([], torch.float32) == 0


def test_a_few_coarse_records_are_not_the_program() -> None:
    def record(dtype: torch.dtype, short: torch.dtype | None) -> Expected:
        nudged = [program(dtype, seed, short=short) for seed in range(1, NUDGES + 1)]
        return measure(program(dtype, 0, short=short), program(torch.float64, 0), nudged, 1.0)

    exact = record(torch.float64, None)
    fine, coarse = ((exact, record(torch.float32, x)) for x in (None, torch.bfloat16))
    assert hidden_bits([coarse], torch.float32) == 7
    assert hidden_bits([coarse, coarse, fine], torch.float32) == 7
    assert hidden_bits([coarse, fine, fine], torch.float32) == 0


def program(
    dtype: torch.dtype,
    seed: int,
    split: int = 1,
    wrong: float = 0.0,
    short: torch.dtype | None = None,
) -> torch.Tensor:
    """A product summed in `split` parts, and what a norm makes of it. `short`: of its factors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 60, generator=generator).bfloat16()
    w = torch.randn(60, 31, generator=generator).bfloat16()
    x, w = x.to(dtype), w.to(dtype)
    nudge(x, "x", seed)
    nudge(w, "w", seed)
    x = x.tanh()  # products of bfloat16 values are exact in float64, and would hide the order
    x, w = x.to(short or dtype).to(dtype), w.to(short or dtype).to(dtype)
    y = sum(a @ b for a, b in zip(x.tensor_split(split, 1), w.tensor_split(split), strict=True))
    y[3, 5] *= 1 + wrong
    return torch.nn.functional.layer_norm(y, (31,))


def expected(dtype: torch.dtype) -> Expected:
    nudged = [program(dtype, seed) for seed in range(1, NUDGES + 1)]
    return measure(program(dtype, 0), program(torch.float64, 0), nudged, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [2, 3, 7, 60])
def test_another_order_of_addition_is_within_the_bound(dtype: torch.dtype, split: int) -> None:
    verdict = judge(KEY, Whole(program(dtype, 0, split), 0, []), expected(dtype))
    assert verdict.good
    assert verdict.excess < 0.1
    assert 0.1 < verdict.rho < 3


@pytest.mark.parametrize("wrong", [1e-11, 1e-6, 1.0])
def test_one_element_wrong_by_little_is_a_bug_at_its_place(wrong: float) -> None:
    got = program(torch.float64, 0, 3, wrong)
    verdict = judge(KEY, Whole(got, 0, []), expected(torch.float64))
    assert verdict.status == "bug"
    assert verdict.place[0] == 3


@given(st.integers(0, 23), st.integers(0, 30), st.floats(1.01, 100), st.booleans())
@settings(max_examples=50)
def test_the_bound_that_is_printed_is_the_bound(i: int, j: int, by: float, above: bool) -> None:
    """An error just above what the row may have is flagged, one just below is not."""
    e = expected(torch.float64)
    got = e.truth.clone()
    got[i, j] += ALLOWED * e.noise[i] * (by if above else 1 / by)
    verdict = judge(KEY, Whole(got, 0, []), e._replace(exact=torch.zeros_like(got)))
    assert verdict.good != above
    if above:
        assert verdict.place == (i, j)


@given(st.floats(1.001, 10))
@settings(deadline=None)
def test_any_tensor_beyond_its_relative_bound_is_flagged(by: float) -> None:
    """However the error is spread: the report's "would have been flagged" rests on this."""
    e = expected(torch.float64)
    spread = torch.randn(e.truth.shape, dtype=torch.float64)
    allowed = ALLOWED * e.total
    got = e.truth + spread * (by * allowed / spread.norm())
    assert not judge(KEY, Whole(got, 0, []), e).good


def test_precision_lost_in_a_working_dtype_is_drift() -> None:
    got = program(torch.bfloat16, 0).float()
    verdict = judge(KEY, Whole(got, 0, []), expected(torch.float32))
    assert verdict.status == "drift"
    assert verdict.rho > 1000


def test_equal_bits_are_exact() -> None:
    e = expected(torch.float32)
    assert judge(KEY, Whole(e.exact.clone(), 0, []), e).status == "exact"


def test_a_gradient_that_is_zero_in_exact_arithmetic_is_measured_by_what_was_summed() -> None:
    """The key bias: both sides hold rounding noise of their own, and that is no difference."""
    truth = torch.tensor([1e-18, -2e-18, 1e-18], dtype=torch.float64)
    noise = [torch.randn(3, dtype=torch.float64) * 2e-17 for _ in range(NUDGES)]
    e = measure(truth, truth, noise, 1.0)
    assert e.scale == pytest.approx(0.1, rel=2)
    assert judge(KEY, Whole(torch.full((3,), 2e-17, dtype=torch.float64), 0, []), e).good
    assert not judge(KEY, Whole(torch.full((3,), 1e-10, dtype=torch.float64), 0, []), e).good


def test_rows_without_noise_and_without_error_agree_and_any_error_there_is_a_bug() -> None:
    """An embedding row that no token used: exactly zero, or wrong."""
    truth = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    e = measure(truth, truth, [truth] * NUDGES, 1.0)
    assert judge(KEY, Whole(truth.clone(), 0, []), e).status == "exact"
    assert judge(KEY, Whole(truth + 1e-9, 0, []), e).status == "bug"


def test_a_vector_is_judged_element_by_element() -> None:
    """One noisy element (what Adam makes of a zero gradient) must not hide its neighbours."""
    truth = torch.ones(4, dtype=torch.float64)
    noisy = [truth + torch.tensor([0, 0, 0, 1e-3]) * (-1) ** k for k in range(NUDGES)]
    e = measure(truth, truth, [t.double() for t in noisy], 1.0)
    good = truth + torch.tensor([0, 0, 0, 2e-3], dtype=torch.float64)
    assert judge(KEY, Whole(good, 0, []), e).good
    bad = truth + torch.tensor([1e-9, 0, 0, 0], dtype=torch.float64)
    assert judge(KEY, Whole(bad, 0, []), e).place == (0,)


@pytest.mark.parametrize(
    ("got", "status", "text"),
    [
        (torch.zeros(2), "shape", "its shape is (2,), the baseline's (3,)"),
        (torch.zeros(3), "dtype", "its dtype is torch.float32, the baseline's torch.float64"),
        (
            torch.tensor([1, float("inf"), float("nan")], dtype=torch.float64),
            "nan",
            "2 of 3 elements are not finite",
        ),
        (None, "hole", ""),
    ],
)
def test_what_cannot_be_measured_is_said(got: torch.Tensor | None, status: str, text: str) -> None:
    truth = torch.ones(3, dtype=torch.float64)
    verdict = judge(KEY, Whole(got, 0, []), measure(truth, truth, [truth] * NUDGES, 1.0))
    assert (verdict.status, verdict.text) == (status, text)
    assert not verdict.good


def test_an_override_replaces_the_bound() -> None:
    e = expected(torch.float64)
    got = e.truth * (1 + 1e-7)
    assert not judge(KEY, Whole(got, 0, []), e).good
    assert judge(KEY, Whole(got, 0, []), e, Override("*", 1e-6, "because")).good
    assert not judge(KEY, Whole(got, 0, []), e, Override("*", 1e-8, "because")).good


@pytest.mark.parametrize(
    ("pattern", "covers"),
    [("gradient", True), ("gradient/w", True), ("*/w", True), ("state/*", False), ("grad", False)],
)
def test_an_override_covers_by_check_and_name(pattern: str, covers: bool) -> None:
    assert Override(pattern, 1.0, "").covers(KEY) is covers


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((5,), 5), ((4, 3), 4), ((2, 4, 3), 8)])
def test_rows_are_elements_of_vectors_and_last_dims_of_all_else(
    shape: tuple[int, ...], count: int
) -> None:
    assert len(rows(torch.zeros(shape))) == count


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128, torch.complex64])
def test_what_is_no_real_number_is_compared_too(dtype: torch.dtype) -> None:
    value = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    wide = value.to(torch.complex128) if dtype.is_complex else value
    e = measure(value, wide, [wide.to(dtype)] * NUDGES, 1.0)
    assert judge(KEY, Whole(value.clone(), 0, []), e).good
    wrong = value.clone()
    wrong[1, 0] = 1j if dtype.is_complex else 1
    verdict = judge(KEY, Whole(wrong, 0, []), e)
    assert not verdict.good
    assert verdict.place[:2] == (1, 0)


def test_an_empty_tensor_is_equal_to_itself() -> None:
    empty = torch.zeros(0, 4, dtype=torch.float64)
    e = measure(empty, empty, [empty] * NUDGES, 1.0)
    assert judge(KEY, Whole(empty.clone(), 0, []), e).good


@pytest.mark.parametrize("huge", [-1e9, torch.finfo(torch.float64).min])
def test_one_huge_element_does_not_excuse_the_others(huge: float) -> None:
    """A masked logit in every row, or one outlier in one row."""
    truth = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth[:, 3] = huge
    e = measure(truth, truth, [truth * (1 + 1e-16)] * NUDGES, 1.0)
    wrong = truth.clone()
    wrong[2, 5] *= 1 + 1e-9
    assert not judge(KEY, Whole(wrong, 0, []), e).good


def test_integers_are_equal_or_not() -> None:
    truth = torch.tensor([2**60])
    e = measure(truth, truth, [truth] * NUDGES, 1.0)
    assert judge(KEY, Whole(truth.clone(), 0, []), e).good
    assert judge(KEY, Whole(truth + 1, 0, []), e).status == "bug"


def test_a_scale_from_noise_is_at_most_that_of_its_companions() -> None:
    """Else noise of any size would look like one rounding of something enormous."""
    truth = torch.ones(3, dtype=torch.float64)
    noisy = [torch.randn(3, dtype=torch.float64) for _ in range(NUDGES)]
    assert measure(truth, truth, noisy, 2.0).scale == pytest.approx(2.0)
