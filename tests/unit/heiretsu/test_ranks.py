"""Communication and cutting on real ranks, each held against the plain computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parity import launch
from tests.unit.heiretsu import ranked


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ["copy", "reduce"])
def test_each_pair_is_adjoint(name: str, world: int) -> None:
    for left, right in launch(ranked.adjoint, world, name):
        assert left == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("name", ["copy", "reduce"])
def test_a_pair_that_is_not_adjoint_is_seen(name: str) -> None:
    assert any(abs(left - right) > 1e-3 for left, right in launch(ranked.broken_adjoint, 2, name))


def test_stages_can_all_send_before_any_receives() -> None:
    assert launch(ranked.around_the_stages, 3) == [
        [10, 11, 12],
        [0, 20, 1, 21, 2, 22],
        [10, 11, 12],
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("masked", [0, 5, 12])
def test_vocab_parallel_cross_entropy_is_cross_entropy(world: int, masked: int) -> None:
    """Also with targets at every border of the shards, with none scored, and with large logits."""
    vocab = 7
    targets = torch.arange(12).remainder(vocab).view(3, 4)
    targets.view(-1)[:masked] = -100
    whole = ranked.whole_logits(vocab, targets).requires_grad_()
    loss = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    results = launch(ranked.cross_entropy, world, vocab, targets)
    for ours, _ in results:
        torch.testing.assert_close(ours, loss.detach(), rtol=1e-12, atol=1e-12)
    gradient = torch.cat([grad for _, grad in results], -1)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("topology", ["tp3", "pp3", "dp2", "tp2-pp2"])
def test_initial_parameters_are_the_same_on_every_topology(topology: str, tied: bool) -> None:
    (one,) = launch(ranked.initial_pieces, 1, "dp1", tied)
    # On one rank the boxes of a fused parameter lie one below the other.
    wholes = {name: torch.cat([box for _, box in boxes]) for name, boxes, _ in one}
    seen = {name: torch.zeros(whole.shape, dtype=torch.bool) for name, whole in wholes.items()}
    world = ranked.Topology.parse(topology).world
    for pieces in launch(ranked.initial_pieces, world, topology, tied):
        for name, boxes, shape in pieces:
            assert tuple(shape) == tuple(wholes[name].shape)
            for offset, box in boxes:
                window = tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))
                assert torch.equal(wholes[name][window], box)
                seen[name][window] = True
    assert all(covered.all() for covered in seen.values())
    assert ("lm_head.weight" in wholes) is not tied
