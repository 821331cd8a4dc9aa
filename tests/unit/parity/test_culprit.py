"""Where and why, in words."""

from __future__ import annotations

import pytest
import torch

from parity.backend import Entry
from parity.case import Case, Run
from parity.culprit import (
    Culprit,
    PieceError,
    hint,
    imprecision,
    innermost,
    pattern,
    where,
    worst,
)
from parity.evidence import Fit
from parity.explain import lines, neighbourhood
from parity.judge import Verdict
from parity.trace import Key, Piece

CASE = Case({"dp": 1, "tp": 2, "pp": 2})


@pytest.mark.parametrize(
    ("check", "name", "said"),
    [
        ("parameter", "w", "the parameter differs before the first step"),
        ("activation", "output of a.b", "module a.b: what it takes in agrees, what it puts out"),
        ("activation", "input of a.b", "the code that calls module a.b: everything before agrees"),
        ("backward", "input of good", "the backward of module good: the gradient of what it puts"),
        ("backward", "input of a.b", "the code behind module a.b: the gradient of its input is"),
        ("backward", "output of a.b", "the code behind module a.b: the gradient of its output"),
        ("backward", "output of the model", "the loss: the gradient of the logits is the first"),
        ("forward", "step 3 of output", "step 3: parameters are compared after the first and the"),
        ("gradient", "a.weight", "the gradient of a.weight itself: that of every activation"),
        ("norm", "sgd by step", "the gradient norm: the gradients that it is made of agree"),
        ("state", "sgd w", "the optimizer's step: gradients and norms agree"),
        ("loss", "sgd by step", "the loss: everything else agrees"),
    ],
)
def test_where(check: str, name: str, said: str) -> None:
    assert where(Key(check, name), {Key("backward", "output of good")}).startswith(said)


def test_a_gradient_is_told_by_the_module_to_blame() -> None:
    names = ["output of ln", "input of mlp", "input of mlp.up", "output of before"]
    verdicts = [
        Verdict(Key("backward", name), "bug", error=error)
        for name, error in zip(names, [0.5, 0.5, 0.5, 0.4], strict=True)
    ]
    good = {Key("backward", "output of mlp"), Key("backward", "output of mlp.up")}
    found, chosen = innermost(verdicts[0], verdicts, good)
    assert [key.name for key in found] == names[:3]
    assert chosen is verdicts[2]
    weight = Verdict(Key("gradient", "w"), "bug")
    assert innermost(weight, [weight], good) == ([weight.key], weight)


def test_of_copies_the_one_that_is_wrong_is_explained() -> None:
    want = torch.arange(6.0).double().view(3, 2)
    pieces = [
        Piece(0, (0, 0), want[:, :1]),
        Piece(1, (0, 1), want[:, 1:]),
        Piece(2, (0, 1), 2 * want[:, 1:]),
    ]
    assert worst(want, pieces, want).tolist() == [[0, 2], [2, 6], [4, 10]]
    assert worst(want, pieces[:2], want) is want


def entry(group: str, module: str, phase: str) -> Entry:
    return Entry("all_reduce", group, 8, "float64", phase, module, f"{module}.py:1 in f")


def test_a_missing_reduction_is_shown_elsewhere() -> None:
    fits = [Fit("not reduced", "...", axis="tp")]
    key = Key("activation", "output of blocks.0.proj")
    entries = [
        entry("tp", "blocks.1.proj", "forward"),
        entry("tp", "blocks.1.proj", "backward"),
        entry("tp", "head", "forward"),
        entry("pp", "blocks.2.proj", "forward"),
    ]
    assert hint(fits, key, CASE, entries) == (
        "elsewhere there is one over tp: all_reduce in blocks.1.proj (forward), at "
        "blocks.1.proj.py:1 in f"
    )
    assert "in head (forward)" in hint(fits, key, CASE, entries[2:])
    nothing = "its ranks say nothing to each other over tp in the whole run"
    assert hint(fits, key, CASE, entries[3:]) == nothing
    world = [entry("world", "head", "forward")]
    assert hint(fits, key, CASE, world) == nothing
    assert hint(fits, key, Case({"tp": 2}), world).startswith("elsewhere there is one over tp")
    assert hint([Fit("zero", "...")], key, CASE, entries) == ""


def test_drift_is_told_in_units_of_rounding() -> None:
    fit = imprecision(Verdict(Key("gradient", "w"), "drift", rho=4321.0), "float32")
    assert fit.kind == "drift"
    assert fit.text == (
        "the right function, computed less precisely: 4.32e+03 times the rounding of float32: "
        "look for a cast, or a sum kept in a shorter type"
    )


def test_the_same_record_of_all_layers() -> None:
    assert pattern(Key("backward", "output of blocks.11.mlp.down")) == "output of blocks.*.mlp.down"
    assert pattern(Key("activation", "input of 0.attn.ln_1")) == "input of *.attn.ln_1"
    assert pattern(Key("activation", "output of blocks.0")) == "output of blocks.0"
    assert pattern(Key("gradient", "3.mlp.up.weight")) == "*.mlp.up.weight"
    assert pattern(Key("gradient", "0.weight")) == "0.weight"
    assert pattern(Key("state", "adamw exp_avg of h.2.ln.bias")) == "adamw exp_avg of h.*.ln.bias"


def made(check: str, name: str, *fits: Fit) -> Culprit:
    verdict = Verdict(Key(check, name), "bug")
    run = Run(CASE, "float64", 1)
    return Culprit(run, verdict, "", [*fits], "", [verdict.key], [], [], [])


def test_culprits_in_words() -> None:
    verdict = Verdict(
        Key("gradient", "w"), "bug", error=0.5, allowed=1e-13, place=(1,), got=2.0, want=1.0
    )
    good = Verdict(Key("backward", "input of a"), "ok", error=1e-16, allowed=1e-13)
    culprit = Culprit(
        Run(CASE, "float64", 1),
        verdict,
        "the gradient of w itself",
        [Fit("scaled", "it is 2 (tp) times the baseline", 1e-4)],
        "elsewhere there is one",
        [verdict.key],
        [Key("gradient", "b")],
        [PieceError(1, {"tp": 1}, (0, 2), (3, 4), 0.5)],
        [good, verdict],
    )
    assert lines([culprit, culprit._replace(fits=[], hint="", alike=[])]) == [
        "culprit: gradient of w",
        "  the gradient of w itself",
        "  it is 2 (tp) times the baseline (but for 1e-04 of the difference)",
        "  so is 1 more, such as gradient of b",
        "  elsewhere there is one",
        "and, with that put right: gradient of w",
        "  the gradient of w itself",
        "  no simple explanation fits",
    ]
    behind = made("backward", "input of a", Fit("scaled", "it is 3 times the baseline"))
    assert lines([made("activation", "output of a")._replace(backward=[behind, culprit])])[2:] == [
        "  no simple explanation fits",
        "  its backward differs with it: backward of input of a (it is 3 times the baseline), "
        "gradient of w (it is 2 (tp) times the baseline)",
    ]
    assert lines([]) == [
        "run again with everything recorded it agreed with the first baseline: it is not "
        "the same in every run (a step may count its calls), or another baseline alone differs"
    ]
    assert (
        neighbourhood(culprit)
        == """\
    record                  verdict    error    allowed    worst element
--  ----------------------  ---------  -------  ---------  ------------------
    backward of input of a  ok         1.0e-16  1.0e-13
>   gradient of w           bug        5.0e-01  1.0e-13    [1]: got 2, want 1

gradient of w, by rank    at    holds       relative error
------------------------  ----  ----------  ----------------
rank 1                    tp=1  [0:3, 2:6]  5.0e-01"""
    )
