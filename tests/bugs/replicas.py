"""Bugs that let copies of the same parameters go their own ways."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import heiretsu.sync
import heiretsu.train
from tests.bugs.bug import AFTER_GRADIENTS, Patch, bug


@bug(
    "bigscience-workshop/Megatron-DeepSpeed#271 (what tp ranks share is clipped on one of them)",
    case="dp1-tp2-pp1",
    first="state of adamw exp_avg of wpe.weight",
    seen="state",
    silent="dp2-tp1-pp1",
    status="split",
    steps=1,
    diagnosis="scaled",
)
def shared_parameters_clipped_on_one_tp_rank() -> Iterable[Patch]:
    def clip(model: Any, norm: torch.Tensor, max_norm: float) -> None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for _, parameter, layout in model.parts:
            if layout.cut is not None or model.mesh.at.tp == 0:
                parameter.grad.mul_(factor)

    yield heiretsu.train, "clip", clip


@bug(
    "each dp rank updates its share of the parameters, and the others never get it",
    case="dp2-tp1-pp1",
    first="state of sgd wte.weight",
    seen=AFTER_GRADIENTS,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="stale",
)
def updated_shares_are_not_gathered() -> Iterable[Patch]:
    @torch.no_grad()
    def update(self: Any, right: Any = heiretsu.train.Trainer.update) -> Any:
        others = {
            parameter: parameter.clone()
            for i, parameter in enumerate(self.model.parameters())
            if i % self.mesh.size("dp") != self.mesh.at.dp
        }
        norm = right(self)
        for parameter, old in others.items():
            parameter.copy_(old)
        return norm

    yield heiretsu.train.Trainer, "update", update


@bug(
    "hpcaitech/ColossalAI#18 (each tp rank looks for overflows in its own gradients)",
    case="dp1-tp2-pp1",
    first="state of sgd wte.weight",
    seen=AFTER_GRADIENTS,
    silent=None,
    diagnosis="some ranks",
)
def one_tp_rank_skips_the_step() -> Iterable[Patch]:
    loss_scale = float(7 << 15)  # of two tp ranks, one holds a gradient that is too large for it

    def update(self: Any, right: Any = heiretsu.train.Trainer.update) -> Any:
        scaled = [(grad * loss_scale).half() for grad in heiretsu.sync.gradients(self.model)]
        step = self.optimizer.step
        if not all(grad.isfinite().all() for grad in scaled):
            self.optimizer.step = lambda: None
        norm = right(self)
        self.optimizer.step = step
        return norm

    yield heiretsu.train.Trainer, "update", update
