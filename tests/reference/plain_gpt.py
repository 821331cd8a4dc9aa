"""An ordinary GPT-2 on one device, and an ordinary training step: the independent baseline.

Nothing here comes from heiretsu or parity. Attention and loss are written out another way, the
whole batch goes through at once, and clipping and optimizers are torch's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttention(nn.Module):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).unbind(2)
        scores = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(d // self.heads)
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.proj(torch.einsum("bhij,bjhk->bihk", weights, v).reshape(b, t, d))


class PlainMLP(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class PlainBlock(nn.Module):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d_model)
        self.attn = PlainAttention(d_model, heads)
        self.ln_2 = nn.LayerNorm(d_model)
        self.mlp = PlainMLP(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    def __init__(
        self, vocab: int, context: int, d_model: int, heads: int, layers: int, tied: bool
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, d_model)
        self.wpe = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(PlainBlock(d_model, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(d_model)
        if not tied:
            self.lm_head = nn.Linear(d_model, vocab, bias=False)
        self.tied = tied

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        return x @ self.wte.weight.T if self.tied else self.lm_head(x)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the targets that are scored; 0 when none is."""
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    scored = targets != -100
    log_p = torch.log_softmax(logits[scored], -1)
    losses = -log_p[torch.arange(len(log_p)), targets[scored]]
    return losses.sum() / max(1, len(losses))


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Biases and norms are not decayed: everything with one dimension."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    spared = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
    )
