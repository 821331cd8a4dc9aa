"""Bugs of accumulation: microbatches whose gradients get lost, count twice, or are summed early."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import heiretsu.pipeline
import heiretsu.train
from heiretsu.sync import average
from tests.bugs.bug import ALL_BUT_FORWARD, LAST, Patch, bug


@bug(
    "allenai/open-instruct#1498",
    case="dp1-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="parts",
)
def only_the_last_microbatch_counts() -> Iterable[Patch]:
    def backward(self: Any, mb: int, right: Any = heiretsu.pipeline.Executor.backward) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        right(self, mb)

    yield heiretsu.pipeline.Executor, "backward", backward


@bug(
    "AMD-AGI/Primus#1046 (weights of linear layers are 'added already' from then on)",
    case="dp1-tp1-pp1",
    first="gradient of blocks.5.mlp.down.weight",
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="parts",
)
def weights_take_two_microbatches_only() -> Iterable[Patch]:
    def backward(self: Any, mb: int, right: Any = heiretsu.pipeline.Executor.backward) -> None:
        weights = [p for n, p, _ in self.model.parts if n.startswith("blocks") and p.ndim == 2]
        before = [None if p.grad is None else p.grad.clone() for p in weights]
        right(self, mb)
        for parameter, grad in zip(weights, before, strict=True):
            if mb > 1:  # the first one holds no targets in the task
                parameter.grad = grad

    yield heiretsu.pipeline.Executor, "backward", backward


@bug(
    "gradients are not cleared after the step (as in NVIDIA/Megatron-LM#4609)",
    case="dp1-tp1-pp1",
    first="norm of adamw by step",  # the first step is right
    seen="norm state",
    silent=None,
    diagnosis="carried over",
)
def gradients_of_the_last_step_stay() -> Iterable[Patch]:
    def gradients(self: Any, batch: Any, right: Any = heiretsu.train.Trainer.gradients) -> Any:
        self.optimizer.zero_grad = lambda: None
        return right(self, batch)

    yield heiretsu.train.Trainer, "gradients", gradients


@bug(
    "karpathy/build-nanogpt#30 (its mechanism: the sync is not off where gradients pile up)",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="parts",
)
def sums_over_dp_after_each_microbatch() -> Iterable[Patch]:
    def backward(self: Any, mb: int, right: Any = heiretsu.pipeline.Executor.backward) -> None:
        right(self, mb)
        average(self.model, 1 << 30)

    yield heiretsu.pipeline.Executor, "backward", backward
    yield heiretsu.train, "average", lambda model, limit: None


@bug(
    "the sum over dp is begun before the last microbatch has been added",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="parts",
)
def sum_over_dp_misses_the_last_microbatch() -> Iterable[Patch]:
    def backward(self: Any, mb: int, right: Any = heiretsu.pipeline.Executor.backward) -> None:
        if mb == len(self.tokens) - 1:
            average(self.model, 1 << 30)
        right(self, mb)

    yield heiretsu.pipeline.Executor, "backward", backward
    yield heiretsu.train, "average", lambda model, limit: None
