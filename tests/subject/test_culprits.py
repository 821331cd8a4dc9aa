"""Each mistake is told once, at the module that makes it, in blocks as people write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import parity
from parity.subject.check import Differs, Kept, TestCase
from tests.subject.layers import Copy, Sum
from tests.subjects.models import HEAD, WIDTH, Block, FeedForward


class Attention(nn.Module):
    """With one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def net() -> nn.Module:
    blocks = nn.Sequential(Block(), Block())
    for block in blocks:
        block.attn = Attention()
    return nn.Sequential(blocks, nn.LayerNorm(WIDTH))


class Parallel:
    """What both layers have: a sum in the backward of what comes in, one of what goes out."""

    def __init__(self, mesh: DeviceMesh, wrong: str) -> None:
        self.group, self.wrong = mesh.get_group(), wrong.split(", ")
        self.n, self.r = mesh.size(), mesh.get_local_rank()

    def enter(self, x: Tensor, layer: str) -> Tensor:
        return x if f"no sum behind {layer}" in self.wrong else Copy.apply(x, self.group)

    def leave(self, x: Tensor, layer: str) -> Tensor:
        return x if f"no sum in {layer}" in self.wrong else Sum.apply(x, self.group)

    def linear(self, weight: Tensor, dim: int, bias: Tensor | None = None) -> nn.Linear:
        """Cut in `dim`; out of a fused weight, a part of each of its three."""
        fused = 3 if len(weight) == 3 * weight.shape[1] else 1
        cut = [w.tensor_split(self.n, dim)[self.r] for w in weight.chunk(fused)]
        layer = nn.Linear(1, 1, bias=bias is not None)
        layer.weight = nn.Parameter(torch.cat(cut))
        if bias is not None:
            layer.bias = nn.Parameter(bias.tensor_split(self.n)[self.r])
        return layer


class ParallelAttention(nn.Module):
    def __init__(self, full: Attention, tp: Parallel) -> None:
        super().__init__()
        self.tp = tp
        self.qkv, self.out = tp.linear(full.qkv.weight, 0), tp.linear(full.out.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.tp.enter(x, "attn")).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in qkv)
        if "values" in self.tp.wrong:
            v = 1.1 * v
        scale = 1.0 if "scale" in self.tp.wrong else None
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.tp.leave(y.transpose(1, 2).flatten(2) @ self.out.weight.T, "attn")


class ParallelMlp(nn.Module):
    def __init__(self, full: FeedForward, tp: Parallel) -> None:
        super().__init__()
        self.tp = tp
        self.up = tp.linear(full.up.weight, 0, full.up.bias)
        self.down = tp.linear(full.down.weight, 1)
        self.bias = nn.Parameter(full.down.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        approximate = "tanh" if "gelu" in self.tp.wrong else "none"
        x = F.gelu(self.up(self.tp.enter(x, "mlp")), approximate=approximate)
        return self.tp.leave(x @ self.down.weight.T, "mlp") + self.bias


def candidate(full: Mapping[str, Tensor], mesh: DeviceMesh, wrong: str) -> nn.Module:
    made, tp = net(), Parallel(mesh["tp"], wrong)
    made.load_state_dict(full)
    for block in made[0]:  # type: ignore[index]
        block.attn, block.mlp = ParallelAttention(block.attn, tp), ParallelMlp(block.mlp, tp)
    return made


@pytest.fixture(scope="module")
def kept() -> Kept:
    return Kept()


ATTENTION = "activation of output of 0.0.attn"
MLP = "activation of output of 0.0.mlp"
BEHIND_ATTENTION = "backward of input of 0.1.attn"
BEHIND_MLP = "backward of input of 0.1.mlp"


@pytest.mark.parametrize(
    ("wrong", "culprits"),
    [
        ("", []),
        ("scale", [ATTENTION]),
        ("values", [ATTENTION]),
        ("gelu", [MLP]),
        ("no sum in attn", [ATTENTION]),
        ("no sum behind mlp", [BEHIND_MLP]),
        ("values, no sum behind attn", [ATTENTION, BEHIND_ATTENTION]),
        ("scale, no sum behind mlp", [ATTENTION, BEHIND_MLP]),
        ("no sum in mlp, no sum behind attn", [MLP, BEHIND_ATTENTION]),
        ("gelu, no sum behind attn", [MLP, BEHIND_ATTENTION]),
        ("scale, gelu", [ATTENTION, MLP]),
    ],
)
def test_a_mistake_is_told_once(kept: Kept, wrong: str, culprits: list[str]) -> None:
    assert told(kept, net, candidate, wrong) == culprits


@pytest.mark.parametrize(
    ("wrong", "culprits"),
    [
        ("gelu", ["activation of output of the model"]),
        ("no sum in mlp", ["activation of output of the model"]),
        ("no sum behind mlp", ["backward of input of the model"]),
    ],
)
def test_of_one_layer_alone_too(kept: Kept, wrong: str, culprits: list[str]) -> None:
    assert told(kept, FeedForward, layer, wrong) == culprits


def layer(full: Mapping[str, Tensor], mesh: DeviceMesh, wrong: str) -> nn.Module:
    made = FeedForward()
    made.load_state_dict(full)
    return ParallelMlp(made, Parallel(mesh["tp"], wrong))


def told(kept: Kept, baseline: Any, candidate: Any, wrong: str) -> list[str]:
    """The culprits that the text names."""
    torch.manual_seed(0)
    case = TestCase(parity.Case({"tp": 2}), kept=kept)
    try:
        case.check(
            baseline, lambda full, mesh: candidate(full, mesh, wrong), [torch.randn(2, 5, WIDTH)]
        )
    except Differs as differs:
        lines = [line.strip() for line in str(differs).splitlines()]
        heads = ("culprit: ", "and, with that put right: ")
        return [line.removeprefix(h) for line in lines for h in heads if line.startswith(h)]
    return []
