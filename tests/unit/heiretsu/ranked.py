"""What the tests of communication run on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from heiretsu import PRESETS, Mesh, Topology
from heiretsu.comm import PAIRS, StageLink, copy, reduce
from heiretsu.layers import layouts, vocab_cross_entropy
from heiretsu.layout import share
from heiretsu.model import GPT, initialise
from heiretsu.rng import stream


def mesh_of(text: str) -> Mesh:
    return Mesh(Topology.parse(text), dist.get_rank(), torch.device("cpu"))


def adjoint(name: str) -> tuple[float, float]:
    """<f(x), y> and <x, f*(y)>, each summed over what the ranks hold; they must agree.

    A tensor that is equal on all ranks counts once, a part counts on its rank: `copy` takes one
    tensor to a part each, `reduce` takes a part each to one tensor.
    """
    size = dist.get_world_size()
    mesh = mesh_of(f"tp{size}")
    whole = torch.randn(7, generator=stream(0, "whole"), dtype=torch.float64)
    part = torch.randn(7, generator=stream(0, "part", mesh.rank), dtype=torch.float64)
    x, y = (whole, part) if name == "copy" else (part, whole)
    x = x.clone().requires_grad_()
    image = (copy if name == "copy" else reduce)(x, mesh, "tp")
    image.backward(y)
    assert x.grad is not None
    left, right = image.detach() @ y, x.detach() @ x.grad
    # The side that lies in the space of parts is a sum over ranks.
    dist.all_reduce(left if name == "copy" else right)
    return float(left), float(right)


def broken_adjoint(name: str) -> tuple[float, float]:
    forward, _ = PAIRS[name]
    PAIRS[name] = (forward, forward)
    return adjoint(name)


def around_the_stages() -> list[float]:
    """Everybody sends both ways before anybody receives: sends must not wait."""
    mesh = mesh_of(f"pp{dist.get_world_size()}")
    link, stage, last = StageLink(mesh), mesh.at.pp, mesh.size("pp") - 1
    for mb in range(3):
        for other in (stage - 1, stage + 1):
            if 0 <= other <= last:
                link.send(torch.full((2, mb + 1), 10.0 * stage + mb), other)
    got = []
    for mb in range(3):
        for other in (stage - 1, stage + 1):
            if 0 <= other <= last:
                x = link.receive((2, mb + 1), torch.float32, other)
                assert (x == x[0, 0]).all()
                got.append(float(x[0, 0]))
    link.flush()
    return got


def cross_entropy(vocab: int, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and this rank's part of the logits' gradient."""
    mesh = mesh_of(f"tp{dist.get_world_size()}")
    start, length = share(vocab, mesh.size("tp"), mesh.at.tp)
    logits = whole_logits(vocab, targets)[..., start : start + length].clone().requires_grad_()
    loss = vocab_cross_entropy(logits, targets, vocab, mesh)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def whole_logits(vocab: int, targets: torch.Tensor) -> torch.Tensor:
    shape = (*targets.shape, vocab)
    return 30 * torch.randn(shape, generator=stream(0, "logits"), dtype=torch.float64)


def initial_pieces(topology: str, tied: bool) -> list[tuple[str, list, tuple[int, ...]]]:  # type: ignore[type-arg]
    """Every parameter of this rank as (name, boxes, shape of the whole)."""
    mesh = mesh_of(topology)
    preset = PRESETS["matrix"]
    model = GPT(type(preset)(**{**vars(preset), "tied": tied}), mesh)
    initialise(model, seed=4)
    return [
        (name, layout.place(p.detach(), mesh.size("tp"), mesh.at.tp), layout.shape)
        for name, p, layout in layouts(model)
    ]
