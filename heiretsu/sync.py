"""Between backward and step: what ranks owe each other so that all hold the gradient of one loss.

1. `average`       add the gradients of the dp ranks, in flat buckets. Each rank divided its loss by
                   the number of valid tokens in the whole batch, so the sum is the average that is
                   wanted, however unevenly the tokens are spread;
2. `sum_tied`      the tied embedding was used on the first and on the last stage: add both parts;
3. `global_norm`   the norm of the whole gradient, each element counted once;
4. `clip`          scale by it.

Copies must stay equal to the bit, or they drift apart. An all-reduce adds in an order that depends
on where an element lies in the buffer, so two groups that reduce the same copies must reduce them
in equal buffers. Hence parameters that are whole on every tp rank have buckets of their own (cut
ones need not be equally large on all tp ranks), and the tied embedding is added up after the
average, when each end holds one finished term.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from heiretsu.comm import StageLink, all_sum
from heiretsu.mesh import Mesh
from heiretsu.model import GPT


def gradients(model: GPT) -> list[Tensor]:
    grads = [p.grad for _, p, _ in model.parts]
    assert all(grad is not None for grad in grads), "a parameter has no gradient"
    return [grad for grad in grads if grad is not None]


def average(model: GPT, bucket_bytes: int) -> None:
    if model.mesh.size("dp") == 1:
        return
    for bucket in buckets(model, bucket_bytes):
        flat = all_sum(torch.cat([grad.flatten() for grad in bucket]), model.mesh, "dp")
        sizes = [grad.numel() for grad in bucket]
        for grad, part in zip(bucket, flat.split(sizes), strict=True):
            grad.copy_(part.view_as(grad))


def buckets(model: GPT, limit: int) -> Iterator[list[Tensor]]:
    """Runs of gradients of up to `limit` bytes; a larger one goes alone. Last layers first: their
    gradients are ready first.
    """
    for is_cut in (False, True):
        grads = [p.grad for _, p, layout in model.parts if (layout.cut is not None) == is_cut]
        yield from _packed([grad for grad in reversed(grads) if grad is not None], limit)


def _packed(grads: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    pack: list[Tensor] = []
    for grad in grads:
        if pack and sum(g.nbytes for g in pack) + grad.nbytes > limit:
            yield pack
            pack = []
        pack.append(grad)
    if pack:
        yield pack


def sum_tied(model: GPT) -> None:
    """Both ends of the pipeline add the same two terms, and addition commutes."""
    mesh = model.mesh
    is_end = mesh.is_first_stage or mesh.is_last_stage
    if not model.config.tied or mesh.size("pp") == 1 or not is_end:
        return
    grad = model.wte.weight.grad
    assert grad is not None
    other = mesh.size("pp") - 1 - mesh.at.pp
    link = StageLink(mesh)
    link.send(grad.clone(), other)
    grad += link.receive(tuple(grad.shape), grad.dtype, other)
    link.flush()


def global_norm(model: GPT) -> Tensor:
    """The 2-norm of the whole gradient, a scalar in float32 at least, the same on every rank."""
    mesh = model.mesh
    dtype = torch.promote_types(gradients(model)[0].dtype, torch.float32)
    mine = [
        grad.to(dtype)
        for grad, (name, _, layout) in zip(gradients(model), model.parts, strict=True)
        if counts_here(name, layout.cut is None, mesh)
    ]
    total = nn.utils.get_total_norm(mine).to(mesh.device, dtype).square()
    return all_sum(all_sum(total, mesh, "tp"), mesh, "pp").sqrt()


def counts_here(name: str, is_whole: bool, mesh: Mesh) -> bool:
    """Of the ranks that hold the same elements, one counts them: tp 0, and for the tied embedding
    the first stage. (dp ranks do not add their norms, so each counts for itself.)
    """
    is_second_copy = name == "wte.weight" and not mesh.is_first_stage
    return not is_second_copy and (not is_whole or mesh.at.tp == 0)


def clip(model: GPT, norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm is at most `max_norm`, as torch.nn.utils does it."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in gradients(model):
        grad.mul_(factor.to(grad.dtype))
