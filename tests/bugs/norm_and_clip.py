"""Bugs of the norm of the whole gradient, and of the clipping by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import heiretsu.pipeline
import heiretsu.sync
import heiretsu.train
from heiretsu.comm import all_max, all_sum
from heiretsu.sync import clip, global_norm, gradients
from tests.bugs.bug import AFTER_GRADIENTS, Patch, bug

NORM = "norm of sgd by step"
MOMENT = "state of adamw exp_avg of wte.weight"  # the task clips in the steps of AdamW only


@bug(
    "ROCm/TransformerEngine#715; NVIDIA-NeMo/RL#3788",
    case="dp1-tp2-pp1",
    first=NORM,
    seen=AFTER_GRADIENTS,
    silent="dp2-tp1-pp1",
    diagnosis="counted often",
)
def norm_counts_replicated_parameters_tp_times() -> Iterable[Patch]:
    yield (
        heiretsu.sync,
        "counts_here",
        lambda name, is_whole, mesh: name != "wte.weight" or mesh.is_first_stage,
    )


@bug(
    "who counts what all hold is asked by the rank in the world, not in tp",
    case="dp2-tp1-pp1",
    first=NORM,
    seen=AFTER_GRADIENTS,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="some ranks",
)
def norm_asks_for_the_rank_in_the_world() -> Iterable[Patch]:
    yield heiretsu.sync, "counts_here", lambda name, is_whole, mesh: not is_whole or mesh.rank == 0


def within(*axes: str) -> Any:
    """The norm's sums, over these axes only."""
    return lambda x, mesh, axis: all_sum(x, mesh, axis) if axis in axes else x


@bug(
    "each pipeline stage clips by a norm of its own",
    case="dp1-tp1-pp2",
    first=NORM,
    seen=AFTER_GRADIENTS,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="not reduced",
)
def norm_of_the_own_stage_only() -> Iterable[Patch]:
    yield heiretsu.sync, "all_sum", within("dp", "tp")


@bug(
    "the norm is taken of the own shards",
    case="dp1-tp2-pp1",
    first=NORM,
    seen=AFTER_GRADIENTS,
    silent="dp1-tp1-pp2",
    status="split",
    diagnosis="not reduced",
)
def norm_of_the_own_shards_only() -> Iterable[Patch]:
    yield heiretsu.sync, "all_sum", within("dp", "pp")


@bug(
    "facebookresearch/fairscale#167 (the rule of another norm)",
    case="dp1-tp2-pp1",
    first=NORM,
    seen=AFTER_GRADIENTS,
    silent="dp2-tp1-pp1",
    diagnosis="not reduced",
)
def norm_is_the_largest_of_the_ranks() -> Iterable[Patch]:
    def largest(x: torch.Tensor, mesh: Any, axis: str) -> torch.Tensor:
        return all_sum(x, mesh, axis) if axis == "dp" else all_max(x, mesh, axis)

    yield heiretsu.sync, "all_sum", largest


@bug(
    "norms are added as they are, without squares",
    case="dp1-tp1-pp2",
    first=NORM,
    seen=AFTER_GRADIENTS,
    silent="dp2-tp1-pp1",
    diagnosis="norms added",
)
def norms_added_without_squares() -> Iterable[Patch]:
    def plain_sum(x: torch.Tensor, mesh: Any, axis: str) -> torch.Tensor:
        if axis == "dp":
            return all_sum(x, mesh, axis)
        return all_sum(x.sqrt(), mesh, axis).square()

    yield heiretsu.sync, "all_sum", plain_sum


@bug(
    "pytorch/pytorch#88955 (copies are counted like shards)",
    case="dp2-tp1-pp1",
    first=NORM,
    seen=AFTER_GRADIENTS,
    silent="dp1-tp2-pp1",
    diagnosis="counted often",
)
def norm_counts_replicas_too() -> Iterable[Patch]:
    def norm(model: Any) -> torch.Tensor:
        return all_sum(global_norm(model).square(), model.mesh, "dp").sqrt()

    yield heiretsu.train, "global_norm", norm


@bug(
    "the norm is taken before the gradients are summed over dp",
    case="dp2-tp1-pp1",
    first=NORM,
    seen=AFTER_GRADIENTS,
    silent="dp1-tp2-pp1",
    status="split",
)
def norm_taken_before_the_sum_over_dp() -> Iterable[Patch]:
    def average(model: Any, limit: int, right: Any = heiretsu.train.average) -> None:
        model.early = global_norm(model)
        right(model, limit)

    yield heiretsu.train, "average", average
    yield heiretsu.train, "global_norm", lambda model: model.early


# Found by a reviewer who looked for what the matrix could not see; the task was made harder since.
@bug(
    "the norm is divided out even where it is below the limit",
    case="dp2-tp1-pp1",
    first="state of sgd wte.weight",
    seen=AFTER_GRADIENTS,
    silent=None,
    diagnosis="step scaled",
)
def clipping_always_scales() -> Iterable[Patch]:
    def always(model: Any, norm: torch.Tensor, max_norm: float) -> None:
        for grad in gradients(model):
            grad.mul_(max_norm / norm)

    yield heiretsu.train, "clip", always


@bug(
    "each parameter is clipped by its own norm (as in: by that of its bucket)",
    case="dp1-tp1-pp1",
    first=MOMENT,
    seen="state",
    silent=None,
    steps=1,
    diagnosis="scaled",
)
def clipped_parameter_by_parameter() -> Iterable[Patch]:
    def each(model: Any, norm: torch.Tensor, max_norm: float) -> None:
        for grad in gradients(model):
            grad.mul_((max_norm / (grad.norm() + 1e-6)).clamp(max=1.0))

    yield heiretsu.train, "clip", each


@bug(
    "deepspeedai/DeepSpeed#3790 (no loss scale to undo, so clipping is left out with it)",
    case="dp1-tp1-pp1",
    first=MOMENT,
    seen="state",
    silent=None,
    steps=1,
    diagnosis="scaled",
)
def clipping_left_out() -> Iterable[Patch]:
    yield heiretsu.train, "clip", lambda model, norm, max_norm: None


@bug(
    "the loop clips, and so does the optimizer's wrapper, by the norm that it was given",
    case="dp1-tp1-pp1",
    first=MOMENT,
    seen="state",
    silent=None,
    steps=1,
    diagnosis="scaled",
)
def clipped_twice() -> Iterable[Patch]:
    def twice(model: Any, norm: torch.Tensor, max_norm: float) -> None:
        clip(model, norm, max_norm)
        clip(model, norm, max_norm)

    yield heiretsu.train, "clip", twice


@bug(
    "catalyst-team/catalyst#1319",
    case="dp1-tp1-pp1",
    first="norm of adamw by step",
    seen="norm state",
    silent=None,
    steps=1,
)
def clipped_after_each_microbatch() -> Iterable[Patch]:
    def filled(self: Any, batch: Any, right: Any = heiretsu.train.Trainer.gradients) -> Any:
        self.model.max_norm = self.run.max_norm
        return right(self, batch)

    def backward(self: Any, mb: int, right: Any = heiretsu.pipeline.Executor.backward) -> None:
        right(self, mb)
        clip(self.model, global_norm(self.model), self.model.max_norm)

    yield heiretsu.train.Trainer, "gradients", filled
    yield heiretsu.pipeline.Executor, "backward", backward
