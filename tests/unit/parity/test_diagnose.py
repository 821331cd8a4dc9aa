"""Each explanation is told from a difference that it makes, and from no other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parity.diagnose import diagnose, is_like
from parity.evidence import Evidence, Fit
from parity.trace import Key, Piece
from parity.wording import factor_text, spans

GRADIENT = Key("gradient", "w")
DP2 = [{"dp": 0, "tp": 0}, {"dp": 1, "tp": 0}]
TP2 = [{"dp": 0, "tp": 0}, {"dp": 0, "tp": 1}]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(got: Tensor, want: Tensor, key: Key = GRADIENT, **rest: object) -> list[Fit]:
    return diagnose(Evidence(key, got, want, noise=1e-12, **rest))  # type: ignore[arg-type]


def copies(*tensors: Tensor) -> list[Piece]:
    return [Piece(rank, (0,) * tensor.ndim, tensor) for rank, tensor in enumerate(tensors)]


def only(fits: list[Fit]) -> Fit:
    (fit,) = fits
    assert fit.residual < 1e-9
    return fit


WANT = draw(6, 4)


def test_zero() -> None:
    assert only(of(torch.zeros(6, 4).double(), WANT)).kind == "zero"


def test_noise_alone_is_rounding_between_copies() -> None:
    assert only(of(WANT + 1e-15, WANT)).kind == "rounding"


def test_what_has_no_simple_cause_is_not_explained() -> None:
    assert of(draw(6, 4, seed=1), WANT) == []
    assert of(draw(6, 5), WANT) == []
    assert of(WANT.log(), WANT) == []  # not finite


@pytest.mark.parametrize(
    ("k", "said"),
    [
        (2.0, "it is 2 (tp) times the baseline: summed over tp once too often, or not divided"),
        (1 / 2, "it is 1/2 (tp) times the baseline: divided by tp once too often"),
        (8.0, "it is 8 (micro_batches) times the baseline: not divided by micro_batches"),
        (16.0, "it is 16 (tp x micro_batches) times the baseline"),
        (2**0.5, "it is 1.41421 (the root of tp) times the baseline"),
        (-1.0, "it is -1 times the baseline: its sign is wrong"),
        (0.873, "it is 0.873 times the baseline"),
    ],
)
def test_scaled(k: float, said: str) -> None:
    fit = only(of(k * WANT, WANT, axes={"dp": 1, "tp": 2}, numbers={"micro_batches": 8}))
    assert fit.kind == "scaled"
    assert fit.text.startswith(said)


def test_a_factor_is_named_by_all_that_it_may_be() -> None:
    e = Evidence(GRADIENT, WANT, WANT, axes={"dp": 2, "tp": 2})
    assert factor_text(2.0, e) == "2 (dp or tp)"
    assert factor_text(0.25, e) == "1/4 (dp x tp)"
    assert factor_text(3.7, e) == ""


def test_a_sum_is_missing() -> None:
    part = draw(6, 4, seed=1)
    pieces = copies(part, WANT - part)
    fit = only(of(part, WANT, pieces=pieces, at=DP2, axes={"dp": 2, "tp": 1}))
    assert (fit.kind, fit.axis) == ("not reduced", "dp")
    assert fit.text == (
        "the sum over dp of what the ranks hold equals the baseline: a sum over dp (an "
        "all-reduce) is missing"
    )


def test_a_mean_is_missing() -> None:
    part = draw(6, 4, seed=1)
    pieces = copies(part, 2 * WANT - part)
    fit = only(of(part, WANT, pieces=pieces, at=DP2, axes={"dp": 2, "tp": 1}))
    assert (fit.kind, fit.axis) == ("not averaged", "dp")


def test_a_sum_is_missing_behind_a_bias() -> None:
    part, bias = draw(6, 4, seed=1), draw(4, seed=2)
    pieces = copies(part + bias, WANT - part)
    rest = {"pieces": pieces, "at": TP2, "axes": {"dp": 1, "tp": 2}, "parameters": {"b": bias}}
    fit = only(of(part + bias, WANT, **rest))
    assert (fit.kind, fit.axis) == ("not reduced", "tp")
    assert "equals the baseline, but for b:" in fit.text


def test_equal_copies_are_not_taken_for_parts_of_a_sum() -> None:
    half = WANT / 2
    fit = only(of(half, WANT, pieces=copies(half, half), at=DP2, axes={"dp": 2, "tp": 1}))
    assert fit.kind == "scaled"


def test_a_sum_over_two_axes_is_missing() -> None:
    a, b, c = (draw(6, 4, seed=i) for i in (1, 2, 3))
    at = [{"dp": i, "tp": j} for i in (0, 1) for j in (0, 1)]
    pieces = copies(a, b, c, WANT - a - b - c)
    fit = only(of(a, WANT, pieces=pieces, at=at, axes={"dp": 2, "tp": 2}))
    assert "the sum over dp and tp of what" in fit.text


def test_state_that_was_never_updated() -> None:
    before = draw(6, 4, seed=1)
    fit = only(of(before, WANT, Key("state", "sgd w"), parameters={"w": before}))
    assert fit.kind == "stale"


def test_a_step_of_another_size() -> None:
    before = draw(6, 4, seed=1)
    got = before + 3 * (WANT - before)
    fit = only(of(got, WANT, Key("state", "sgd w"), parameters={"w": before}))
    assert (fit.kind, fit.text[:35]) == ("step scaled", "its step is 3 times the baseline's:")


def test_decay() -> None:
    before = draw(6, 4, seed=1)
    got = WANT + 1e-3 * before
    fit = only(of(got, WANT, Key("state", "adamw w"), parameters={"w": before}))
    assert (fit.kind, fit.text[-18:]) == ("decay", "decayed too little")


def test_values_that_come_a_step_late() -> None:
    want = draw(5)
    got = torch.cat([want[:1] * 0 + 7, want[:-1]])
    assert "stale" in [f.kind for f in of(got, want, Key("loss", "adamw by step"))]


def test_transposed() -> None:
    square = draw(5, 5)
    assert "transposed" in [fit.kind for fit in of(square.T, square)]
    assert "transposed" in [fit.kind for fit in of(WANT.T.reshape(6, 4), WANT)]


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 1), st.data())
def test_rows_in_another_order(n: int, m: int, dim: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(n)).filter(lambda p: p != list(range(n))))
    want = draw(n, m).movedim(0, dim)
    fits = of(want.index_select(dim, torch.tensor(order)), want)
    moves = [f for f in fits if f.kind in ("reordered", "shifted", "interleaved", "transposed")]
    assert moves, fits
    assert f"along dim {dim}" in "".join(f.text for f in moves) or moves[0].kind == "transposed"


def test_shifted_rows() -> None:
    fit = only(of(WANT.roll(-1, 0), WANT))
    assert (fit.kind, fit.text) == ("shifted", "along dim 0 it is shifted by 1")


def test_fused_blocks_interleaved() -> None:
    want = draw(12, 5)  # q, k, v of 4 rows each
    got = want.view(3, 2, 2, 5).transpose(0, 1).reshape(12, 5)
    fit = only(of(got, want))
    assert (fit.kind, fit.text[:34]) == ("interleaved", "along dim 0 its 3 blocks of 4 are ")


def test_the_shard_of_another_rank() -> None:
    fit = only(of(torch.cat([WANT[:3], WANT[:3]]), WANT))
    assert fit == Fit(
        "other rows", "along dim 0, rows 3 to 5 hold what belongs to rows 0 to 2", fit.residual,
        "", "moved",
    )  # fmt: skip


def test_a_bias_added_on_every_rank() -> None:
    bias = draw(4, seed=1)
    fit = only(of(WANT + bias, WANT, axes={"tp": 2}, parameters={"proj.bias": bias}))
    assert fit.kind == "bias"
    assert fit.text == (
        "every row has proj.bias too much: added on each of the 2 ranks of tp, and summed"
    )
    fit = only(of(WANT - bias, WANT, axes={"tp": 2}, parameters={"proj.bias": bias}))
    assert fit.text == "every row has proj.bias too little: added never"
    assert only(of(WANT + bias, WANT)).kind == "same added"


def test_rows_with_factors_of_their_own() -> None:
    factors = torch.tensor([1.0, 1, 2, 2, 2, 2]).double()
    fit = only(of(WANT * factors[:, None], WANT, axes={"tp": 2}))
    assert fit.kind == "rows scaled"
    assert fit.text.startswith("along dim 0, rows 2 to 5 are 2 (tp) times the baseline: summed")
    fit = only(of(WANT * (factors == 1)[:, None], WANT))
    assert fit.text == "along dim 0, rows 2 to 5 are zero"


def test_only_some_rows_or_columns_differ() -> None:
    got = draw(8, 4)
    got[5] = draw(4, seed=3)
    fit = only(of(got, draw(8, 4)))
    assert (fit.kind, fit.text) == ("some rows", "only 1 of 8 rows differ: row 5")
    got = draw(8, 4)
    got[:, 2] = draw(8, seed=3)
    fit = only(of(got, draw(8, 4)))
    assert (fit.kind, fit.text) == ("some columns", "only column 2 of 4 differ")


def test_only_the_pieces_of_some_ranks_differ() -> None:
    got = WANT.clone()
    got[:, 1:] = draw(6, 3, seed=3)  # half of the columns and more
    pieces = [Piece(0, (0, 0), got[:, :1]), Piece(1, (0, 1), got[:, 1:])]
    fit = only(of(got, WANT, pieces=pieces, at=TP2, axes={"dp": 1, "tp": 2}))
    assert fit.text == "only the pieces of rank 1 differ (tp=1)"


def test_a_norm_that_counts_copies_often() -> None:
    shared, cut = draw(3), draw(4, seed=1)
    gradients = [
        (shared, [Piece(0, (0,), shared), Piece(1, (0,), shared)]),
        (cut, [Piece(0, (0,), cut[:2]), Piece(1, (2,), cut[2:])]),
    ]
    right = (shared.square().sum() + cut.square().sum()).sqrt()
    wrong = (2 * shared.square().sum() + cut.square().sum()).sqrt()
    rest = {"at": TP2, "axes": {"dp": 1, "tp": 2}, "gradients": gradients}
    key = Key("norm", "sgd by step")
    fits = of(wrong.view(1), right.view(1), key, pieces=copies(*2 * [wrong.view(1)]), **rest)
    assert fits[0].kind == "counted often"
    own = [(shared.square().sum() + part.square().sum()).sqrt().view(1) for part in cut.split(2)]
    fits = of(own[0], right.view(1), key, pieces=copies(*own), **rest)
    assert (fits[0].kind, fits[0].axis) == ("not reduced", "tp")


def test_the_same_mistake_is_known_again() -> None:
    fit = only(of(2 * WANT, WANT))
    other = draw(3, seed=5)
    assert is_like(Evidence(GRADIENT, 2 * other, other), fit)
    assert not is_like(Evidence(GRADIENT, 3 * other, other), fit)
    assert not is_like(Evidence(GRADIENT, other, other), fit)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "row 3"),
        ([0, 1, 2, 7], "rows 0 to 2, 7"),
        ([0, 2, 4, 6, 8], "rows 0, 2, 4 and 2 more ranges"),
    ],
)
def test_spans(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text


def test_what_belongs_to_other_records() -> None:
    others = {"a": draw(5, 4, seed=7), "b": draw(4, seed=8)}
    got = torch.cat([others["b"], others["a"].reshape(-1)]).view(6, 4)
    fit = only(of(got, WANT, others=others))
    assert (fit.kind, fit.text) == ("another's", "what it holds belongs to a, b")
    assert of(draw(6, 4, seed=9), WANT, others=others) == []


@pytest.mark.parametrize("is_bias", [True, False])
def test_which_microbatches_are_in_a_gradient(is_bias: bool) -> None:
    slope, given = draw(8, 3, 6, seed=1), draw(8, 3, 4, seed=2)
    slope[:2] = 0  # a microbatch without a target: missing or not, who knows
    weights = torch.tensor([1.0, 1, 1, 1, 0, 0, 2, 2]).double()

    def total(weights: Tensor) -> Tensor:
        weighted = slope * weights[:, None, None]
        return weighted.sum((0, 1)) if is_bias else torch.einsum("bto,bti->oi", weighted, given)

    rest = {"slope": slope, "given": given, "numbers": {"micro_batches": 4}}
    want = total(torch.ones(8).double())
    fit = only(of(total(weights), want, **rest))
    assert (fit.kind, fit.text) == (
        "parts",
        "of the 4 parts of the batch (micro_batches, from 0), part 2 is missing and part 3 is "
        "counted twice",
    )
    assert of(draw(*want.shape, seed=9), want, **rest) == []
    assert of(total(weights), total(weights) + want, **rest) == []  # not the sum that was thought


def test_float32_stands_out_in_float64() -> None:
    assert only(of(WANT.float().double(), WANT)).kind == "rounded"


def test_another_record() -> None:
    other = draw(6, 4, seed=3)
    fit = only(of(other, WANT, others={"output of blocks.4": other, "short": draw(2)}))
    assert (fit.kind, fit.text) == ("another's", "it is what output of blocks.4 should be")


def test_another_record_too_much() -> None:
    other = draw(6, 4, seed=3)
    others = {"output of blocks.3.attn": other}
    assert only(of(WANT - other, WANT, others=others)).text == (
        "it lacks what output of blocks.3.attn is"
    )
    assert only(of(WANT + 2 * other, WANT, others=others)).text == (
        "it has 2 times what output of blocks.3.attn is too much"
    )
    assert of(WANT - 0.5 * other, WANT, others=others) == []  # a gradient is no such sum
    key = Key("activation", "output of a")
    half = only(of(WANT - 0.5 * other, WANT, key, others=others))
    assert (half.text, half.of) == (
        "it lacks 0.5 times what output of blocks.3.attn is",
        "output of blocks.3.attn",
    )
    few = {"short": draw(2, 2, seed=3)}
    assert of(draw(2, 2) + 0.3 * few["short"], draw(2, 2), key, others=few) == []


def test_the_same_in_all_sequences() -> None:
    want, positions = draw(3, 5, 4), draw(7, 4, seed=1)
    fit = only(of(want + positions[:5], want, axes={"tp": 2}, parameters={"wpe": positions}))
    assert (fit.kind, fit.text) == (
        "bias",
        "every sequence has wpe too much: added on each of the 2 ranks of tp, and summed",
    )
    assert only(of(want + draw(5, 4, seed=2), want)).kind == "same added"


def test_parts_of_the_batch_are_mixed() -> None:
    key, numbers = Key("backward", "output of a"), {"micro_batches": 4}
    want, bias = draw(8, 3, 4), draw(4, seed=1)
    want[:2] = 0
    piled = want.view(4, 2, 3, 4).cumsum(0).view(8, 3, 4)
    fit = only(of(piled, want, key, numbers=numbers))
    assert (fit.kind, fit.text) == (
        "mixed rows",
        "of 4 parts of the batch (micro_batches, from 0), part 2 is 1 + 2; part 3 is 1 + 2 + 3",
    )
    fit = only(of(piled + bias, want, key, numbers=numbers))
    assert "part 3 is 1 + 2 + 3" in fit.text
    assert of(draw(8, 3, 4, seed=5), want, key, numbers=numbers) == []


def test_a_factor_is_told_beside_a_bias_and_not_as_a_mixture() -> None:
    key, want, bias = Key("activation", "output of a"), draw(8, 3, 4), draw(4, seed=1)
    fit = only(of(2 * want, want, key, axes={"tp": 2}))
    assert fit.text.startswith("it is 2 (tp) times the baseline: summed over tp once too often")
    fit = only(of(2 * want + bias, want, key, axes={"tp": 2}))
    assert (fit.kind, fit.text) == (
        "scaled",
        "but for one vector in all rows (a bias) it is 2 (tp) times the baseline: summed over tp "
        "once too often, or not divided by it",
    )


def test_what_has_two_names_is_not_added_to_itself() -> None:
    same = {"input of inner": WANT.clone(), "output of other": draw(6, 4, seed=3)}
    key = Key("backward", "input of a")
    assert only(of(2 * WANT, WANT, key, others=same)).kind == "scaled"
    assert only(of(WANT + same["output of other"], WANT, key, others=same)).kind == "another's"


def test_shards_that_were_added_up() -> None:
    want = draw(6, 4)
    total = want[:, :2] + want[:, 2:]
    pieces = [Piece(0, (0, 0), total), Piece(1, (0, 2), total)]
    fit = only(of(total.repeat(1, 2), want, pieces=pieces, at=TP2, axes={"dp": 1, "tp": 2}))
    assert fit.kind == "shards added"


def test_what_begins_after_the_first_step() -> None:
    want = draw(4)
    got = want.clone()
    got[2:] *= 1.1
    fit = of(got, want, Key("norm", "adamw by step"))[0]
    assert (fit.kind, fit.text[:52]) == (
        "carried over",
        "steps 1 to 2 are right, and from step 3 on it differ",
    )


def test_another_target() -> None:
    want = draw(4, 3, 9)
    got = want.clone()
    amount = draw(4, 3, seed=1)
    got[..., 2] += amount
    got[..., 5] -= amount
    assert [fit.kind for fit in of(got, want)] == ["picked"]


def test_rows_that_should_be_zero() -> None:
    want = draw(8, 5)
    want[:3] = 0
    got = want.clone()
    got[1:3] = draw(2, 5, seed=1)
    assert [fit.kind for fit in of(got, want)] == ["leak"]
    got = want.clone()
    got[3:] = draw(5, 5, seed=1)  # all that can be told
    assert of(got, want) == []


def test_one_number_is_no_multiple_worth_telling() -> None:
    assert of(torch.tensor([3.3]).double(), torch.tensor([1.7]).double()) == []


def test_decay_in_the_moments() -> None:
    before = draw(6, 4, seed=1)
    key = Key("state", "adamw exp_avg of w")
    fit = only(of(WANT + 0.01 * before, WANT, key, parameters={"w": before}))
    assert (fit.kind, fit.text[-26:]) == ("decay", "decay got into the moments")


def test_a_lookup_that_is_wrong_for_some_values() -> None:
    given = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 5]])
    want = draw(2, 4, 6)
    got = want.clone()
    got[given == 2] = 0.5
    fit = of(got, want, Key("activation", "output of wte"), given=given)[0]
    assert fit.text == "it differs where the input is 2, always, and nowhere else"
    got[0, 0] = 0.5
    got[1, 0] = 0.5  # of the two 3s one is right
    assert "by input" not in [f.kind for f in of(got, want, given=given)]


def test_a_small_constant_is_not_taken_for_float32() -> None:
    assert "rounded" not in [fit.kind for fit in of(WANT * (1 + 3e-8 * draw(6, 4).abs()), WANT)]


def test_normalised_by_the_own_piece_only() -> None:
    want = draw(5, 3, 20)
    got = want * draw(5, 3, 2, seed=1).repeat_interleave(10, -1)
    got[..., 4] += 1  # the target
    pieces = [Piece(rank, (0, 0, 10 * rank), part) for rank, part in enumerate(got.chunk(2, -1))]
    fits = of(got, want, pieces=pieces, at=TP2, axes={"dp": 1, "tp": 2})
    assert [fit.kind for fit in fits] == ["rows scaled"]
    assert fits[0].text.startswith("within the piece of each rank every row has a factor")
    fits = of(want * 1.1 + (got - got), want, pieces=pieces[:1], at=TP2[:1])
    assert [fit.kind for fit in fits] == ["scaled"]
    got = want * 1.1
    got[..., 4] += 1
    fits = of(got, want, pieces=copies(got), at=TP2[:1], axes={"dp": 1})
    assert [fit.kind for fit in fits] == ["picked"]


SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)
KEYS = st.sampled_from(
    [
        Key("activation", "output of a"),
        Key("backward", "input of a"),
        Key("forward", "logits"),
        GRADIENT,
        Key("norm", "sgd by step"),
        Key("state", "adamw exp_avg of w"),
        Key("state", "sgd w"),
        Key("loss", "adamw by step"),
    ]
)


@given(SHAPES, KEYS, st.integers(0, 5), st.booleans(), st.integers(1, 4), st.integers(1, 4))
def test_no_record_is_too_strange_to_be_looked_at(
    shape: tuple[int, ...], key: Key, how: int, has_pieces: bool, tp: int, batches: int
) -> None:
    want = draw(*shape)
    changes = [draw(*shape, seed=1), want * 2, want * 0, want + 1, want.flip(0) if shape else want]
    got = (*changes, torch.where(want > 0, want, 0.0))[how]
    pieces = copies(*[got] * tp) if has_pieces else []
    at = [{"dp": 0, "tp": rank} for rank in range(tp)] if has_pieces else []
    e = Evidence(
        key, got, want, 1e-12, pieces, at, {"dp": 1, "tp": tp}, {"micro_batches": batches},
        {"w": draw(*shape, seed=2), "b": draw(shape[-1] if shape else 1, seed=3)},
        [(want, pieces)], {"other": draw(*shape, seed=4)}, draw(*shape, seed=5),
        torch.zeros(shape[:-1], dtype=torch.int64),
    )  # fmt: skip
    fits = diagnose(e)
    for fit in fits:
        assert fit.text
        assert 0 <= fit.residual <= 1e-3
        assert is_like(e, fit) or fit.kind == "rounding"


def test_a_part_with_the_wrong_sign_is_not_called_zero() -> None:
    want = draw(8, 3, 4)
    got = want.clone()
    got[2:4] *= -1
    fits = of(got, want, Key("backward", "output of a"), numbers={"micro_batches": 4})
    assert [fit.kind for fit in fits] == ["rows scaled"]
    assert "rows 2 to 3 are -1 times the baseline: its sign is wrong" in fits[0].text
