"""Mistakes to plant in heiretsu: each a small patch, with where it must be seen, and where not.

A bug is itself a target (`tests.bugs.bugs:row_bias_on_every_rank`): called on a rank it patches
heiretsu for as long as the run takes. The identifiers in `source` are those of shared bug reports:
a public thread, or the mechanism in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import heiretsu.layers
import heiretsu.model
import heiretsu.pipeline
import heiretsu.sync
import heiretsu.train
from heiretsu.comm import all_sum, copy, reduce
from heiretsu.layers import IGNORE, vocab_cross_entropy
from parity import Run, Trace
from tests import bridge

Patch = tuple[object, str, Any]  # (whose attribute, its name, what it becomes)


@dataclass(frozen=True)
class Bug:
    """`case` must turn red, first at what begins with `first`, in the checks `seen`; `silent` must
    stay green.
    """

    name: str
    patches: Callable[[], Iterable[Patch]]
    source: str
    case: str
    first: str
    seen: str
    silent: str | None
    dtype: str

    def __call__(self, run: Run) -> Trace:
        with ExitStack() as planted:
            for owner, name, value in self.patches():
                planted.enter_context(mock.patch.object(owner, name, value))
            return bridge.candidate(run)


BUGS: list[Bug] = []


def bug(
    source: str, *, case: str, first: str, seen: str, silent: str | None, dtype: str = "float64"
) -> Callable[[Callable[[], Iterable[Patch]]], Bug]:
    def register(patches: Callable[[], Iterable[Patch]]) -> Bug:
        BUGS.append(Bug(patches.__name__, patches, source, case, first, seen, silent, dtype))
        return BUGS[-1]

    return register


EVERYTHING = "forward gradient norm state loss"
ALL_BUT_FORWARD = "gradient norm state loss"
LAST = "gradient of ln_f.bias"  # the first gradient that a backward pass finishes


@bug(
    "PaddlePaddle/Paddle#35186; litgpt's generate/tp.py",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
)
def row_bias_on_every_rank() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return reduce(F.linear(x, self.weight, self.bias), self.mesh, "tp")

    yield heiretsu.layers.RowLinear, "forward", forward


@bug(
    "the sum after a row-parallel product is forgotten",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
)
def no_reduce_after_row_product() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.bias

    yield heiretsu.layers.RowLinear, "forward", forward


@bug(
    "bigcode-project/Megatron-LM#35 (its mechanism: no f in front of what is cut)",
    case="dp1-tp2-pp1",
    first="gradient of blocks.5.ln_2.bias",
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
)
def no_sum_in_backward_of_column_input() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    yield heiretsu.layers.ColumnLinear, "forward", forward


@bug(
    "gradient sync forgotten, as in accumulation without a last sync",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
)
def gradients_not_averaged_over_dp() -> Iterable[Patch]:
    yield heiretsu.train, "average", lambda model, limit: None


@bug(
    "pytorch/pytorch#162338 (its mechanism: averaged by the reduction and once more by hand)",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
)
def gradients_averaged_twice() -> Iterable[Patch]:
    def average(model: Any, limit: int, once: Any = heiretsu.train.average) -> None:
        once(model, limit)
        for grad in heiretsu.sync.gradients(model):
            grad /= model.mesh.size("dp")

    yield heiretsu.train, "average", average


@bug(
    "picotron's pipeline_parallel.py: the loss that is printed is divided, the gradient is not",
    case="dp1-tp1-pp2",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
)
def loss_not_divided_by_microbatches() -> Iterable[Patch]:
    def loss_of(self: Any, microbatches: Any, right: Any = heiretsu.train.Trainer._loss_of) -> Any:
        def undivided(logits: torch.Tensor, mb: int) -> torch.Tensor:
            loss = right(self, microbatches)(logits, mb)
            return loss + (len(microbatches) - 1) * (loss - loss.detach())

        return undivided

    yield heiretsu.train.Trainer, "_loss_of", loss_of


@bug(
    "huggingface/transformers#34191 (its mechanism: a mean over means of unequal counts)",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
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
    "ROCm/TransformerEngine#715; NVIDIA-NeMo/RL#3788",
    case="dp1-tp2-pp1",
    first="norm of sgd by step",
    seen="norm state loss",
    silent="dp2-tp1-pp1",
)
def norm_counts_replicated_parameters_tp_times() -> Iterable[Patch]:
    yield (
        heiretsu.sync,
        "counts_here",
        lambda name, is_whole, mesh: name != "wte.weight" or mesh.is_first_stage,
    )


@bug(
    "each pipeline stage clips by a norm of its own",
    case="dp1-tp1-pp2",
    first="norm of sgd by step",
    seen="norm state loss",
    silent="dp1-tp2-pp1",
)
def norm_of_the_own_stage_only() -> Iterable[Patch]:
    def within_stage(x: torch.Tensor, mesh: Any, axis: str) -> torch.Tensor:
        return x if axis == "pp" else all_sum(x, mesh, axis)

    yield heiretsu.sync, "all_sum", within_stage


@bug(
    "the embedding of the first and of the last stage go their own ways",
    case="dp1-tp1-pp2",
    first="gradient of wte.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
)
def tied_gradient_not_summed() -> Iterable[Patch]:
    yield heiretsu.train, "sum_tied", lambda model: None


@bug(
    "picotron's checkpoint.py; fused q, k, v cut by contiguous rows",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
)
def fused_qkv_cut_as_one_block() -> Iterable[Patch]:
    def one_block(mesh: Any, d_in: int, d_out: int, blocks: int = 1) -> Any:
        return heiretsu.layers.ColumnLinear(mesh, d_in, d_out)

    yield heiretsu.model, "ColumnLinear", one_block


@bug(
    "1F1B takes the newest activations instead of the microbatch's own",
    case="dp1-tp1-pp2",
    first="gradient of blocks.2.mlp.down.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
)
def backward_with_the_wrong_microbatch() -> Iterable[Patch]:
    class Newest(dict):  # type: ignore[type-arg]
        def pop(self, mb: int) -> Any:
            return super().pop(max(self))

    def make(self: Any, *args: Any, right: Any = heiretsu.pipeline.Executor.__init__) -> None:
        right(self, *args)
        self.alive = Newest()

    yield heiretsu.pipeline.Executor, "__init__", make


def mixed_buckets(model: Any, limit: int) -> Iterable[list[torch.Tensor]]:
    # Whether bits differ depends on where the buckets end; with this limit they do.
    return heiretsu.sync._packed(heiretsu.sync.gradients(model)[::-1], 100_000)


# The next two were real, in the first version of heiretsu, and parity found them. Gloo and NCCL add
# in an order that depends on where an element lies in the buffer.


@bug(
    "found by parity: both ends of the pipeline reduce the tied gradient in unequal buckets",
    case="dp3-tp1-pp2",
    first="gradient of wte.weight",
    seen="gradient state",
    silent="dp2-tp1-pp1",
    dtype="float32",
)
def tied_gradient_summed_before_the_average() -> Iterable[Patch]:
    right = heiretsu.sync.sum_tied

    def average(model: Any, limit: int, once: Any = heiretsu.train.average) -> None:
        right(model)
        once(model, limit)

    yield heiretsu.train, "average", average
    yield heiretsu.train, "sum_tied", lambda model: None
    yield heiretsu.sync, "buckets", mixed_buckets


@bug(
    "found by parity: parameters that tp ranks share are reduced in buckets of unequal sizes",
    case="dp3-tp2-pp1",
    first="gradient of ",  # which one depends on the bits
    seen="gradient state",
    silent="dp2-tp2-pp1",
    dtype="float32",
)
def shared_parameters_in_mixed_buckets() -> Iterable[Patch]:
    yield heiretsu.sync, "buckets", mixed_buckets


@bug(
    "the gradient is summed again behind the row-parallel sum (pytorch/torchtitan#2106)",
    case="dp1-tp2-pp1",
    first="gradient of blocks.5.mlp.down.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
)
def reduce_sums_in_backward_too() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        partial = F.linear(x, self.weight)
        return copy(reduce(partial, self.mesh, "tp"), self.mesh, "tp") + self.bias

    yield heiretsu.layers.RowLinear, "forward", forward


# Found by a reviewer who looked for what the matrix could not see; the task was made harder since.


@bug(
    "the norm is divided out even where it is below the limit",
    case="dp2-tp1-pp1",
    first="state of sgd wte.weight",
    seen="norm state loss",
    silent=None,
)
def clipping_always_scales() -> Iterable[Patch]:
    def clip(model: Any, norm: torch.Tensor, max_norm: float) -> None:
        for grad in heiretsu.sync.gradients(model):
            grad.mul_(max_norm / norm)

    yield heiretsu.train, "clip", clip


@bug(
    "a gradient larger than a bucket fits into none",
    case="dp2-tp1-pp1",
    first="gradient of wte.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
)
def gradient_larger_than_a_bucket_is_left_out() -> Iterable[Patch]:
    def packed(grads: Any, limit: int, right: Any = heiretsu.sync._packed) -> Any:
        return right([grad for grad in grads if grad.nbytes <= limit], limit)

    yield heiretsu.sync, "_packed", packed


def off_by_one(first: int, last: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def in_my_vocabulary(ids: torch.Tensor, layout: Any, mesh: Any) -> Any:
        (_, start, length) = layout.spans(mesh.size("tp"), mesh.at.tp)[0]
        is_mine = (ids >= start + first * (start > 0)) & (ids < start + length - last)
        return torch.where(is_mine, ids - start, 0), is_mine

    return in_my_vocabulary


@bug(
    "the first entry of each later shard of the vocabulary is nobody's",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
)
def first_of_the_vocabulary_shard_lost() -> Iterable[Patch]:
    yield heiretsu.layers, "in_my_vocabulary", off_by_one(first=1, last=0)


@bug(
    "the last entry of each shard of the vocabulary is nobody's",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent=None,
)
def last_of_the_vocabulary_shard_lost() -> Iterable[Patch]:
    yield heiretsu.layers, "in_my_vocabulary", off_by_one(first=0, last=1)


@bug(
    "token 0 is taken for padding",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
)
def target_0_is_not_scored() -> Iterable[Patch]:
    def loss(
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab: int,
        mesh: Any,
        right: Any = vocab_cross_entropy,
    ) -> torch.Tensor:
        return right(logits, targets.masked_fill(targets == 0, IGNORE), vocab, mesh)

    yield heiretsu.train, "vocab_cross_entropy", loss
