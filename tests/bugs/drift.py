"""The right function, computed less precisely than its dtype promises: seen as drift, not as a bug.

The last ones are a mistake in float64 alone, where one rounding to float32 stands out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import heiretsu.comm
import heiretsu.layers
import heiretsu.model
import heiretsu.pipeline
import heiretsu.sync
import heiretsu.train
from heiretsu.comm import all_sum, copy
from heiretsu.layers import vocab_cross_entropy
from tests.bugs.bug import ALL_BUT_FORWARD, EVERYTHING, LAST, Patch, bug


def cast(x: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """There and back; what was lost stays lost."""
    return x.to(dtype).to(x.dtype)


@bug(
    "pytorch/pytorch#106395",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    dtype="float32",
    status="drift",
    diagnosis="drift",
)
def gradients_summed_over_dp_in_bfloat16() -> Iterable[Patch]:
    def short(x: torch.Tensor, mesh: Any, axis: str) -> torch.Tensor:
        if axis != "dp" or mesh.size("dp") == 1:
            return all_sum(x, mesh, axis)
        return all_sum(x.bfloat16(), mesh, axis).to(x.dtype)

    yield heiretsu.sync, "all_sum", short


@bug(
    "linkedin/Liger-Kernel#830",
    case="dp1-tp1-pp1",
    first=LAST,
    seen="gradient norm state",
    silent=None,
    dtype="float32",
    status="drift",
    diagnosis="drift",
)
def gradients_piled_up_in_bfloat16() -> Iterable[Patch]:
    def backward(self: Any, mb: int, right: Any = heiretsu.pipeline.Executor.backward) -> None:
        right(self, mb)
        for parameter in self.model.parameters():
            parameter.grad = cast(parameter.grad)

    yield heiretsu.pipeline.Executor, "backward", backward


@bug(
    "the sum after a row-parallel product goes over the wire in bfloat16",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    dtype="float32",
    status="drift",
    diagnosis="drift",
)
def row_sum_in_bfloat16() -> Iterable[Patch]:
    def short(x: torch.Tensor, mesh: Any, axis: str) -> torch.Tensor:
        return all_sum(x.bfloat16(), mesh, axis).to(x.dtype)

    yield heiretsu.comm, "PAIRS", {**heiretsu.comm.PAIRS, "reduce": (short, heiretsu.comm.keep)}


def sending(dtype: torch.dtype, upstream: bool) -> Any:
    """StageLink.send, in less than the dtype of what is sent, in one direction."""

    def send(
        self: Any, x: torch.Tensor, stage: int, right: Any = heiretsu.comm.StageLink.send
    ) -> None:
        is_border = x.ndim == 3 and (stage < self.mesh.at.pp) == upstream
        right(self, cast(x, dtype) if is_border else x, stage)

    return send


@bug(
    "activations go from stage to stage in bfloat16",
    case="dp1-tp1-pp2",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp1-tp2-pp1",
    dtype="float32",
    status="drift",
    diagnosis="drift",
)
def activations_sent_in_bfloat16() -> Iterable[Patch]:
    yield heiretsu.comm.StageLink, "send", sending(torch.bfloat16, upstream=False)


@bug(
    "gradients go from stage to stage in float16, where small ones vanish",
    case="dp1-tp1-pp2",
    first="gradient of blocks.2.mlp.down.bias",
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    dtype="float32",
    status="drift",
    diagnosis="drift",
)
def gradients_sent_in_float16() -> Iterable[Patch]:
    yield heiretsu.comm.StageLink, "send", sending(torch.float16, upstream=True)


@bug(
    "NVIDIA/TransformerEngine#3193 (its mechanism: the loss works in the buffer of short logits)",
    case="dp1-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    dtype="float32",
    status="drift",
    diagnosis="drift",
)
def loss_of_logits_in_bfloat16() -> Iterable[Patch]:
    def loss(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        return vocab_cross_entropy(logits.bfloat16(), *rest)

    yield heiretsu.train, "vocab_cross_entropy", loss


@bug(
    "a norm is left under autocast",
    case="dp1-tp1-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent=None,
    dtype="float32",
    status="drift",
    diagnosis="drift",
)
def last_norm_in_bfloat16() -> Iterable[Patch]:
    def logits(self: Any, x: torch.Tensor, right: Any = heiretsu.model.GPT._logits) -> Any:
        return right(self, cast(x))

    yield heiretsu.model.GPT, "_logits", logits


@bug(
    "products in TF32: ten bits of each factor",
    case="dp1-tp1-pp1",
    first="forward of logits",
    seen="forward gradient norm state",
    silent=None,
    dtype="float32",
    status="drift",
    diagnosis="drift",
)
def column_products_in_tf32() -> Iterable[Patch]:
    def ten_bits(x: torch.Tensor) -> torch.Tensor:
        bits = (x.detach().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)
        return x + (bits.view(torch.float32) - x.detach())

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = ten_bits(copy(x, self.mesh, "tp"))
        return F.linear(x, ten_bits(self.weight), self.bias)

    yield heiretsu.layers.ColumnLinear, "forward", forward


@bug(
    "the norm is made of gradients in bfloat16",
    case="dp1-tp1-pp1",
    first="norm of sgd by step",
    seen="norm state",
    silent=None,
    dtype="float32",
    status="drift",
    steps=1,
    diagnosis="drift",
)
def norm_in_bfloat16() -> Iterable[Patch]:
    def norm(model: Any) -> torch.Tensor:
        grads = [grad.bfloat16() for grad in heiretsu.sync.gradients(model)]
        return nn.utils.get_total_norm(grads).float()

    yield heiretsu.train, "global_norm", norm


@bug(
    "moments are kept in bfloat16",
    case="dp1-tp1-pp1",
    first="state of adamw exp_avg of wte.weight",
    seen="state",
    silent=None,
    dtype="float32",
    status="drift",
    steps=1,
    diagnosis="drift",
)
def moments_in_bfloat16() -> Iterable[Patch]:
    def update(self: Any, right: Any = heiretsu.train.Trainer.update) -> Any:
        norm = right(self)
        for state in self.optimizer.state.values():
            if "exp_avg" in state:
                state["exp_avg"] = cast(state["exp_avg"])
        return norm

    yield heiretsu.train.Trainer, "update", update


@bug(
    "updated parameters are gathered in the dtype of a buffer for bfloat16 gradients",
    case="dp2-tp1-pp1",
    first="state of sgd wte.weight",
    seen="state",
    silent="dp1-tp2-pp1",
    dtype="float32",
    status="drift",
    steps=1,
    diagnosis="drift",
)
def parameters_gathered_in_bfloat16() -> Iterable[Patch]:
    @torch.no_grad()
    def update(self: Any, right: Any = heiretsu.train.Trainer.update) -> Any:
        norm = right(self)
        if self.mesh.size("dp") > 1:
            for parameter in self.model.parameters():
                parameter.copy_(cast(parameter))
        return norm

    yield heiretsu.train.Trainer, "update", update


@bug(
    "the reported loss is added up in bfloat16",
    case="dp1-tp1-pp1",
    first="loss of sgd by step",
    seen="loss",
    silent=None,
    dtype="float32",
    status="drift",
    steps=1,
    diagnosis="drift",
)
def reported_loss_in_bfloat16() -> Iterable[Patch]:
    def total(self: Any, losses: Any, right: Any = heiretsu.train.Trainer._global_loss) -> Any:
        return right(self, [cast(loss) for loss in losses])

    yield heiretsu.train.Trainer, "_global_loss", total


def float32_before(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of a first tensor in float32, its result as precise as it came."""

    def shortened(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return function(x.float(), *rest).to(x.dtype)

    return shortened


@bug(
    "logits.float(), which shortens float64",
    case="dp1-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="rounded",
)
def loss_always_in_float32() -> Iterable[Patch]:
    yield heiretsu.train, "vocab_cross_entropy", float32_before(vocab_cross_entropy)


@bug(
    "gradients are summed in buffers of float32, whatever they are",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="rounded",
)
def buckets_always_in_float32() -> Iterable[Patch]:
    def short(x: torch.Tensor, mesh: Any, axis: str) -> torch.Tensor:
        return (float32_before(all_sum) if axis == "dp" else all_sum)(x, mesh, axis)

    def average(model: Any, limit: int, right: Any = heiretsu.train.average) -> None:
        if model.mesh.size("dp") > 1:
            right(model, limit)

    yield heiretsu.sync, "all_sum", short
    yield heiretsu.train, "average", average


@bug(
    "the norm is taken in float32, whatever the gradients are",
    case="dp1-tp1-pp1",
    first="norm of sgd by step",
    seen="norm state",
    silent=None,
    diagnosis="rounded",
)
def norm_always_in_float32() -> Iterable[Patch]:
    def norm(model: Any) -> torch.Tensor:
        grads = heiretsu.sync.gradients(model)
        return nn.utils.get_total_norm([grad.float() for grad in grads]).to(grads[0].dtype)

    yield heiretsu.train, "global_norm", norm
