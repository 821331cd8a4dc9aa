"""Bugs of the optimizer's step: its groups, its numbers, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import heiretsu.layers
import heiretsu.train
from tests.bugs.bug import AFTER_GRADIENTS, Patch, bug


def adamw_with(change: Callable[[Any, Any, Any], Any]) -> Any:
    """make_optimizer, after which change(optimizer, model, run) is called for AdamW."""
    right = heiretsu.train.make_optimizer

    def make(model: Any, run: Any) -> Any:
        optimizer = right(model, run)
        if run.optimizer == "adamw":
            change(optimizer, model, run)
        return optimizer

    return make


@bug(
    "ServiceNow/Fast-LLM#542",
    case="dp1-tp1-pp1",
    first="state of adamw blocks.0.ln_1.weight",
    seen="state",
    silent=None,
    steps=1,
    diagnosis="decay",
)
def norms_and_biases_are_decayed() -> Iterable[Patch]:
    def change(optimizer: Any, model: Any, run: Any) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = run.weight_decay

    yield heiretsu.train, "make_optimizer", adamw_with(change)


@bug(
    "what is decayed is told by the dimensions, after the parameters were flattened",
    case="dp2-tp1-pp1",
    first="state of adamw wte.weight",
    seen="state",
    silent="dp1-tp2-pp1",
    steps=1,
    diagnosis="decay",
)
def flattened_parameters_are_not_decayed() -> Iterable[Patch]:
    def change(optimizer: Any, model: Any, run: Any) -> None:
        if model.mesh.size("dp") > 1:
            optimizer.param_groups[0]["weight_decay"] = 0.0

    yield heiretsu.train, "make_optimizer", adamw_with(change)


@bug(
    "what is cut is decayed as a shard, and again as a part of the whole",
    case="dp1-tp2-pp1",
    first="state of adamw wte.weight",
    seen="state",
    silent="dp2-tp1-pp1",
    steps=1,
    diagnosis="decay",
)
def shards_are_decayed_twice() -> Iterable[Patch]:
    def change(optimizer: Any, model: Any, run: Any) -> None:
        cut = [p for _, p, layout in model.parts if layout.cut is not None and p.ndim == 2]

        @torch.no_grad()
        def decay(*_: Any) -> None:
            for parameter in cut if model.mesh.size("tp") > 1 else []:
                parameter.mul_(1 - run.lr * run.weight_decay)

        optimizer.register_step_pre_hook(decay)

    yield heiretsu.train, "make_optimizer", adamw_with(change)


@bug(
    "decay as a term of the gradient (Adam where AdamW is meant)",
    case="dp1-tp1-pp1",
    first="state of adamw exp_avg of wte.weight",
    seen="state",
    silent=None,
    steps=1,
    diagnosis="decay",
)
def decay_goes_through_the_moments() -> Iterable[Patch]:
    def change(optimizer: Any, model: Any, run: Any) -> None:
        for group in optimizer.param_groups:
            group["decoupled_weight_decay"] = False

    yield heiretsu.train, "make_optimizer", adamw_with(change)


@bug(
    "groups rebuilt for shards come without their betas",
    case="dp1-tp1-pp1",
    first="state of adamw exp_avg_sq of wte.weight",
    seen="state",
    silent=None,
    steps=1,
    diagnosis="scaled",
)
def betas_of_the_library() -> Iterable[Patch]:
    def change(optimizer: Any, model: Any, run: Any) -> None:
        for group in optimizer.param_groups:
            group["betas"] = (0.9, 0.999)

    yield heiretsu.train, "make_optimizer", adamw_with(change)


@bug(
    "a fused step has eps inside of the root",
    case="dp1-tp1-pp1",
    first="state of adamw wte.weight",
    seen="state",
    silent=None,
    steps=1,
)
def eps_inside_of_the_root() -> Iterable[Patch]:
    @torch.no_grad()
    def step(optimizer: Any, right: Any) -> None:
        olds = [p.clone() for group in optimizer.param_groups for p in group["params"]]
        right()
        for group in optimizer.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                t = int(state["step"])
                mean = state["exp_avg"] / (1 - beta1**t)
                root = (state["exp_avg_sq"] / (1 - beta2**t) + group["eps"]).sqrt()
                kept = olds.pop(0) * (1 - group["lr"] * group["weight_decay"])
                parameter.copy_(kept - group["lr"] * mean / root)

    def change(optimizer: Any, model: Any, run: Any) -> None:
        right = optimizer.step
        optimizer.step = lambda: step(optimizer, right)

    yield heiretsu.train, "make_optimizer", adamw_with(change)


@bug(
    "the steps of the bias correction count microbatches",
    case="dp1-tp1-pp1",
    first="state of adamw wte.weight",
    seen="state",
    silent=None,
)
def bias_correction_counts_microbatches() -> Iterable[Patch]:
    def change(optimizer: Any, model: Any, run: Any) -> None:
        def count(*_: Any) -> None:
            for state in optimizer.state.values():
                state["step"] += run.microbatches - 1

        optimizer.register_step_post_hook(count)

    yield heiretsu.train, "make_optimizer", adamw_with(change)


@bug(
    "areal-project/AReaL#1468 (its mechanism: moments that are made anew)",
    case="dp1-tp1-pp1",
    first="state of adamw exp_avg of wte.weight",
    seen="state",
    silent=None,
)
def moments_are_lost_between_steps() -> Iterable[Patch]:
    def change(optimizer: Any, model: Any, run: Any) -> None:
        optimizer.register_step_pre_hook(lambda *_: optimizer.state.clear())

    yield heiretsu.train, "make_optimizer", adamw_with(change)


@bug(
    "the learning rate is scaled by the replicas, though the batch is not",
    case="dp2-tp1-pp1",
    first="state of sgd wte.weight",
    seen="state",
    silent="dp1-tp2-pp1",
    steps=1,
    diagnosis="step scaled",
)
def learning_rate_multiplied_by_dp() -> Iterable[Patch]:
    def make(model: Any, run: Any, right: Any = heiretsu.train.make_optimizer) -> Any:
        optimizer = right(model, run)
        for group in optimizer.param_groups:
            group["lr"] *= model.mesh.size("dp")
        return optimizer

    yield heiretsu.train, "make_optimizer", make


@bug(
    "NVIDIA/Megatron-LM#174",
    case="dp1-tp1-pp1",
    first="state of sgd wte.weight",
    seen=AFTER_GRADIENTS,
    silent=None,
)
def optimizer_steps_on_masters_of_the_random_model() -> Iterable[Patch]:
    @torch.no_grad()
    def make(self: Any, *args: Any, right: Any = heiretsu.train.Trainer.__init__) -> None:
        right(self, *args)
        self.masters = [p.clone() for p in self.model.parameters()]

    @torch.no_grad()
    def update(self: Any, right: Any = heiretsu.train.Trainer.update) -> Any:
        for parameter, master in zip(self.model.parameters(), self.masters, strict=True):
            parameter.copy_(master)
        norm = right(self)
        self.masters = [p.clone() for p in self.model.parameters()]
        return norm

    yield heiretsu.train.Trainer, "__init__", make
    yield heiretsu.train.Trainer, "update", update


@bug(
    "NVIDIA/TransformerEngine#1047 (its mechanism: a cast weight that is kept too long)",
    case="dp1-tp1-pp1",
    first="norm of adamw by step",
    seen=AFTER_GRADIENTS,
    silent=None,
    diagnosis="carried over",
)
def weight_of_the_first_forward_is_kept() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor, right: Any = heiretsu.layers.RowLinear.forward) -> Any:
        if not hasattr(self, "kept"):
            self.kept = self.weight.detach().clone()
        now = self.weight.detach().clone()
        self.weight.data.copy_(self.kept)
        y = right(self, x)
        self.weight.data.copy_(now)
        return y

    yield heiretsu.layers.RowLinear, "forward", forward
