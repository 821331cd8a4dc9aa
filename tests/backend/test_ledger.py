"""The ledger equals what the algorithm says: Megatron's sums, the pipeline's sends, dp's buckets.

The formulas are those of Megatron-LM (arXiv 1909.08053, section 3): two all-reduces per layer in
the forward, two in the backward, of one microbatch of activations each; and per microbatch one
activation to the next stage and one gradient back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

import parity
from heiretsu import PRESETS, Mesh, Run, Topology, Trainer
from heiretsu.model import stage_units
from heiretsu.sync import buckets
from heiretsu.train import Batch
from parity.backend import Entry

BATCH, TOKENS, MICROBATCHES, ITEM = 24, 6, 3, 8  # ITEM: bytes of a float64
MODEL = PRESETS["matrix"]


@dataclass(frozen=True)
class Facts:
    """What the formulas need of one rank."""

    first: bool
    last: bool
    blocks: int
    embedding: int  # bytes of this rank's part
    bucket_bytes: tuple[int, ...]


def one_step(topology: Topology) -> Facts:
    """Gradients and update once, on every rank."""
    import torch.distributed as dist

    mesh = Mesh(topology, dist.get_rank(), torch.device("cpu"))
    run = Run(
        model=MODEL,
        topology=topology,
        batch=BATCH,
        sequence=TOKENS,
        microbatches=MICROBATCHES,
        dtype="float64",
        bucket_bytes=80_000,
    )
    trainer = Trainer(run, mesh)
    tokens = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % MODEL.vocab
    trainer.gradients(Batch(tokens, tokens))
    trainer.update()
    units = stage_units(MODEL.layers, topology.pp, mesh.at.pp)
    sizes = tuple(sum(g.nbytes for g in b) for b in buckets(trainer.model, run.bucket_bytes))
    blocks = sum(1 <= unit <= MODEL.layers for unit in units)
    tied = next((p.nbytes for name, p, _ in trainer.model.parts if name == "wte.weight"), 0)
    return Facts(mesh.is_first_stage, mesh.is_last_stage, blocks, tied, sizes)


def formula(t: Topology, facts: Facts) -> Counter[tuple[str, str, str, int]]:
    """(axis, operation, phase, bytes) to how often, for the calls of a step that carry tensors."""
    positions = BATCH // t.dp // MICROBATCHES * TOKENS
    activation, scores = positions * MODEL.d_model * ITEM, positions * ITEM
    found: Counter[tuple[str, str, str, int]] = Counter()
    if t.tp > 1:
        sums = 2 * facts.blocks + facts.first  # the embedding is one more sum
        found["tp", "all_reduce", "forward", activation] += MICROBATCHES * sums
        # The head's input gets a part of its gradient on every rank, as a block's does twice.
        found["tp", "all_reduce", "backward", activation] += MICROBATCHES * (
            2 * facts.blocks + facts.last
        )
        # The loss over a vocabulary that is cut: the largest logit, then sums.
        found["tp", "all_reduce", "forward", scores] += MICROBATCHES * facts.last
        found["tp", "all_reduce", "forward", 2 * scores] += MICROBATCHES * facts.last
    if t.pp > 1:
        for here, op, axis, phase in (
            (not facts.last, "send", "pp", "forward"),
            (not facts.first, "recv", "pp", "forward"),
            (not facts.first, "send", "pp upstream", "backward"),
            (not facts.last, "recv", "pp upstream", "backward"),
        ):
            found[axis, op, phase, activation] += MICROBATCHES * here
        # Both ends hold the tied embedding, and exchange their parts of its gradient.
        ways = ("pp", "pp upstream") if facts.first else ("pp upstream", "pp")
        for axis, op in zip(ways, ("send", "recv"), strict=True):
            found[axis, op, "step", facts.embedding] += facts.first or facts.last
    if t.dp > 1:
        for size in facts.bucket_bytes:
            found["dp", "all_reduce", "step", size] += 1
    # An axis that spans the world has the world's own group: DeviceMesh makes no other.
    alone = next((axis for axis in ("dp", "tp", "pp") if t.size(axis) == t.world), None)
    return Counter(
        {("world" if axis == alone else axis, *rest): n for (axis, *rest), n in (+found).items()}
    )


def counted(entries: list[Entry]) -> Counter[tuple[str, str, str, int]]:
    """As `formula`: without scalars (token count, loss, norm)."""
    return Counter((e.group, e.op, e.phase, e.bytes) for e in entries if e.bytes > ITEM)


@pytest.mark.parametrize(
    "topology", ["dp2-tp2-pp2", "dp1-tp4-pp2", "dp1-tp1-pp4", "dp4-tp2-pp1", "dp2-tp1-pp3"]
)
def test_the_ledger_equals_the_formula(topology: str) -> None:
    t = Topology.parse(topology)
    with parity.world(t.world, ledger=10_000) as w:
        facts = w.run(one_step, t)
    for rank, own in enumerate(facts):
        want = formula(t, own)
        assert counted(w.ledger[rank]) == want, f"rank {rank}"
