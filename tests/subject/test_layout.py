"""What ranks hold, in words and as DTensor placements: by real ranks, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import parity
from parity.subject.alignment import Wholes, align
from parity.subject.layout import Layout
from tests.subject.cuts import CUTS, full
from tests.subject.layers import ParallelMLP, mlp


def of_cut(name: str) -> Layout:
    cut, wholes = next(c for c in CUTS if c.name == name), full()
    ranks = [align(lambda f, r=r: cut.keep(f, 4, r), wholes, Wholes(wholes)) for r in range(4)]
    return Layout({"a": 2, "b": 2} if name in ("two dims", "strided shard") else {"tp": 4}, ranks)


@pytest.mark.parametrize(
    ("cut", "whole", "placements"),
    [
        ("replicated", "w", (Replicate(),)),
        ("rows", "w", (Shard(0),)),
        ("columns", "w", None),  # 10 over 4 as tensor_split has it is no DTensor
        ("rows, the last shorter", "vocab", (Shard(0),)),
        ("two dims", "w", (Shard(0), Shard(1))),
        ("strided shard", "w", None),
        ("transposed", "w", None),
        ("a part of all experts", "experts", (Shard(2),)),
        ("rows backwards", "w", None),
        ("rows, padded", "vocab", None),
        ("q, k, v fused", "q", None),
        ("flattened", "w", None),
    ],
)
def test_what_is_a_dtensor_is_told_as_one(cut: str, whole: str, placements: Any) -> None:
    assert of_cut(cut).placements(whole) == placements


def lines(layout: Layout) -> list[str]:
    return [" ".join(line.split()) for line in layout.text().splitlines()[2:]]


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ("replicated", ["w 12 x 10 w all all of it", "b 12 b all all of it"]),
        ("columns", ["w 12 x 10 w all dim 1 cut over tp"]),
        ("two dims", ["w 12 x 10 w all dim 0 cut over a, dim 1 cut over b"]),
        ("scalar", ["scale 1 scale all all of it"]),
        (
            "transposed",
            [
                "w 12 x 10 w 0 [0:12, 0:3], transposed",
                "w 12 x 10 w 1 [0:12, 3:6], transposed",
                "w 12 x 10 w 2 [0:12, 6:8], transposed",
                "w 12 x 10 w 3 [0:12, 8:10], transposed",
            ],
        ),
        (
            "flat, over borders, padded",
            [
                "w 12 x 10 flat 0 [0:12, 0:10], flat, beside 1 others",
                "b 12 flat 0 [0:10], beside 1 others",
                "b 12 flat 1 [10:12], beside 1 others",
                "gate 24 x 16 flat 1 [0:8, 0:16], flat, beside 1 others",
                "gate 24 x 16 flat 2 [8:16, 0:16] [16:17, 0:2], flat",
                "gate 24 x 16 flat 3 [16:17, 2:16] [17:24, 0:16], flat, beside 1 others, 3 zeros "
                "of padding",
                "scale 1 flat 3 [], beside 1 others, 3 zeros of padding",
            ],
        ),
        (
            "every n-th row",
            [
                "vocab 13 x 8 v 0 [0:1, 0:8] [4:5, 0:8] [8:9, 0:8] [12:13, 0:8]",
                "vocab 13 x 8 v 1 [1:2, 0:8] [5:6, 0:8] [9:10, 0:8]",
                "vocab 13 x 8 v 2 [2:3, 0:8] [6:7, 0:8] [10:11, 0:8]",
                "vocab 13 x 8 v 3 [3:4, 0:8] [7:8, 0:8] [11:12, 0:8]",
            ],
        ),
    ],
)
def test_a_layout_in_words(cut: str, said: list[str]) -> None:
    assert lines(of_cut(cut)) == said


def tp_plan(full: Any, mesh: Any) -> nn.Module:
    model = mlp()
    model.load_state_dict(full)
    return parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


def test_of_what_torch_has_cut_on_real_ranks() -> None:
    layout = parity.layout(mlp, tp_plan, tp=3)
    assert {name: layout.placements(name) for name in layout.wholes} == {
        "0.weight": (Shard(0),),
        "0.bias": (Shard(0),),
        "2.weight": (Shard(1),),
        "2.bias": (Replicate(),),
    }


def test_fsdp_over_tp_is_told_by_its_boxes() -> None:
    """Rows are cut over tp first, and the rows of each tp rank over dp: no plain placements."""

    def candidate(full: Any, mesh: Any) -> nn.Module:
        return fully_shard(tp_plan(full, mesh), mesh=mesh["dp"])

    layout = parity.layout(mlp, candidate, dp=2, tp=2)
    assert layout.placements("0.weight") is None
    assert layout.placements("2.weight") == (Shard(0), Shard(1))
    assert lines(layout)[:4] == [
        "0.weight 12 x 8 0.weight 0 [0:3, 0:8]",
        "0.weight 12 x 8 0.weight 1 [6:9, 0:8]",
        "0.weight 12 x 8 0.weight 2 [3:6, 0:8]",
        "0.weight 12 x 8 0.weight 3 [9:12, 0:8]",
    ]


def test_of_a_layer_by_hand() -> None:
    layout = parity.layout(mlp, lambda full, mesh: ParallelMLP(full, mesh["tp"]), tp=2)
    assert lines(layout) == [
        "0.weight 12 x 8 up all dim 0 cut over tp",
        "0.bias 12 up_bias all dim 0 cut over tp",
        "2.weight 8 x 12 down all dim 1 cut over tp",
        "2.bias 8 bias all all of it",
    ]


def test_elements_of_nobody_are_told() -> None:
    wholes = {"w": torch.randn(4, 2)}
    held = align(lambda f: {"w": torch.cat([f["w"], torch.ones(2, 2)])}, wholes, Wholes(wholes))
    text = Layout({"tp": 1}, [held]).text()
    assert text.endswith("w: 4 elements on rank 0 are of no parameter of the baseline")
