"""Bugs of the data: who reads which rows, in which order, with which targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import heiretsu.data
import heiretsu.train
from heiretsu.layers import IGNORE
from heiretsu.rng import stream
from heiretsu.train import Batch
from tests.bugs.bug import ALL_BUT_FORWARD, EVERYTHING, LAST, Patch, bug


def reading(read: Callable[[Any, Batch], Batch]) -> Any:
    """Trainer.gradients of another batch: read(trainer, batch) in place of the global one."""
    right = heiretsu.train.Trainer.gradients
    return lambda self, batch: right(self, read(self, batch))


def rows(batch: Batch, order: Any) -> Batch:
    return Batch(batch.tokens[order], batch.targets[order])


@bug(
    "no distributed sampler: every dp rank reads the share of the first one",
    case="dp2-tp1-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp1-tp2-pp1",
    diagnosis="other rows",
)
def every_dp_rank_reads_the_first_share() -> Iterable[Patch]:
    def read(self: Any, batch: Batch) -> Batch:
        dp = self.mesh.size("dp")
        return Batch(*(x[: len(x) // dp].repeat(dp, 1) for x in batch))

    yield heiretsu.train.Trainer, "gradients", reading(read)


@bug(
    "deepspeedai/DeepSpeed#99",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    status="hole",
    diagnosis="split",
)
def data_cut_over_all_ranks() -> Iterable[Patch]:
    def read(self: Any, batch: Batch) -> Batch:
        others = self.mesh.topology.world // self.mesh.size("dp")
        own = self.mesh.rank % others
        return batch.part(others, own)

    yield heiretsu.train.Trainer, "gradients", reading(read)


@bug(
    "huggingface/accelerate#3092 (its mechanism: tp peers of one replica read different rows)",
    case="dp2-tp2-pp1",  # right wherever dp is the whole world
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="shifted",
)
def data_chosen_by_rank_modulo_dp() -> Iterable[Patch]:
    def read(self: Any, batch: Batch) -> Batch:
        dp, at = self.mesh.size("dp"), self.mesh.at.dp
        shift = (self.mesh.rank % dp - at) * (len(batch.tokens) // dp)
        return Batch(*(x.roll(-shift, 0) for x in batch))

    yield heiretsu.train.Trainer, "gradients", reading(read)


@bug(
    "huggingface/accelerate#3520",
    case="dp2-tp1-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp1-tp2-pp1",
    status="hole",
    diagnosis="hole",
)
def data_cut_twice() -> Iterable[Patch]:
    def read(self: Any, batch: Batch) -> Batch:
        return batch.part(self.mesh.size("dp"), self.mesh.at.dp)

    yield heiretsu.train.Trainer, "gradients", reading(read)


@bug(
    "each dp rank gets the same number of rows, and the rest is dropped",
    case="dp3-tp1-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    status="hole",
    diagnosis="hole",
)
def remainder_of_the_batch_dropped() -> Iterable[Patch]:
    def read(self: Any, batch: Batch) -> Batch:
        even = len(batch.tokens) // self.mesh.size("dp") * self.mesh.size("dp")
        return rows(batch, slice(even))

    yield heiretsu.train.Trainer, "gradients", reading(read)


@bug(
    "the order is shuffled with the rank as seed, before each rank takes its share",
    case="dp2-tp1-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent=None,
    diagnosis="other rows",
)
def order_shuffled_by_rank() -> Iterable[Patch]:
    def read(self: Any, batch: Batch) -> Batch:
        order = torch.randperm(len(batch.tokens), generator=stream(self.mesh.rank, "order"))
        return rows(batch, order)

    yield heiretsu.train.Trainer, "gradients", reading(read)


@bug(
    "NVIDIA-NeMo/Megatron-Bridge#5944 (its mechanism: rows are dealt out in turn, not in shares)",
    case="dp2-tp1-pp1",
    first="forward of logits",
    seen="forward",  # the sum over the batch is the same
    silent="dp1-tp2-pp1",
    diagnosis="reordered",
)
def rows_dealt_out_in_turn() -> Iterable[Patch]:
    def read(self: Any, batch: Batch) -> Batch:
        dp = self.mesh.size("dp")
        return rows(batch, torch.arange(len(batch.tokens)).view(-1, dp).T.flatten())

    yield heiretsu.train.Trainer, "gradients", reading(read)


@bug(
    "huggingface/transformers#36607 (its mechanism: targets that are shifted already)",
    case="dp1-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="picked",
)
def targets_shifted_once_more() -> Iterable[Patch]:
    def read(self: Any, batch: Batch) -> Batch:
        targets = batch.targets.roll(-1, 1)
        targets[:, -1] = IGNORE
        return Batch(batch.tokens, targets)

    yield heiretsu.train.Trainer, "gradients", reading(read)


@bug(
    "the seed of the data is that of the rank",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp1-tp1-pp1",
    diagnosis="some ranks",
)
def every_rank_draws_its_own_batch() -> Iterable[Patch]:
    def batch(self: Any, seed: int, *rest: Any, right: Any = heiretsu.data.Corpus.batch) -> Any:
        return right(self, seed + torch.distributed.get_rank(), *rest)

    yield heiretsu.data.Corpus, "batch", batch
