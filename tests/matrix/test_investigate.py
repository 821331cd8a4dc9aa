"""Two mistakes in one program are both told, the quiet one too; parity explain shows where."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from parity import Run, Trace
from parity.cli import main
from tests import bridge
from tests.bugs.data_parallel import gradients_averaged_twice
from tests.bugs.tensor_parallel import no_reduce_after_row_product


def two_mistakes(run: Run) -> Trace:
    """No sum behind row-parallel products, and gradients averaged twice: the first is loud."""
    with ExitStack() as planted:
        for bug in (no_reduce_after_row_product, gradients_averaged_twice):
            bug.plant(planted)
        return bridge.candidate(run)


MATRIX = """
target: tests.matrix.test_investigate:two_mistakes
baselines: {plain: tests.bridge:plain}
axes: {dp: [2], tp: [2], pp: [1]}
dtypes: [float64]
steps: 2
options: {preset: matrix, tied: true, data: topics, batch: 64, sequence: 16, micro_batches: 2}
"""


def test_a_loud_mistake_does_not_hide_a_quiet_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(MATRIX)
    assert main(["explain", str(matrix)]) == 1
    said = capsys.readouterr().out
    culprits = [line for line in said.splitlines() if line.startswith("culprit: ")]
    assert culprits == [
        "culprit: activation of output of blocks.0.attn.proj",
        "culprit: activation of output of blocks.0.mlp.down",
        "culprit: gradient of ln_f.bias",
    ]
    assert "equals the baseline, but for blocks.0.attn.proj.bias: a sum over tp" in said
    assert "it is 1/2 (dp or tp or micro_batches) times the baseline" in said
    assert "rank 3" in said
