"""Layers by hand over tp, cp and ep pass without a word on where anything lies; mistakes do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import parity
from parity.subject.check import Differs, Kept
from tests.subject.by_hand import (
    VOCAB,
    WIDTH,
    Attention,
    ContextParallelAttention,
    ExpertParallel,
    Experts,
    VocabParallelEmbedding,
    ZigzagAttention,
)


def check(kept: Kept, axis: str, size: int, wrong: str = "") -> None:
    torch.manual_seed(0)
    case = parity.TestCase(parity.Case({axis: size}), kept=kept)
    x = torch.randn(4, 8, WIDTH)
    match axis:
        case "tp":
            case.check(
                lambda: nn.Embedding(VOCAB, WIDTH),
                lambda full, mesh: VocabParallelEmbedding(full, mesh["tp"], wrong),
                [torch.randint(0, VOCAB, (4, 8))],
            )
        case "cp":
            case.check(
                Attention,
                lambda full, mesh: ContextParallelAttention(full, mesh["cp"], wrong),
                [x],
                split={"cp": 1},
            )
        case "zigzag":
            case.check(
                Attention,
                lambda full, mesh: ZigzagAttention(full, mesh["zigzag"], wrong),
                [x],
                split={"zigzag": 1},
                zigzag=["zigzag"],
            )
        case "ep":
            case.check(
                Experts,
                lambda full, mesh: ExpertParallel(full, mesh["ep"], wrong),
                [x],
                split={"ep": 0},
            )


@pytest.mark.parametrize(
    ("axis", "size"),
    [(axis, size) for axis in ("cp", "zigzag", "ep") for size in (2, 4)] + [("tp", 3), ("tp", 4)],
)
def test_a_right_layer_passes(kept: Kept, axis: str, size: int) -> None:
    check(kept, axis, size)


@pytest.mark.parametrize(
    ("axis", "wrong", "said"),
    [
        ("tp", "not masked", "first divergence: forward of output"),
        ("cp", "no sum in backward", "culprit: backward of output of qkv"),
        ("cp", "mask of the first part", "only the pieces of rank 1 differ (cp=1)"),
        ("zigzag", "no sum in backward", "culprit: backward of output of qkv"),
        ("zigzag", "keys in the order of the ranks", "culprit: activation of input of out"),
        ("zigzag", "places as if contiguous", "culprit: activation of input of out"),
        (
            "ep",
            "router not summed",
            "the sum over ep of what the ranks hold equals the baseline: a sum over ep (an "
            "all-reduce) is missing",
        ),
        ("ep", "sorted the other way", "first divergence: forward of output"),
    ],
)
def test_a_wrong_layer_fails(kept: Kept, axis: str, wrong: str, said: str) -> None:
    with pytest.raises(Differs) as caught:
        check(kept, axis, 2, wrong)
    assert said in str(caught.value)


class Rows(nn.Module):
    """A product of which ranks may have some columns each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, WIDTH))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_over_a_zigzag_axis_other_dims_are_cut_as_ever() -> None:
    """By word, though they are as long as the sequence."""

    def columns(full: Any, mesh: Any) -> nn.Module:
        model = Rows()
        own = full["weight"].chunk(mesh["cp"].size())[mesh["cp"].get_local_rank()]
        model.weight = nn.Parameter(own.clone())
        return model

    case = parity.TestCase(parity.Case({"cp": 2}))
    for more in ({"output": {-1: "cp"}}, {"output": {2: "cp"}, "layout": {"weight": {0: "cp"}}}):
        case.check(
            Rows,
            columns,
            {"x": torch.randn(4, 8, WIDTH), "mask": torch.randn(4, 8)},
            split={"cp": 1},
            zigzag=["cp"],
            whole=["x"],
            **more,
        )
