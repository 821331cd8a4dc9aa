"""What to train and how, as values; `problems` lists every objection to a run at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from heiretsu.mesh import Topology
from heiretsu.schedule import SCHEDULES

DTYPES = ("float64", "float32", "bfloat16")
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a GPT-2. `context` is the longest sequence that it has positions for."""

    vocab: int
    context: int
    d_model: int
    heads: int
    layers: int
    tied: bool = True

    @property
    def d_hidden(self) -> int:
        return 4 * self.d_model


# `matrix` is made for being cut: a prime vocabulary (256 bytes and an end of text), 24 heads, which
# allow tp in {1, 2, 3, 4, 6, 8}, and 8 pipeline units, which 3, 5, 6 and 7 stages do not divide.
PRESETS = {
    "matrix": Model(vocab=257, context=20, d_model=48, heads=24, layers=6),
    "gpt2": Model(vocab=50257, context=1024, d_model=768, heads=12, layers=12),
    "gpt2-medium": Model(vocab=50257, context=1024, d_model=1024, heads=16, layers=24),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. `batch` counts the sequences of a step over all ranks and microbatches."""

    model: Model
    topology: Topology = field(default_factory=Topology)
    batch: int = 64
    sequence: int = 16
    microbatches: int = 8
    schedule: str = "1f1b"
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.1
    max_norm: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    bucket_bytes: int = 25 << 20


def problems(run: Run) -> list[str]:
    """Every reason why this run cannot be made; empty when it can."""
    return _model_problems(run.model, run.topology) + _run_problems(run)


def _model_problems(model: Model, topology: Topology) -> list[str]:
    found = []
    if model.d_model % model.heads:
        found.append(f"d_model={model.d_model} is no multiple of heads={model.heads}")
    if model.heads % topology.tp:
        good = ", ".join(str(n) for n in range(1, model.heads + 1) if model.heads % n == 0)
        found.append(f"{model.heads} heads cannot be cut over tp={topology.tp} (tp can be {good})")
    if model.vocab < topology.tp:
        found.append(f"a vocabulary of {model.vocab} cannot be cut over tp={topology.tp}")
    if model.layers + 2 < topology.pp:
        found.append(
            f"{model.layers} layers, the embedding and the head make {model.layers + 2} units, "
            f"too few for pp={topology.pp} stages"
        )
    return found


def _run_problems(run: Run) -> list[str]:
    found = []
    pieces = run.topology.dp * run.microbatches
    if run.batch < pieces:
        found.append(
            f"a batch of {run.batch} sequences cannot be cut into dp={run.topology.dp} x "
            f"{run.microbatches} microbatches (batch must be {pieces} or more)"
        )
    if run.sequence > run.model.context:
        found.append(f"sequence={run.sequence} is longer than context={run.model.context}")
    for name, value, known in (
        ("schedule", run.schedule, tuple(SCHEDULES)),
        ("optimizer", run.optimizer, OPTIMIZERS),
        ("dtype", run.dtype, DTYPES),
    ):
        if value not in known:
            found.append(f"{name}={value} is unknown (known: {', '.join(known)})")
    for name, amount in (("lr", run.lr), ("max_norm", run.max_norm)):
        if not 0 < amount < float("inf"):
            found.append(f"{name}={amount} must be a number above 0")
    if not 0 <= run.weight_decay < float("inf"):
        found.append(f"weight_decay={run.weight_decay} must be 0 or a number above it")
    for name, number in (("microbatches", run.microbatches), ("sequence", run.sequence)):
        if number < 1:
            found.append(f"{name}={number} must be 1 or more")
    return found
