"""A layer under autocast keeps few bits in float32: that is no drift, and hides no mistake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import parity
from parity.subject.check import Differs, How, TestCase
from tests.subject.layers import Copy, Sum


class Short(nn.Module):
    """`norm` stays outside of autocast, as people have it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.down(torch.relu(self.up(x)))
        result: Tensor = self.norm(y.to(x.dtype))
        return result


class ParallelShort(nn.Module):
    """`wrong` is the name of a mistake, or empty."""

    def __init__(self, full: Mapping[str, Tensor], mesh: DeviceMesh, wrong: str) -> None:
        super().__init__()
        n, r = mesh.size(), mesh.get_local_rank()
        self.group, self.wrong = mesh.get_group(), wrong
        self.up, self.down = nn.Linear(8, 12 // n), nn.Linear(12 // n, 8, bias=False)
        self.bias, self.norm = nn.Parameter(full["down.bias"].clone()), nn.LayerNorm(8)
        self.load_state_dict(
            {
                "up.weight": full["up.weight"].chunk(n)[r],
                "up.bias": full["up.bias"].chunk(n)[r],
                "down.weight": full["down.weight"].chunk(n, 1)[r],
                "bias": full["down.bias"],
                "norm.weight": full["norm.weight"],
                "norm.bias": full["norm.bias"],
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        own = x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if self.wrong != "no sum in backward":
                x = Copy.apply(x, self.group)
            y = self.down(torch.relu(self.up(x)))
            y = (y if self.wrong == "no sum" else Sum.apply(y, self.group)).to(own.dtype)
        if self.wrong == "coarser":
            y = y.round() if own.dtype == torch.float32 else y
        result: Tensor = self.norm(y + self.bias)
        return result


def check(wrong: str = "", **more: Any) -> parity.run.Result:
    torch.manual_seed(0)
    case = TestCase(parity.Case({"tp": 2}), How(again="pytest 'x[y]'"))
    return case.check(
        Short,
        lambda full, mesh: ParallelShort(full, mesh["tp"], wrong),
        [torch.randn(40, 8)],
        **more,
    )


KEPT = "the baseline itself keeps about 7 bits in float32 (autocast?), so finer drift is not seen"


ALONE = f"{KEPT}, nor are many mistakes: add float64"


@pytest.mark.parametrize(
    ("more", "said"), [({}, KEPT), ({"dtypes": ["float32"]}, ALONE)], ids=["with-float64", "alone"]
)
def test_fewer_bits_than_float32_has_are_no_drift(more: dict[str, Any], said: str) -> None:
    result = check(**more)
    assert result.status == "pass"
    assert result.coarse == said


def test_a_program_that_keeps_its_bits_is_held_to_them() -> None:
    result = check(dtypes=["float64", "bfloat16"])
    assert result.status == "pass"
    assert result.coarse == ""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("no sum", "a sum over tp (an all-reduce) is missing"),
        ("no sum in backward", "a sum over tp (an all-reduce) is missing"),
        ("coarser", "drift"),
    ],
)
def test_a_mistake_under_autocast_is_found(wrong: str, said: str) -> None:
    with pytest.raises(Differs) as caught:
        check(wrong)
    text = str(caught.value)
    assert said in text
    # What `up` takes in has its part of a gradient on each rank, and rightly so.
    assert "with that put right" not in text
    assert "a closer look" not in text
