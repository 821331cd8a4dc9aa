"""`parity check` and `parity layout`: the tests of a file, without pytest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from parity.cli import main

TEST = """
import parity, torch
from tests.subject.layers import ParallelMLP, mlp

@parity.matrix(tp=[1, 2, 16])
def test_right(case):
    case.check(mlp, lambda full, mesh: ParallelMLP(full, mesh["tp"]), [torch.randn(3, 8)])

@parity.matrix(tp=[1, 2], options={"wrong": ["no sum", ""]}, when=lambda case: case.world == 2)
def test_wrong(case):
    wrong = case["wrong"]
    case.check(mlp, lambda full, mesh: ParallelMLP(full, mesh["tp"], wrong), [torch.randn(3, 8)])

@parity.matrix(tp=[2])
def test_nothing(case):
    pass

def test_plain():
    pass
"""

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def parity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    (tmp_path / "test_layers_by_hand.py").write_text(TEST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.delitem(sys.modules, "test_layers_by_hand", raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_what_passes_and_what_does_not_fit(parity: Call) -> None:
    code, out, err = parity("check", "test_layers_by_hand.py:test_right", "-v")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "SKIP  tp16  test_right: it has 16 ranks, and there is room for 8"
    assert [line.split()[:2] for line in lines if line.startswith("PASS")] == [
        ["PASS", "tp1"],
        ["PASS", "tp2"],
    ]
    assert sum(line.startswith("  float32: gradient of ") for line in lines) == 10
    assert lines[-1] == "compared: 28 tensors"


def test_what_fails(parity: Call) -> None:
    code, out, _ = parity("check", "test_layers_by_hand:test_wrong")
    assert code == 1
    assert "FAIL  tp2-wrong=no sum" in out
    assert "a sum over tp (an all-reduce) is missing" in out
    assert "  again: parity check test_layers_by_hand:test_wrong --case 'tp2-wrong=no sum'" in out
    assert "\nPASS  tp2-wrong=" in out


def test_a_test_that_compares_nothing_is_no_success(parity: Call) -> None:
    code, out, _ = parity("check", "test_layers_by_hand:test_nothing")
    assert code == 3
    assert "tp2: it compared nothing; call case.check(...)" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["test_layers_by_hand:test_rihgt"],
            "test_layers_by_hand:test_rihgt: no such test in test_layers_by_hand (there are: "
            "test_right, test_wrong, test_nothing)",
        ),
        (
            ["test_layers_by_hand:test_plain"],
            "test_layers_by_hand:test_plain: test_plain has no cases; put @parity.matrix(tp=[1, 2])"
            " above it",
        ),
        (["no_such.py"], "no_such.py: no such file"),
        (
            ["no_such_module"],
            "no_such_module: ModuleNotFoundError: No module named 'no_such_module' (write it as "
            "my_module:test_mlp, or test_file.py:test_mlp)",
        ),
        (
            ["test_layers_by_hand:test_right", "--case", "tp3"],
            "--case tp3: no such case (there are: tp1, tp2, tp16)",
        ),
        (
            ["test_layers_by_hand:test_right", "--case", "tp16"],
            "nothing to run: every case is skipped",
        ),
    ],
)
def test_mistakes_in_the_command(parity: Call, words: list[str], said: str) -> None:
    code, _, err = parity("check", *words)
    assert (code, err) == (2, f"parity: {said}\n")


def test_layout_of_a_test(parity: Call) -> None:
    code, out, _ = parity("layout", "test_layers_by_hand.py:test_right", "--case", "tp2")
    assert code == 0
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "test_right[tp2]",
        "baseline shape candidate ranks holds",
        "---------- ------- ----------- ------- -----------------",
        "0.weight 12 x 8 up all dim 0 cut over tp",
        "0.bias 12 up_bias all dim 0 cut over tp",
        "2.weight 8 x 12 down all dim 1 cut over tp",
        "2.bias 8 bias all all of it",
        "",
    ]
