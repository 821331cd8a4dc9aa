"""Bugs of the pipeline: where the model is cut, and what crosses the border between two stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import heiretsu.comm
import heiretsu.model
import heiretsu.pipeline
import heiretsu.train
from heiretsu.schedule import SCHEDULES, Action, gpipe, one_f_one_b
from tests.bugs.bug import ALL_BUT_FORWARD, EVERYTHING, LAST, Patch, bug

BORDER = "gradient of blocks.2.mlp.down.bias"  # the first gradient above the border of two stages


@bug(
    "NVIDIA/Megatron-LM#1304",
    case="dp1-tp1-pp4",  # 6 layers are cut evenly by two stages, and by three
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp1-tp1-pp2",
    diagnosis="another's",
)
def remainder_of_the_layers_dropped() -> Iterable[Patch]:
    def stage_units(layers: int, stages: int, stage: int) -> range:
        each = layers // stages
        first = 1 + stage * each
        return range(first - (stage == 0), first + each + (stage == stages - 1))

    yield heiretsu.model, "stage_units", stage_units


@bug(
    "NVIDIA/Megatron-LM#1584 (its mechanism: a layer's number off by one on all stages but one)",
    case="dp1-tp1-pp2",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="another's",
)
def stages_overlap_by_a_layer() -> Iterable[Patch]:
    def units(layers: int, stages: int, stage: int, right: Any = heiretsu.model.stage_units) -> Any:
        own = right(layers, stages, stage)
        return range(own.start - (stage > 0), own.stop)

    yield heiretsu.model, "stage_units", units


@bug(
    "positions are added wherever a stage begins",
    case="dp1-tp1-pp2",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="bias",
)
def positions_added_on_every_stage() -> Iterable[Patch]:
    def make(self: Any, config: Any, mesh: Any, right: Any = heiretsu.model.GPT.__init__) -> None:
        right(self, config, mesh)
        if not mesh.is_first_stage:
            self.wpe = nn.Embedding(config.context, config.d_model)

    def forward(self: Any, x: torch.Tensor, right: Any = heiretsu.model.GPT.forward) -> Any:
        is_border = not self.mesh.is_first_stage
        return right(self, x + self.wpe.weight[: x.shape[1]] if is_border else x)

    yield heiretsu.model.GPT, "__init__", make
    yield heiretsu.model.GPT, "forward", forward


@bug(
    "the last norm is applied wherever a stage ends",
    case="dp1-tp1-pp2",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
)
def last_norm_on_every_stage() -> Iterable[Patch]:
    def make(self: Any, config: Any, mesh: Any, right: Any = heiretsu.model.GPT.__init__) -> None:
        right(self, config, mesh)
        if not mesh.is_last_stage:
            self.ln_f = nn.LayerNorm(config.d_model)

    def forward(self: Any, x: torch.Tensor, right: Any = heiretsu.model.GPT.forward) -> Any:
        y = right(self, x)
        return y if self.mesh.is_last_stage else self.ln_f(y)

    yield heiretsu.model.GPT, "__init__", make
    yield heiretsu.model.GPT, "forward", forward


@bug(
    "the residual stream is detached where a stage begins",
    case="dp1-tp1-pp2",
    first=BORDER,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="another's",
)
def residual_detached_at_the_border() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor, right: Any = heiretsu.model.Block.forward) -> Any:
        if not x.is_leaf:
            return right(self, x)
        x = x.detach() + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    yield heiretsu.model.Block, "forward", forward


@bug(
    "the gradient of a stage's input is not cleared between microbatches",
    case="dp1-tp1-pp2",
    first=BORDER,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="mixed rows",
)
def gradient_of_the_input_piles_up() -> Iterable[Patch]:
    def send(
        self: Any, x: torch.Tensor, stage: int, right: Any = heiretsu.comm.StageLink.send
    ) -> None:
        if stage < self.mesh.at.pp and x.ndim == 3:  # not the tied embedding's
            x = self.sum = x + getattr(self, "sum", 0.0)
        right(self, x, stage)

    yield heiretsu.comm.StageLink, "send", send


@bug(
    "a stage receives into one buffer, which it needs until the backward",
    case="dp1-tp1-pp2",
    first="gradient of blocks.3.ln_1.weight",  # the norm keeps what it took in
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    schedules="gpipe",  # the last stage of 1F1B is done with each before the next one comes
)
def received_activations_share_a_buffer() -> Iterable[Patch]:
    def receive(self: Any, *args: Any, right: Any = heiretsu.comm.StageLink.receive) -> Any:
        x = right(self, *args)
        if args[-1] > self.mesh.at.pp:
            return x
        if not hasattr(self, "buffer"):
            self.buffer = torch.empty_like(x)
        self.buffer.data.copy_(x)
        return self.buffer.detach()

    yield heiretsu.comm.StageLink, "receive", receive


@bug(
    "1F1B takes the newest activations instead of the microbatch's own",
    case="dp1-tp1-pp2",
    first="gradient of blocks.2.mlp.down.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    schedules="1f1b",  # in GPipe both stages go back in reverse, and agree,
    diagnosis="mixed rows",
)
def backward_with_the_wrong_microbatch() -> Iterable[Patch]:
    class Newest(dict):  # type: ignore[type-arg]
        def pop(self, mb: int) -> Any:
            return super().pop(max(self))

    def make(self: Any, *args: Any, right: Any = heiretsu.pipeline.Executor.__init__) -> None:
        right(self, *args)
        self.alive = Newest()

    yield heiretsu.pipeline.Executor, "__init__", make


@bug(
    "one stage goes back through its microbatches in reverse, its neighbour does not",
    case="dp1-tp1-pp2",
    first="gradient of blocks.2.mlp.down.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    schedules="gpipe",
    diagnosis="mixed rows",
)
def stages_disagree_about_the_order_of_backwards() -> Iterable[Patch]:
    def reversed_above(stages: int, microbatches: int) -> Any:
        schedule = gpipe(stages, microbatches)
        for actions in schedule[:-1]:
            actions[microbatches:] = [Action("B", mb) for mb in range(microbatches)][::-1]
        return schedule

    yield heiretsu.train, "SCHEDULES", {**SCHEDULES, "gpipe": reversed_above}


@bug(
    "steady state and cool-down of 1F1B are counted one too short",
    case="dp1-tp1-pp2",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp1-tp2-pp1",
    status="hole",
    schedules="1f1b",
    diagnosis="hole",
)
def last_microbatch_never_runs() -> Iterable[Patch]:
    def short(stages: int, microbatches: int) -> Any:
        return one_f_one_b(stages, microbatches - (stages > 1))

    yield heiretsu.train, "SCHEDULES", {**SCHEDULES, "1f1b": short}


@bug(
    "huggingface/accelerate#3092 (its mechanism: the stage of the targets is ahead in the data)",
    case="dp1-tp1-pp2",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="picked",
)
def targets_of_a_later_microbatch() -> Iterable[Patch]:
    def loss_of(self: Any, microbatches: Any, right: Any = heiretsu.train.Trainer._loss_of) -> Any:
        ahead = self.mesh.size("pp") - 1
        return right(self, microbatches[ahead:] + microbatches[:ahead])

    yield heiretsu.train.Trainer, "_loss_of", loss_of


@bug(
    "picotron's pipeline_parallel.py: the loss that is printed is divided, the gradient is not",
    case="dp1-tp1-pp2",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="scaled",
)
def loss_not_divided_by_microbatches() -> Iterable[Patch]:
    def loss_of(self: Any, microbatches: Any, right: Any = heiretsu.train.Trainer._loss_of) -> Any:
        def undivided(logits: torch.Tensor, mb: int) -> torch.Tensor:
            loss = right(self, microbatches)(logits, mb)
            return loss + (len(microbatches) - 1) * (loss - loss.detach())

        return undivided

    yield heiretsu.train.Trainer, "_loss_of", loss_of


@bug(
    "pytorch/torchtitan#1733 (the schedule divides by the microbatches what is divided already)",
    case="dp1-tp1-pp2",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="scaled",
)
def pipeline_divides_by_microbatches_again() -> Iterable[Patch]:
    def run(self: Any, actions: Any, right: Any = heiretsu.pipeline.Executor.run) -> Any:
        losses = right(self, actions)
        if self.mesh.size("pp") > 1:
            for parameter in self.model.parameters():
                parameter.grad /= len(self.tokens)
        return losses

    yield heiretsu.pipeline.Executor, "run", run
