"""What follows from a wrong forward is told with it; what does not is another mistake."""

from __future__ import annotations

import pytest

from parity.case import Case, Run
from parity.consequences import with_another
from parity.culprit import Culprit
from parity.evidence import Fit
from parity.judge import Verdict
from parity.trace import Key


def made(check: str, name: str, *fits: Fit) -> Culprit:
    verdict = Verdict(Key(check, name), "bug")
    return Culprit(
        Run(Case({"tp": 2}), "float64", 1), verdict, "", [*fits], "", [verdict.key], [], [], []
    )


SEEN = [
    Key("activation", f"output of {path}") for path in ("b.0.attn", "b.1.attn", "c", "the model")
]
SEEN += [Key("activation", "input of b.1.attn.qkv"), Key("backward", "output of b.0.mlp")]
SUM = Fit("not reduced", "...", axis="tp", by="unreduced")


@pytest.mark.parametrize(
    ("forward", "later", "is_same"),
    [
        ("output of b.0.attn", made("backward", "output of b.1.attn.qkv"), True),
        ("input of b.0.attn.qkv", made("backward", "output of b.1.attn.qkv"), True),
        ("output of b.0.attn", made("backward", "input of b.1.attn"), True),
        ("output of b.0.attn", made("gradient", "b.1.attn.bias"), True),
        ("output of b.0.attn", made("gradient", "b.1.attn.not_called.weight"), True),
        ("output of b.0.attn", made("gradient", "b.1.attn.bias", Fit("scaled", "...")), True),
        # Made by another module's code, in the forward too, or of a kind that no forward passes on.
        ("output of b.0.attn", made("gradient", "b.1.attn.qkv.weight"), False),
        ("output of b.0.attn", made("backward", "input of b.1.attn.qkv"), False),
        ("output of b.0.attn", made("backward", "output of b.1.attn"), False),
        ("output of b.0.attn", made("activation", "output of b.1.attn"), False),
        ("output of b.0.attn", made("backward", "input of b.1.attn", SUM), False),
        # The model's own code is between its modules.
        ("output of the model", made("backward", "output of b.1.attn"), True),
        ("output of the model", made("backward", "input of the model"), True),
        ("output of the model", made("gradient", "input"), True),
        ("output of the model", made("gradient", "b.1.mlp.weight"), True),
        ("output of the model", made("gradient", "b.1.attn.bias"), False),
        ("output of the model", made("backward", "output of the model"), False),
        ("input of the model", made("backward", "output of b.1.attn"), False),
    ],
)
def test_a_wrong_forward_has_a_wrong_backward(forward: str, later: Culprit, is_same: bool) -> None:
    other, first = made("activation", "output of c"), made("activation", forward)
    found = with_another([other, first], later, SEEN, SEEN)
    assert found == (
        [other, first._replace(backward=[later])] if is_same else [other, first, later]
    )


ATTENTION = [
    Key("activation", name)
    for name in (
        "input of h.0",
        *("input of h.0.ln", "output of h.0.ln"),
        *("input of h.0.q", "output of h.0.q", "input of h.0.k", "output of h.0.k"),
        *("input of h.0.out", "output of h.0.out"),
        "output of h.0",
    )
]


@pytest.mark.parametrize(
    ("forward", "later", "is_same"),
    [
        ("input of h.0.out", "output of h.0.k", True),
        ("input of h.0.out", "output of h.0.q", True),
        ("input of h.0.out", "output of h.0.out", False),  # what comes later is right
        ("output of h.0", "output of h.0.out", True),
        ("input of h.0.q", "output of h.0.ln", True),
        ("input of h.0.q", "output of h.0.q", False),
        # Between what the module takes in and what is wrong there is another module.
        ("input of h.0.out", "input of h.0", False),
        ("input of h.0.ln", "input of h.0", True),
    ],
)
def test_the_backward_of_other_code_is_another_mistake(
    forward: str, later: str, is_same: bool
) -> None:
    """Names of records of one module, in the order of its forward."""
    found = with_another(
        [made("activation", forward)], made("backward", later), ATTENTION, ATTENTION
    )
    assert len(found) == (1 if is_same else 2)


def test_a_residual_that_is_wrong_is_wrong_in_the_backward_too() -> None:
    part = Fit("another's", "it lacks ...", of="output of h.0.out")
    before = Fit("another's", "it lacks ...", of="input of other")
    first = made("activation", "output of h.0")
    assert (
        len(with_another([first], made("backward", "input of h.0", part), ATTENTION, ATTENTION))
        == 1
    )
    assert (
        len(with_another([first], made("backward", "input of h.0", before), ATTENTION, ATTENTION))
        == 2
    )


def test_behind_a_right_forward_a_backward_is_wrong_by_itself() -> None:
    """Of two layers, one has a wrong forward."""
    wrong = Key("activation", "output of b.0.attn")
    first = made("activation", wrong.name)
    for layer, count in ((0, 1), (1, 2)):
        later = made("backward", f"output of b.{layer}.attn.not_seen")
        assert len(with_another([first], later, SEEN, {wrong})) == count


def test_other_factors_are_other_mistakes() -> None:
    double, half = Fit("scaled", "it is 2 times"), Fit("scaled", "it is 1/2 times")
    first = made("activation", "output of b.0.attn")
    for later in (made("gradient", "b.1.attn.w", double), made("gradient", "b.1.attn.v", double)):
        (first,) = with_another([first], later, SEEN, SEEN)
    assert len(first.backward) == 2
    other = made("gradient", "b.1.attn.u", half)
    assert with_another([first], other, SEEN, SEEN) == [first, other]
