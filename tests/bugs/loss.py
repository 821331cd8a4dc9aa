"""Bugs of the loss: what it is divided by, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import heiretsu.train
from heiretsu.comm import all_sum
from heiretsu.layers import IGNORE, vocab_cross_entropy
from tests.bugs.bug import ALL_BUT_FORWARD, LAST, Patch, bug


def scored(microbatches: Any) -> torch.Tensor:
    return torch.as_tensor(sum((mb.targets != IGNORE).sum() for mb in microbatches))


def divided_by(count: Callable[[Any, Any], torch.Tensor]) -> Any:
    """Trainer._loss_of with another number of tokens: count(trainer, microbatches)."""

    def loss_of(self: Any, microbatches: Any) -> Any:
        tokens = count(self, microbatches).clamp(min=1)

        def loss(logits: torch.Tensor, mb: int) -> torch.Tensor:
            targets, vocab = microbatches[mb].targets, self.run.model.vocab
            return vocab_cross_entropy(logits, targets, vocab, self.mesh) / tokens

        return loss

    return loss_of


@bug(
    "huggingface/transformers#34191 (its mechanism: a mean over means of unequal counts)",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="rows scaled",
)
def mean_of_means() -> Iterable[Patch]:
    def loss_of(self: Any, microbatches: Any) -> Any:
        def mean(logits: torch.Tensor, mb: int) -> torch.Tensor:
            targets = microbatches[mb].targets
            total = vocab_cross_entropy(logits, targets, self.run.model.vocab, self.mesh)
            own = (targets != IGNORE).sum().clamp(min=1)
            return total / own / len(microbatches) / self.mesh.size("dp")

        return mean

    yield heiretsu.train.Trainer, "_loss_of", loss_of


@bug(
    "NVIDIA-NeMo/Speech#8343 (its mechanism: each sequence weighs the same, however short)",
    case="dp1-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="rows scaled",
)
def mean_of_each_sequence() -> Iterable[Patch]:
    def loss_of(self: Any, microbatches: Any) -> Any:
        def mean(logits: torch.Tensor, mb: int) -> torch.Tensor:
            vocab, total = self.run.model.vocab, torch.zeros(())
            for row, targets in zip(logits, microbatches[mb].targets, strict=True):
                loss = vocab_cross_entropy(row, targets, vocab, self.mesh)
                total = total + loss / (targets != IGNORE).sum().clamp(min=1)
            return total / self.run.batch

        return mean

    yield heiretsu.train.Trainer, "_loss_of", loss_of


@bug(
    "huggingface/transformers#34242",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="rows scaled",
)
def tokens_not_counted_over_dp() -> Iterable[Patch]:
    yield (
        heiretsu.train.Trainer,
        "_loss_of",
        divided_by(lambda self, microbatches: scored(microbatches) * self.mesh.size("dp")),
    )


@bug(
    "huggingface/transformers#39674",
    case="dp1-tp2-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="scaled",
)
def tokens_counted_over_tp_too() -> Iterable[Patch]:
    def count(self: Any, microbatches: Any) -> torch.Tensor:
        return all_sum(all_sum(scored(microbatches), self.mesh, "dp"), self.mesh, "tp")

    yield heiretsu.train.Trainer, "_loss_of", divided_by(count)


@bug(
    "mosaicml/composer#3273",
    case="dp1-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="scaled",
)
def tokens_counted_that_are_not_scored() -> Iterable[Patch]:
    def count(self: Any, microbatches: Any) -> torch.Tensor:
        return torch.tensor(self.run.batch * self.run.sequence)

    yield heiretsu.train.Trainer, "_loss_of", divided_by(count)


@bug(
    "NVIDIA/Megatron-LM#906 (its mechanism: a factor against an average that is not made)",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="scaled",
)
def loss_multiplied_by_dp() -> Iterable[Patch]:
    def loss_of(self: Any, microbatches: Any, right: Any = heiretsu.train.Trainer._loss_of) -> Any:
        loss = right(self, microbatches)
        return lambda logits, mb: loss(logits, mb) * self.mesh.size("dp")

    yield heiretsu.train.Trainer, "_loss_of", loss_of


@bug(
    "each dp rank reports the loss of its own tokens",
    case="dp2-tp1-pp1",
    first="loss of sgd by step",
    seen="loss",
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="not reduced",
)
def reported_loss_not_summed_over_dp() -> Iterable[Patch]:
    def total(self: Any, losses: Any) -> torch.Tensor:
        return all_sum(torch.stack(losses).sum(), self.mesh, "pp")

    yield heiretsu.train.Trainer, "_global_loss", total


@bug(
    "the loss is reported where the last stage is not",
    case="dp1-tp1-pp2",
    first="loss of sgd by step",
    seen="loss",
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="not reduced",
)
def reported_loss_stays_on_the_last_stage() -> Iterable[Patch]:
    def total(self: Any, losses: Any) -> torch.Tensor:
        mine = sum(losses, torch.zeros((), dtype=getattr(torch, self.run.dtype)))
        return all_sum(mine, self.mesh, "dp")

    yield heiretsu.train.Trainer, "_global_loss", total


@bug(
    "the loss of the last microbatch is reported for the batch",
    case="dp1-tp1-pp1",
    first="loss of sgd by step",
    seen="loss",
    silent=None,
)
def reported_loss_of_one_microbatch() -> Iterable[Patch]:
    def total(self: Any, losses: Any, right: Any = heiretsu.train.Trainer._global_loss) -> Any:
        return right(self, losses[-1:] * len(losses))

    yield heiretsu.train.Trainer, "_global_loss", total
