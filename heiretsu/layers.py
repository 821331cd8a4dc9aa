"""The layers that are cut over tp, as in Megatron-LM (arXiv 1909.08053), each with its layout.

Shapes are in the names. A capital letter is a whole dimension, a small one this rank's part of it:

    B batch   T tokens   D model   F whatever a layer puts out or takes in   V vocabulary

A contraction over a small letter leaves one term of a sum: a `reduce` stands on that line. An
operand in capitals that meets a small letter gets a part of its gradient on every rank: a `copy`
stands before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heiretsu.comm import all_max, copy, reduce
from heiretsu.layout import Cut, Layout
from heiretsu.mesh import Mesh

IGNORE = -100  # a target of this value is not scored (torch's own convention)


class Layer(nn.Module):
    """A module whose parameters are pieces: `layouts` says of which whole, and which piece."""

    layouts: dict[str, Layout]

    def __init__(self, mesh: Mesh, **layouts: Layout) -> None:
        super().__init__()
        self.mesh, self.layouts = mesh, layouts
        for name, layout in layouts.items():
            shape = layout.local_shape(mesh.size("tp"), mesh.at.tp)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=mesh.device)))


def layouts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Layout]]:
    """Every parameter of a model by its name, with its layout; each once, in forward order."""
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                known = module.layouts if isinstance(module, Layer) else {}
                layout = known.get(name, Layout(tuple(parameter.shape)))
                yield f"{path}.{name}", parameter, layout


class ColumnLinear(Layer):
    """x_BTD -> y_BTf: each rank computes its columns of the output.

    `blocks` is how many projections are stacked in it (3 for q, k, v): each is cut by itself.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, mesh: Mesh, d_in: int, d_out: int, blocks: int = 1) -> None:
        cut = Cut("tp", dim=0, blocks=blocks)
        super().__init__(mesh, weight=Layout((d_out, d_in), cut), bias=Layout((d_out,), cut))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(copy(x_BTD, self.mesh, "tp"), self.weight, self.bias)


class RowLinear(Layer):
    """x_BTf -> y_BTD: each rank holds its rows of the input, so their products are to be summed."""

    weight: Tensor
    bias: Tensor

    def __init__(self, mesh: Mesh, d_in: int, d_out: int) -> None:
        weight = Layout((d_out, d_in), Cut("tp", dim=1))
        super().__init__(mesh, weight=weight, bias=Layout((d_out,)))

    def forward(self, x_BTf: Tensor) -> Tensor:
        # The bias is whole on every rank: it is added once, after the sum.
        return reduce(F.linear(x_BTf, self.weight), self.mesh, "tp") + self.bias


class VocabEmbedding(Layer):
    """tokens_BT -> x_BTD: each rank looks up the tokens in its part of the vocabulary."""

    weight: Tensor

    def __init__(self, mesh: Mesh, vocab: int, d_model: int) -> None:
        super().__init__(mesh, weight=Layout((vocab, d_model), Cut("tp", dim=0)))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        local_BT, is_mine_BT = in_my_vocabulary(tokens_BT, self.layouts["weight"], self.mesh)
        x_BTD = F.embedding(local_BT, self.weight) * is_mine_BT.unsqueeze(-1)
        return reduce(x_BTD, self.mesh, "tp")


class VocabHead(Layer):
    """x_BTD -> logits_BTv. Without a weight of its own it is given the embedding's (tied)."""

    weight: Tensor

    def __init__(self, mesh: Mesh, vocab: int, d_model: int) -> None:
        super().__init__(mesh, weight=Layout((vocab, d_model), Cut("tp", dim=0)))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return vocab_logits(x_BTD, self.weight, self.mesh)


def vocab_logits(x_BTD: Tensor, weight_vD: Tensor, mesh: Mesh) -> Tensor:
    return F.linear(copy(x_BTD, mesh, "tp"), weight_vD)


def in_my_vocabulary(ids_BT: Tensor, layout: Layout, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Indices into this rank's part of the vocabulary (0 where it is another's), and which are."""
    (_, start, length) = layout.spans(mesh.size("tp"), mesh.at.tp)[0]
    is_mine_BT = (ids_BT >= start) & (ids_BT < start + length)
    return torch.where(is_mine_BT, ids_BT - start, 0), is_mine_BT


def vocab_cross_entropy(logits_BTv: Tensor, targets_BT: Tensor, vocab: int, mesh: Mesh) -> Tensor:
    """The sum over valid tokens of -log softmax(logits)[target]; a scalar, equal on all tp ranks.

    The logits are never gathered: per token the ranks share the largest logit, the sum of the
    exponentials, and the target's logit, which one of them holds. In float32 at least.
    """
    logits_BTv = logits_BTv.to(torch.promote_types(logits_BTv.dtype, torch.float32))
    layout = Layout((vocab,), Cut("tp", dim=0))
    # Its gradient is zero: a shift of all logits changes no probability.
    peak_BT = all_max(logits_BTv.detach().amax(-1), mesh, "tp")
    shifted_BTv = logits_BTv - peak_BT.unsqueeze(-1)
    local_BT, is_mine_BT = in_my_vocabulary(targets_BT, layout, mesh)
    target_BT = shifted_BTv.gather(-1, local_BT.unsqueeze(-1)).squeeze(-1) * is_mine_BT
    terms_2BT = torch.stack([shifted_BTv.exp().sum(-1), target_BT])
    total_BT, target_BT = reduce(terms_2BT, mesh, "tp").unbind(0)
    loss_BT = total_BT.log() - target_BT
    return torch.where(targets_BT == IGNORE, 0.0, loss_BT).sum()
