"""Bugs of layers that are cut over tp: sums forgotten, made twice, or made of the wrong terms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import heiretsu.comm
import heiretsu.layers
import heiretsu.model
import heiretsu.train
from heiretsu.comm import all_sum, copy, keep, reduce
from heiretsu.layout import Cut, Layout
from tests.bugs.bug import ALL_BUT_FORWARD, EVERYTHING, LAST, Patch, bug


@bug(
    "PaddlePaddle/Paddle#35186; litgpt's generate/tp.py",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="bias",
)
def row_bias_on_every_rank() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return reduce(F.linear(x, self.weight, self.bias), self.mesh, "tp")

    yield heiretsu.layers.RowLinear, "forward", forward


@bug(
    "pytorch/torchtitan#4332",
    case="dp1-tp2-pp1",
    first="gradient of blocks.5.mlp.down.bias",
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="scaled",
)
def row_bias_divided_by_tp() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        part = self.bias / self.mesh.size("tp")
        return reduce(F.linear(x, self.weight, part), self.mesh, "tp")

    yield heiretsu.layers.RowLinear, "forward", forward


@bug(
    "the sum after a row-parallel product is forgotten",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="not reduced",
)
def no_reduce_after_row_product() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.bias

    yield heiretsu.layers.RowLinear, "forward", forward


@bug(
    "an all-reduce without its group takes all ranks, replicas too",
    case="dp2-tp2-pp1",  # right wherever tp is the whole world
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp1-tp2-pp1",
    diagnosis="mixed rows",
)
def row_sum_over_the_world() -> Iterable[Patch]:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            dist.all_reduce(y)
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        partial = F.linear(x, self.weight)
        return (Sum.apply(partial) if self.mesh.size("tp") > 1 else partial) + self.bias

    yield heiretsu.layers.RowLinear, "forward", forward


@bug(
    "bigcode-project/Megatron-LM#35 (its mechanism: no f in front of what is cut)",
    case="dp1-tp2-pp1",
    first="gradient of blocks.5.ln_2.bias",
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    status="split",
    diagnosis="not reduced",
)
def no_sum_in_backward_of_column_input() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    yield heiretsu.layers.ColumnLinear, "forward", forward


@bug(
    "bigcode-project/Megatron-LM#37 (keys and values send back the part of the own heads)",
    case="dp1-tp2-pp1",
    first="gradient of blocks.5.ln_1.bias",
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    status="split",
)
def no_sum_in_backward_of_keys_and_values() -> Iterable[Patch]:
    def forward(
        self: Any, x: torch.Tensor, right: Any = heiretsu.layers.ColumnLinear.forward
    ) -> Any:
        if self.layouts["weight"].cut.blocks == 1:
            return right(self, x)
        queries = len(self.weight) // 3
        q, kv = self.weight.tensor_split([queries])
        q_bias, kv_bias = self.bias.tensor_split([queries])
        shared = copy(x, self.mesh, "tp")
        return torch.cat([F.linear(shared, q, q_bias), F.linear(x, kv, kv_bias)], -1)

    yield heiretsu.layers.ColumnLinear, "forward", forward


@bug(
    "the gradient is summed again behind the row-parallel sum (pytorch/torchtitan#2106)",
    case="dp1-tp2-pp1",
    first="gradient of blocks.5.mlp.down.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="scaled",
)
def reduce_sums_in_backward_too() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        partial = F.linear(x, self.weight)
        return copy(reduce(partial, self.mesh, "tp"), self.mesh, "tp") + self.bias

    yield heiretsu.layers.RowLinear, "forward", forward


@bug(
    "EleutherAI/gpt-neox#1259 (its first repair: an average over tp where parts add up)",
    case="dp1-tp2-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="scaled",
)
def copy_averages_in_backward() -> Iterable[Patch]:
    def average(x: torch.Tensor, mesh: Any, axis: str) -> torch.Tensor:
        return all_sum(x, mesh, axis) / mesh.size(axis)

    yield heiretsu.comm, "PAIRS", {**heiretsu.comm.PAIRS, "copy": (keep, average)}


@bug(
    "EleutherAI/gpt-neox#1257 (the hook of sequence parallelism, without sequence parallelism)",
    case="dp1-tp2-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="scaled",
)
def gradients_of_norms_summed_over_tp() -> Iterable[Patch]:
    def average(model: Any, limit: int, right: Any = heiretsu.train.average) -> None:
        right(model, limit)
        for name, parameter, _ in model.parts:
            if ".ln_" in f".{name}":
                parameter.grad = all_sum(parameter.grad, model.mesh, "tp")

    yield heiretsu.train, "average", average


@bug(
    "NVIDIA-NeMo/Speech#9335 (gradients of what is cut are summed by hand once more)",
    case="dp1-tp2-pp1",
    first="gradient of blocks.5.mlp.down.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="shards added",
)
def gradients_of_shards_summed_over_tp() -> Iterable[Patch]:
    def average(model: Any, limit: int, right: Any = heiretsu.train.average) -> None:
        right(model, limit)
        for name, parameter, layout in model.parts:
            if layout.cut is not None and name.startswith("blocks"):
                parameter.grad = all_sum(parameter.grad, model.mesh, "tp")

    yield heiretsu.train, "average", average


@bug(
    "the row bias is given to one rank, so that it is added once; so is its gradient",
    case="dp1-tp2-pp1",
    first="gradient of blocks.5.mlp.down.bias",
    seen="gradient state",  # the copy that is used is right
    silent="dp2-tp1-pp1",
    status="split",
    diagnosis="zero",
)
def row_bias_on_the_first_rank_only() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias * (self.mesh.at.tp == 0)
        return reduce(F.linear(x, self.weight, bias), self.mesh, "tp")

    yield heiretsu.layers.RowLinear, "forward", forward


@bug(
    "the column bias, which is cut, is spared on all ranks but one, as if it were a row bias",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="same added",
)
def column_bias_on_the_first_rank_only() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias * (self.mesh.at.tp == 0)
        return F.linear(copy(x, self.mesh, "tp"), self.weight, bias)

    yield heiretsu.layers.ColumnLinear, "forward", forward


@bug(
    "picotron's checkpoint.py; fused q, k, v cut by contiguous rows",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="fused",
)
def fused_qkv_cut_as_one_block() -> Iterable[Patch]:
    def one_block(mesh: Any, d_in: int, d_out: int, blocks: int = 1) -> Any:
        return heiretsu.layers.ColumnLinear(mesh, d_in, d_out)

    yield heiretsu.model, "ColumnLinear", one_block


@bug(
    "hpcaitech/ColossalAI#817 (its mechanism, left over in the bias)",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
)
def fused_bias_cut_as_one_block() -> Iterable[Patch]:
    def make(self: Any, mesh: Any, d_in: int, d_out: int, blocks: int = 1) -> None:
        weight = Layout((d_out, d_in), Cut("tp", dim=0, blocks=blocks))
        bias = Layout((d_out,), Cut("tp", dim=0))
        heiretsu.layers.Layer.__init__(self, mesh, weight=weight, bias=bias)

    yield heiretsu.layers.ColumnLinear, "__init__", make


def attend(self: Any, x: torch.Tensor, width: int, scale: float | None) -> Any:
    """heiretsu's attention, with the width of a head and the scale to choose."""
    q, k, v = (
        part.unflatten(-1, (-1, width)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return self.proj(y.transpose(1, 2).flatten(-2))


@bug(
    "pytorch/pytorch#179502 (a view of the local piece, by the sizes of the whole)",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
)
def heads_counted_as_if_all_were_here() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return attend(self, x, self.width // self.qkv.mesh.size("tp"), None)

    yield heiretsu.model.Attention, "forward", forward


@bug(
    "the scores are scaled by the local width over the number of all heads",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
)
def scores_scaled_by_the_local_width() -> Iterable[Patch]:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return attend(self, x, self.width, (self.width / self.qkv.mesh.size("tp")) ** -0.5)

    yield heiretsu.model.Attention, "forward", forward


def on_one_stage(embed: Any) -> Any:
    """GPT.forward without a pipeline, with another way to embed."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        x = embed(self, x)
        for block in self.blocks.values():
            x = block(x)
        return self._logits(self.ln_f(x))

    return forward


@bug(
    "NVIDIA/Megatron-LM#1612 (positions counted from the own place in a group of the wrong axis)",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="same added",
)
def positions_start_at_the_tp_rank() -> Iterable[Patch]:
    def embed(self: Any, x: torch.Tensor) -> torch.Tensor:
        start = self.mesh.at.tp
        return self.wte(x) + self.wpe.weight[start : start + x.shape[1]]

    yield heiretsu.model.GPT, "forward", on_one_stage(embed)


@bug(
    "positions are added on every tp rank, before the sum over the parts of the vocabulary",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="bias",
)
def positions_added_before_the_sum() -> Iterable[Patch]:
    def embed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.wte(x) + reduce(self.wpe.weight[: x.shape[1]], self.mesh, "tp")

    yield heiretsu.model.GPT, "forward", on_one_stage(embed)
