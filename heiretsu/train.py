"""One training step on every rank: gradients of the global batch, norm, clip, update.

The batch is global and every rank knows it (data.py); a rank takes its dp share, cut into
microbatches. The loss is the mean over the valid tokens of the *global* batch, so each microbatch
is divided by that one number, and neither ranks nor microbatches need hold equally many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from heiretsu.comm import all_sum
from heiretsu.config import Run
from heiretsu.layers import IGNORE, vocab_cross_entropy
from heiretsu.layout import share
from heiretsu.mesh import Mesh
from heiretsu.model import GPT, initialise
from heiretsu.pipeline import Executor
from heiretsu.schedule import SCHEDULES, simulate
from heiretsu.sync import average, clip, global_norm, sum_tied


class Batch(NamedTuple):
    """The global batch of a step: tokens and targets, (batch, sequence) int64 each."""

    tokens: Tensor
    targets: Tensor

    def part(self, parts: int, index: int) -> Batch:
        start, length = share(len(self.tokens), parts, index)
        return Batch(self.tokens.narrow(0, start, length), self.targets.narrow(0, start, length))


class Trainer:
    """The model stage of this rank with its optimizer. Every rank makes one and calls it alike."""

    def __init__(self, run: Run, mesh: Mesh) -> None:
        self.run, self.mesh = run, mesh
        schedule = SCHEDULES[run.schedule](mesh.size("pp"), run.microbatches)
        simulate(schedule)
        self.actions = schedule[mesh.at.pp]
        self.model = GPT(run.model, mesh).to(getattr(torch, run.dtype))
        initialise(self.model, run.seed)
        self.optimizer = make_optimizer(self.model, run)

    def gradients(self, batch: Batch) -> Tensor:
        """Fill every `.grad` with the gradient of the mean loss, and return that loss (scalar)."""
        self.optimizer.zero_grad()
        mine = batch.part(self.mesh.size("dp"), self.mesh.at.dp)
        microbatches = [
            Batch(*(x.to(self.mesh.device) for x in mine.part(self.run.microbatches, mb)))
            for mb in range(self.run.microbatches)
        ]
        loss_of = self._loss_of(microbatches)
        losses = Executor(self.model, [mb.tokens for mb in microbatches], loss_of).run(self.actions)
        average(self.model, self.run.bucket_bytes)
        sum_tied(self.model)
        return self._global_loss(losses)

    def update(self) -> Tensor:
        """Clip, step, and return the norm of the gradient before clipping (scalar)."""
        norm = global_norm(self.model)
        clip(self.model, norm, self.run.max_norm)
        self.optimizer.step()
        return norm

    def _loss_of(self, microbatches: list[Batch]) -> Callable[[Tensor, int], Tensor]:
        """Only the last stage is asked for losses, and its dp line knows the count."""
        if not self.mesh.is_last_stage:
            return _no_loss
        scored = sum((mb.targets != IGNORE).sum() for mb in microbatches)
        tokens = all_sum(torch.as_tensor(scored), self.mesh, "dp").clamp(min=1)

        def loss_of(logits_BTv: Tensor, mb: int) -> Tensor:
            targets_BT = microbatches[mb].targets
            vocab = self.run.model.vocab
            return vocab_cross_entropy(logits_BTv, targets_BT, vocab, self.mesh) / tokens

        return loss_of

    def _global_loss(self, losses: list[Tensor]) -> Tensor:
        """The last stage knows its microbatches' terms; with the sum over pp, all ranks do."""
        dtype = torch.promote_types(getattr(torch, self.run.dtype), torch.float32)
        total = torch.zeros((), dtype=dtype, device=self.mesh.device)
        for loss in losses:
            total += loss
        return all_sum(all_sum(total, self.mesh, "dp"), self.mesh, "pp")


def _no_loss(x_BTD: Tensor, mb: int) -> Tensor:
    raise AssertionError("a stage that is not the last one has no loss")


def make_optimizer(model: GPT, run: Run) -> torch.optim.Optimizer:
    """SGD, or AdamW (arXiv 1711.05101) that decays what is multiplied: matrices and embeddings,
    neither biases nor norms.
    """
    if run.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=run.lr)
    groups = [
        {"params": [p for _, p, _ in model.parts if p.ndim >= 2], "weight_decay": run.weight_decay},
        {"params": [p for _, p, _ in model.parts if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), eps=1e-8)
