"""Ways to cut and store parameters that people use: each says what one rank of n keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Full = Mapping[str, Tensor]
HEADS, KV_HEADS, WIDTH, VOCAB = 8, 2, 4, 13  # WIDTH of a head; the model is HEADS x WIDTH wide
HIDDEN = HEADS * WIDTH

SHAPES = {
    "w": (12, 10),
    "b": (12,),
    "scale": (),
    "q": (HIDDEN, HIDDEN),
    "k": (KV_HEADS * WIDTH, HIDDEN),
    "v": (KV_HEADS * WIDTH, HIDDEN),
    "qkv": (3 * HIDDEN, HIDDEN),
    "gate": (24, 16),
    "up": (24, 16),
    "vocab": (VOCAB, 8),
    "experts": (4, 6, 8),
    "conv": (8, 6, 3, 3),
}


class Cut(NamedTuple):
    """`keep(full, n, r)`: the local tensors of rank r of n, by the candidate's names. `padding`
    and `boxes`: how many zeros and boxes all ranks together hold, for n = 4.
    """

    name: str
    keep: Callable[[Full, int, int], dict[str, Tensor]]
    boxes: int
    padding: int = 0


def _flat(tensors: list[Tensor], n: int, r: int) -> Tensor:
    """A rank's share of one buffer, padded so that all are of one length."""
    buffer = torch.cat([x.reshape(-1) for x in tensors])
    return F.pad(buffer, (0, -len(buffer) % n)).chunk(n)[r]


def _interleaved_qkv(full: Full, n: int, r: int) -> Tensor:
    """Megatron's order: the rows of q, k and v of one head after the other."""
    by_kind = full["qkv"].reshape(3, HEADS, WIDTH, HIDDEN)
    return by_kind.transpose(0, 1).chunk(n)[r].reshape(-1, HIDDEN)


def _grouped_qkv(full: Full, n: int, r: int) -> Tensor:
    """Queries with the key and value head that they share, k and v copied where n is larger."""
    q = full["q"].reshape(HEADS, WIDTH, HIDDEN).chunk(n)[r]
    mine = r * KV_HEADS // n
    k, v = (full[x].reshape(KV_HEADS, WIDTH, HIDDEN)[mine : mine + 1] for x in "kv")
    return torch.cat([q, k, v]).reshape(-1, HIDDEN)


def _padded_heads(full: Full, n: int, r: int) -> Tensor:
    """Nine places for eight heads, three on each of three ranks, one on a fourth: zeros."""
    q = F.pad(full["q"].reshape(HEADS, WIDTH, HIDDEN), (0, 0, 0, 0, 0, 3 * n - HEADS))
    return q.chunk(n)[r].reshape(-1, HIDDEN)


def _rope_halves(full: Full, n: int, r: int) -> Tensor:
    """Within a head, first the even rows and then the odd ones."""
    q = full["q"].reshape(HEADS, WIDTH // 2, 2, HIDDEN).transpose(1, 2)
    return q.reshape(HIDDEN, HIDDEN).chunk(n)[r]


def _bucket(full: Full, n: int, r: int) -> dict[str, Tensor]:
    return {"flat": _flat([full[x] for x in ("w", "b", "gate", "scale")], n, r)}


CUTS = [
    Cut("replicated", lambda f, n, r: {"w": f["w"], "b": f["b"]}, 8),
    Cut("scalar", lambda f, n, r: {"scale": f["scale"]}, 4),
    Cut("rows", lambda f, n, r: {"w": f["w"].chunk(n)[r]}, 4),
    Cut("columns", lambda f, n, r: {"w": f["w"].tensor_split(n, 1)[r]}, 4),
    Cut("rows, uneven", lambda f, n, r: {"v": f["vocab"].tensor_split(n)[r]}, 4),
    Cut("rows, the last shorter", lambda f, n, r: {"v": f["vocab"].chunk(n)[r]}, 4),
    Cut("rows, padded", lambda f, n, r: {"v": F.pad(f["vocab"], (0, 0, 0, 3)).chunk(n)[r]}, 4, 24),
    Cut("every n-th row", lambda f, n, r: {"v": f["vocab"][r::n]}, 13),
    Cut("pairs of rows in turn", lambda f, n, r: {"w": _cyclic(f["w"], 2, n, r)}, 6),
    Cut("rows backwards", lambda f, n, r: {"w": f["w"].flip(0).chunk(n)[r]}, 4),
    Cut("transposed", lambda f, n, r: {"w": f["w"].T.tensor_split(n)[r]}, 4),
    Cut("renamed", lambda f, n, r: {"net.0.kernel": f["w"].chunk(n)[r]}, 4),
    Cut("two dims", lambda f, n, r: {"w": f["w"].chunk(2)[r // 2].chunk(2, 1)[r % 2]}, 4),
    Cut("strided shard", lambda f, n, r: {"w": f["w"].chunk(2)[r % 2].chunk(2)[r // 2]}, 4),
    Cut("flattened", lambda f, n, r: {"flat": _flat([f["w"]], n, r)}, 4),
    Cut("flat, over borders, padded", lambda f, n, r: _bucket(f, n, r), 9, 3),
    Cut("flat in bfloat16", lambda f, n, r: {"flat": _flat([f["b"], f["w"]], n, r).bfloat16()}, 11),
    Cut("q, k, v fused", lambda f, n, r: {"qkv": torch.cat([f[x].chunk(n)[r] for x in "qkv"])}, 12),
    Cut("fused, each third cut", lambda f, n, r: {"qkv": _thirds(f["qkv"], n, r)}, 12),
    Cut("fused, by head", lambda f, n, r: {"qkv": _interleaved_qkv(f, n, r)}, 12),
    Cut("fused, k and v shared", lambda f, n, r: {"qkv": _grouped_qkv(f, n, r)}, 12),
    Cut("heads padded", lambda f, n, r: {"q": _padded_heads(f, n, r)}, 3, 512),
    Cut("rope's order", lambda f, n, r: {"q": _rope_halves(f, n, r)}, 4),
    Cut("gate and up fused", lambda f, n, r: {"g": _pair(f, n, r)}, 8),
    Cut("gate and up in turn", lambda f, n, r: {"g": _turns(f, n, r)}, 8),
    Cut("an expert each", lambda f, n, r: {"e": f["experts"][r]}, 4),
    Cut("a part of all experts", lambda f, n, r: {"e": f["experts"].chunk(n, 2)[r]}, 4),
    Cut("experts unstacked", lambda f, n, r: {f"e{i}": f["experts"][i] for i in (r, 3 - r)}, 8),
    Cut(
        "layers stacked", lambda f, n, r: {"s": torch.stack([f["gate"], f["up"]]).chunk(n, 2)[r]}, 8
    ),
    Cut("channels last", lambda f, n, r: {"c": f["conv"].permute(0, 2, 3, 1).chunk(n)[r]}, 4),
    Cut("tied", lambda f, n, r: {"a": f["w"].chunk(n)[r], "b": f["tied"].chunk(n)[r]}, 8),
    Cut("held twice", lambda f, n, r: {"w": torch.cat([f["w"].chunk(n)[r], f["w"][:1]])}, 8),
]


def _cyclic(x: Tensor, size: int, n: int, r: int) -> Tensor:
    return torch.cat(x.split(size)[r::n])


def _thirds(x: Tensor, n: int, r: int) -> Tensor:
    return torch.cat([third.chunk(n)[r] for third in x.chunk(3)])


def _pair(full: Full, n: int, r: int) -> Tensor:
    return torch.cat([full["gate"].chunk(n)[r], full["up"].chunk(n)[r]])


def _turns(full: Full, n: int, r: int) -> Tensor:
    return torch.stack([full["gate"].chunk(n)[r], full["up"].chunk(n)[r]], 1).reshape(-1, 16)


def full() -> dict[str, Tensor]:
    """Random parameters of these shapes; one of them has two names."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {**made, "tied": made["w"]}
