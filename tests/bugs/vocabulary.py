"""Bugs where the vocabulary is cut: the lookup, the head, and the loss without whole logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import heiretsu.layers
import heiretsu.model
import heiretsu.train
from heiretsu.comm import all_max, all_sum, reduce
from heiretsu.layers import IGNORE, in_my_vocabulary, vocab_cross_entropy
from heiretsu.layout import Cut, Layout, share
from tests.bugs.bug import ALL_BUT_FORWARD, EVERYTHING, LAST, Patch, bug


def off_by_one(first: int, last: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def in_my_vocabulary(ids: torch.Tensor, layout: Any, mesh: Any) -> Any:
        (_, start, length) = layout.spans(mesh.size("tp"), mesh.at.tp)[0]
        is_mine = (ids >= start + first * (start > 0)) & (ids < start + length - last)
        return torch.where(is_mine, ids - start, 0), is_mine

    return in_my_vocabulary


@bug(
    "the first entry of each later shard of the vocabulary is nobody's",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
    diagnosis="by input",
)
def first_of_the_vocabulary_shard_lost() -> Iterable[Patch]:
    yield heiretsu.layers, "in_my_vocabulary", off_by_one(first=1, last=0)


@bug(
    "the last entry of each shard of the vocabulary is nobody's",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent=None,
    diagnosis="by input",
)
def last_of_the_vocabulary_shard_lost() -> Iterable[Patch]:
    yield heiretsu.layers, "in_my_vocabulary", off_by_one(first=0, last=1)


@bug(
    "pytorch/pytorch#168134 (its mechanism: pieces found by rounding up, where they are not)",
    case="dp1-tp4-pp1",  # two pieces of 257 are the same either way
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp1-tp2-pp1",
    diagnosis="by input",
)
def vocabulary_cut_by_rounding_up() -> Iterable[Patch]:
    def in_my_vocabulary(ids: torch.Tensor, layout: Any, mesh: Any) -> Any:
        parts, index = mesh.size("tp"), mesh.at.tp
        start = -(-layout.shape[0] // parts) * index
        _, length = share(layout.shape[0], parts, index)
        is_mine = (ids >= start) & (ids < start + length)
        return torch.where(is_mine, ids - start, 0), is_mine

    yield heiretsu.layers, "in_my_vocabulary", in_my_vocabulary


@bug(
    "tokens of other ranks get the first row of the own shard",
    case="dp1-tp2-pp1",
    first="forward of logits",
    seen=EVERYTHING,
    silent="dp2-tp1-pp1",
)
def tokens_of_others_not_masked() -> Iterable[Patch]:
    def forward(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        local, _ = in_my_vocabulary(tokens, self.layouts["weight"], self.mesh)
        return reduce(F.embedding(local, self.weight), self.mesh, "tp")

    yield heiretsu.layers.VocabEmbedding, "forward", forward


@bug(
    "what was looked up for others is zeroed in place, out of autograd's sight",
    case="dp1-tp2-pp1",
    first="gradient of wte.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="some rows",
)
def tokens_of_others_masked_in_forward_only() -> Iterable[Patch]:
    def forward(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        local, is_mine = in_my_vocabulary(tokens, self.layouts["weight"], self.mesh)
        x = F.embedding(local, self.weight)
        x.data[~is_mine] = 0.0
        return reduce(x, self.mesh, "tp")

    yield heiretsu.layers.VocabEmbedding, "forward", forward


@bug(
    "pytorch/torchtitan#3412 (what comes back from a cut head is taken for complete)",
    case="dp1-tp2-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    status="split",
    diagnosis="not reduced",
)
def no_sum_in_backward_of_the_head() -> Iterable[Patch]:
    yield heiretsu.model, "vocab_logits", lambda x, weight, mesh: F.linear(x, weight)


class Terms(NamedTuple):
    """What the loss of a token is made of, before ranks have talked but for the peak."""

    shifted: torch.Tensor  # the logits less the largest one
    own: torch.Tensor  # the sum of their exponentials
    target: torch.Tensor  # the target's, where it is this rank's; else of some other token
    is_mine: torch.Tensor


def terms_of(logits: torch.Tensor, targets: torch.Tensor, vocab: int, mesh: Any) -> Terms:
    shifted = logits - all_max(logits.detach().amax(-1), mesh, "tp").unsqueeze(-1)
    local, is_mine = in_my_vocabulary(targets, Layout((vocab,), Cut("tp", dim=0)), mesh)
    target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1)
    return Terms(shifted, shifted.exp().sum(-1), target, is_mine)


def scored(loss: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.where(targets == IGNORE, 0.0, loss).sum()


@bug(
    "each shard subtracts its own largest logit",
    case="dp1-tp2-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="rows scaled",
)
def largest_logit_not_shared() -> Iterable[Patch]:
    yield heiretsu.layers, "all_max", lambda x, mesh, axis: x


@bug(
    "the softmax is over the own part of the vocabulary (as in NVIDIA/Megatron-LM#737)",
    case="dp1-tp2-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="rows scaled",
)
def exponentials_not_summed_over_tp() -> Iterable[Patch]:
    def loss(logits: torch.Tensor, targets: torch.Tensor, vocab: int, mesh: Any) -> torch.Tensor:
        terms = terms_of(logits, targets, vocab, mesh)
        target = reduce(terms.target * terms.is_mine, mesh, "tp")
        return scored(terms.own.log() - target, targets)

    yield heiretsu.train, "vocab_cross_entropy", loss


@bug(
    "modelscope/ms-swift#9947 (a collective that autograd cannot see, inside of the loss)",
    case="dp1-tp2-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="rows scaled",
)
def exponentials_summed_out_of_sight() -> Iterable[Patch]:
    def loss(logits: torch.Tensor, targets: torch.Tensor, vocab: int, mesh: Any) -> torch.Tensor:
        terms = terms_of(logits, targets, vocab, mesh)
        alone = mesh.size("tp") == 1
        total = terms.own if alone else all_sum(terms.own.detach(), mesh, "tp")
        target = reduce(terms.target * terms.is_mine, mesh, "tp")
        return scored(total.log() - target, targets)

    yield heiretsu.train, "vocab_cross_entropy", loss


@bug(
    "ranks that do not hold the target add the logit of another token",
    case="dp1-tp2-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="some columns",
)
def target_logit_of_every_shard() -> Iterable[Patch]:
    def loss(logits: torch.Tensor, targets: torch.Tensor, vocab: int, mesh: Any) -> torch.Tensor:
        terms = terms_of(logits, targets, vocab, mesh)
        total = reduce(torch.stack([terms.own, terms.target]), mesh, "tp")
        return scored(total[0].log() - total[1], targets)

    yield heiretsu.train, "vocab_cross_entropy", loss


@bug(
    "the shards are filled up to equal sizes, and the softmax counts the filling",
    case="dp1-tp2-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    diagnosis="rows scaled",
)
def filling_of_the_vocabulary_in_the_softmax() -> Iterable[Patch]:
    def loss(logits: torch.Tensor, targets: torch.Tensor, vocab: int, mesh: Any) -> torch.Tensor:
        size = -(-vocab // mesh.size("tp"))
        filled = F.pad(logits, (0, size - logits.shape[-1]))
        terms = terms_of(filled, targets, vocab, mesh)
        total = reduce(terms.own, mesh, "tp").log()
        return scored(total - reduce(terms.target * terms.is_mine, mesh, "tp"), targets)

    yield heiretsu.train, "vocab_cross_entropy", loss


@bug(
    "pytorch/torchtitan#4297 (a target in no shard: no loss, and yet the gradient of a softmax)",
    case="dp1-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="leak",
)
def ignored_targets_have_a_gradient() -> Iterable[Patch]:
    def loss(logits: torch.Tensor, targets: torch.Tensor, vocab: int, mesh: Any) -> torch.Tensor:
        terms = terms_of(logits, targets, vocab, mesh)
        each = reduce(terms.own, mesh, "tp").log()
        each = each - reduce(terms.target * terms.is_mine, mesh, "tp")
        return torch.where(targets == IGNORE, each - each.detach(), each).sum()

    yield heiretsu.train, "vocab_cross_entropy", loss


@bug(
    "token 0 is taken for padding",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent=None,
    diagnosis="by input",
)
def target_0_is_not_scored() -> Iterable[Patch]:
    def loss(
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab: int,
        mesh: Any,
        right: Any = vocab_cross_entropy,
    ) -> torch.Tensor:
        return right(logits, targets.masked_fill(targets == 0, IGNORE), vocab, mesh)

    yield heiretsu.train, "vocab_cross_entropy", loss
