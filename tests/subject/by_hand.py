"""Layers cut by hand over axes of all kinds: vocabulary, context, experts. `wrong`: a mistake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tests.subject.layers import Sum

VOCAB, WIDTH, HEADS, EXPERTS, HIDDEN = 13, 8, 4, 4, 12


class VocabParallelEmbedding(nn.Module):
    """Rows over tp, the last rank's padded with zeros; a token that is elsewhere adds nothing."""

    def __init__(self, full: Mapping[str, Tensor], mesh: DeviceMesh, wrong: str = "") -> None:
        super().__init__()
        each = -(-VOCAB // mesh.size())
        self.first, self.group, self.wrong = each * mesh.get_local_rank(), mesh.get_group(), wrong
        padded = F.pad(full["weight"], (0, 0, 0, each * mesh.size() - VOCAB))
        self.weight = nn.Parameter(padded[self.first : self.first + each].clone())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        local = tokens_BT - self.first
        is_elsewhere = (local < 0) | (local >= len(self.weight))
        y_BTD = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight)
        if self.wrong != "not masked":
            y_BTD = y_BTD.masked_fill(is_elsewhere[..., None], 0)
        return Sum.apply(y_BTD, self.group)


class Attention(nn.Module):
    """Causal, with fused q, k, v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def heads(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """q, k, v as [B, H, T, D / H]."""
        parts = self.qkv(x_BTD).chunk(3, -1)
        return tuple(y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in parts)

    def joined(self, y_BHTd: Tensor) -> Tensor:
        return self.out(y_BHTd.transpose(1, 2).flatten(2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.joined(F.scaled_dot_product_attention(*self.heads(x_BTD), is_causal=True))


class GatherContext(torch.autograd.Function):
    """All ranks' parts of the sequence; the gradient of the own part is summed over all."""

    @staticmethod
    def forward(ctx: Any, x_BHTd: Tensor, group: Any, wrong: str) -> Tensor:
        ctx.group, ctx.wrong = group, wrong
        parts = [torch.empty_like(x_BHTd) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x_BHTd.contiguous(), group=group)
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, slope_BHTd: Tensor) -> tuple[Tensor, None, None]:
        slope_BHTd = slope_BHTd.contiguous()
        if ctx.wrong != "no sum in backward":
            dist.all_reduce(slope_BHTd, group=ctx.group)
        rank, count = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        return slope_BHTd.chunk(count, 2)[rank].contiguous(), None, None


class ContextParallelAttention(Attention):
    """Each rank has its part of the sequence, and the keys and values of all."""

    def __init__(self, full: Mapping[str, Tensor], mesh: DeviceMesh, wrong: str = "") -> None:
        super().__init__()
        self.load_state_dict(full)
        self.group, self.rank, self.wrong = mesh.get_group(), mesh.get_local_rank(), wrong
        for p in self.parameters():
            p.register_post_accumulate_grad_hook(self._sum)

    def _sum(self, p: Tensor) -> None:
        assert p.grad is not None
        dist.all_reduce(p.grad, group=self.group)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.heads(x_BTD)
        k = GatherContext.apply(k, self.group, self.wrong)
        v = GatherContext.apply(v, self.group, self.wrong)
        first = 0 if self.wrong == "mask of the first part" else self.rank * q.shape[2]
        mask = torch.arange(k.shape[2]) <= first + torch.arange(q.shape[2])[:, None]
        return self.joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ZigzagAttention(ContextParallelAttention):
    """Each rank has a part from the front of the sequence and one from its end: equal work."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.heads(x_BTD)
        n, half = dist.get_world_size(self.group), q.shape[2] // 2
        at = [[r * half + i for i in range(half)] for r in range(2 * n)]
        places_R = [torch.tensor(at[r] + at[2 * n - 1 - r]) for r in range(n)]
        order = torch.cat(places_R)
        if self.wrong != "keys in the order of the ranks":
            order = order.argsort()
        k = GatherContext.apply(k, self.group, self.wrong)[:, :, order]
        v = GatherContext.apply(v, self.group, self.wrong)[:, :, order]
        mine = places_R[self.rank]
        if self.wrong == "places as if contiguous":
            mine = 2 * half * self.rank + torch.arange(2 * half)
        mask = torch.arange(k.shape[2]) <= mine[:, None]
        return self.joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Experts(nn.Module):
    """Each token goes to its best expert, and is weighted by the router's word."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, HIDDEN, WIDTH))

    def chosen(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the expert of each token."""
        best = self.router(x_ND).softmax(-1).max(-1)
        return best.values, best.indices

    def computed(self, x_ND: Tensor, expert_N: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("nd,ndh->nh", x_ND, self.up[expert_N]))
        return torch.einsum("nh,nhd->nd", hidden, self.down[expert_N])

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        weight_N, expert_N = self.chosen(x_ND)
        return (self.computed(x_ND, expert_N) * weight_N[:, None]).view_as(x_BTD)


class Exchange(torch.autograd.Function):
    """So many rows to each rank, and so many from each; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: list[int], back: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = (out, back), group
        received = x.new_empty(sum(back), *x.shape[1:])
        dist.all_to_all_single(received, x.contiguous(), back, out, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        out, back = ctx.sizes
        returned = slope.new_empty(sum(out), *slope.shape[1:])
        dist.all_to_all_single(returned, slope.contiguous(), out, back, group=ctx.group)
        return returned, None, None, None


class ExpertParallel(Experts):
    """Experts over ep, and tokens too: they travel to their expert and back."""

    def __init__(self, full: Mapping[str, Tensor], mesh: DeviceMesh, wrong: str = "") -> None:
        super().__init__()
        n, rank = mesh.size(), mesh.get_local_rank()
        self.group, self.n, self.wrong = mesh.get_group(), n, wrong
        self.router.weight = nn.Parameter(full["router.weight"])
        self.up = nn.Parameter(full["up"].chunk(n)[rank].clone())
        self.down = nn.Parameter(full["down"].chunk(n)[rank].clone())
        if wrong != "router not summed":
            self.router.weight.register_post_accumulate_grad_hook(self._sum)

    def _sum(self, p: Tensor) -> None:
        assert p.grad is not None
        dist.all_reduce(p.grad, group=self.group)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        weight_N, expert_N = self.chosen(x_ND)
        order = expert_N.argsort(stable=True)
        out = torch.bincount(expert_N // len(self.up), minlength=self.n)
        back = torch.empty_like(out)
        dist.all_to_all_single(back, out, group=self.group)
        sizes = (out.tolist(), back.tolist())
        x = Exchange.apply(x_ND[order], *sizes, self.group)
        expert = Exchange.apply(expert_N[order], *sizes, self.group) % len(self.up)
        y = Exchange.apply(self.computed(x, expert), *reversed(sizes), self.group)
        back_in_place = order if self.wrong == "sorted the other way" else order.argsort()
        return (y[back_in_place] * weight_N[:, None]).view_as(x_BTD)
