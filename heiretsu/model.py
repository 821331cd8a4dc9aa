"""GPT-2 (pre-norm, learned positions), cut over tp inside its layers and over pp between them.

    B batch   T tokens   D model   F hidden   V vocabulary   H heads   K width of a head
    (small letters: this rank's part, see layers.py)

A model is built for a run of units: unit 0 is the embedding, units 1 to `layers` are the blocks,
the last is the head. A pipeline stage is such a run, and the whole model is the run of all of them.
Parameters keep the names that they have in the whole model.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heiretsu.config import Model
from heiretsu.layers import (
    ColumnLinear,
    RowLinear,
    VocabEmbedding,
    VocabHead,
    layouts,
    vocab_logits,
)
from heiretsu.layout import Layout, share
from heiretsu.mesh import Mesh
from heiretsu.rng import stream


class Attention(nn.Module):
    def __init__(self, config: Model, mesh: Mesh) -> None:
        super().__init__()
        self.width = config.d_model // config.heads
        self.qkv = ColumnLinear(mesh, config.d_model, 3 * config.d_model, blocks=3)
        self.proj = RowLinear(mesh, config.d_model, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BhTK, k_BhTK, v_BhTK = (
            part_BTd.unflatten(-1, (-1, self.width)).transpose(1, 2)
            for part_BTd in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        y_BhTK = F.scaled_dot_product_attention(q_BhTK, k_BhTK, v_BhTK, is_causal=True)
        return self.proj(y_BhTK.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: Model, mesh: Mesh) -> None:
        super().__init__()
        self.up = ColumnLinear(mesh, config.d_model, config.d_hidden)
        self.down = RowLinear(mesh, config.d_hidden, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: Model, mesh: Mesh) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, device=mesh.device)
        self.attn = Attention(config, mesh)
        self.ln_2 = nn.LayerNorm(config.d_model, device=mesh.device)
        self.mlp = MLP(config, mesh)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))  # type: ignore[no-any-return]


def stage_units(layers: int, stages: int, stage: int) -> range:
    """The units of one stage. Sizes differ by at most one; the first and the last stage carry the
    embedding and the head as one of theirs.
    """
    start, length = share(layers + 2, stages, stage)
    return range(start, start + length)


class GPT(nn.Module):
    """One pipeline stage: tokens_BT (first stage) or x_BTD -> x_BTD or logits_BTv (last stage)."""

    def __init__(self, config: Model, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        units = stage_units(config.layers, mesh.size("pp"), mesh.at.pp)
        # The last stage has a copy of a tied embedding, under the same name: it is the head.
        if mesh.is_first_stage or (mesh.is_last_stage and config.tied):
            self.wte = VocabEmbedding(mesh, config.vocab, config.d_model)
        if mesh.is_first_stage:
            self.wpe = nn.Embedding(config.context, config.d_model, device=mesh.device)
        blocks = {str(u - 1): Block(config, mesh) for u in units if 1 <= u <= config.layers}
        self.blocks = nn.ModuleDict(blocks)
        if mesh.is_last_stage:
            self.ln_f = nn.LayerNorm(config.d_model, device=mesh.device)
            if not config.tied:
                self.lm_head = VocabHead(mesh, config.vocab, config.d_model)

    @cached_property
    def parts(self) -> list[tuple[str, nn.Parameter, Layout]]:
        """Every parameter of this rank with its layout: asked for in each step, always the same."""
        return list(layouts(self))

    def forward(self, x: Tensor) -> Tensor:
        if self.mesh.is_first_stage:
            x = self.wte(x) + self.wpe.weight[: x.shape[1]]
        for block in self.blocks.values():
            x = block(x)
        return self._logits(self.ln_f(x)) if self.mesh.is_last_stage else x

    def _logits(self, x_BTD: Tensor) -> Tensor:
        if self.config.tied:
            return vocab_logits(x_BTD, self.wte.weight, self.mesh)
        return self.lm_head(x_BTD)  # type: ignore[no-any-return]


@torch.no_grad()
def initialise(model: GPT, seed: int) -> None:
    """GPT-2's initialisation: normal(0, 0.02), less by sqrt(2 layers) where a block joins the
    residual stream (GPT-2 report, section 2.3); biases zero, norms one.

    Every parameter is drawn whole, from a stream of its own, and cut: on every topology the same.
    """
    for name, parameter, layout in model.parts:
        kind = name.split(".")[-2:]
        if kind[1] == "bias":
            parameter.zero_()
        elif kind[0].startswith("ln_"):
            parameter.fill_(1.0)
        else:
            joins = kind[0] in ("proj", "down")
            std = 0.02 / math.sqrt(2 * model.config.layers) if joins else 0.02
            whole = torch.randn(layout.shape, generator=stream(seed, "init", name)) * std
            parameter.copy_(layout.take(whole, model.mesh.size("tp"), model.mesh.at.tp))
