"""The one file that knows both: makes heiretsu, and a plain GPT, targets of parity.

The task is hard on purpose. Text is real, but for a few places that hold every token of the
vocabulary in turn (text never visits the borders of its shards); targets are masked unevenly, some
microbatches and one dp rank of eight having none; every parameter has a generic value that each
dtype holds exactly (zero biases and unit norms hide mistakes); the vocabulary is prime, the context
longer than the sequences; gradients are clipped in the steps of AdamW and not in that of SGD, and
fill several buckets, of which one is smaller than the embedding's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from heiretsu import PRESETS, Batch, Mesh, Topology, Trainer, data, problems
from heiretsu import Run as Training
from heiretsu.config import Model
from heiretsu.layers import ColumnLinear, RowLinear, layouts
from heiretsu.layout import Cut, Layout, Span, share
from heiretsu.model import GPT
from heiretsu.rng import stream
from parity import Case, Run, Trace, nudge, record_modules
from parity.modules import Placed, Seen
from tests.reference.plain_gpt import PlainGPT, adamw, mean_loss

LR = {"sgd": 0.2, "adamw": 2e-3}
MAX_NORM = {"sgd": 1e3, "adamw": 0.5}
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Task:
    """The `options` of matrix.yaml; sizes of 0 are the preset's."""

    preset: str = "matrix"
    tied: bool = True
    data: str = "topics"
    batch: int = 64
    sequence: int = 16
    micro_batches: int = 8
    layers: int = 0
    heads: int = 0
    head_width: int = 0
    vocab: int = 0

    @property
    def model(self) -> Model:
        preset = PRESETS[self.preset]
        heads = self.heads or preset.heads
        width = self.head_width or preset.d_model // preset.heads
        return Model(
            vocab=self.vocab or preset.vocab,
            context=preset.context,
            d_model=heads * width,
            heads=heads,
            layers=self.layers or preset.layers,
            tied=self.tied,
        )

    def training(self, case: Case, **rest: object) -> Training:
        return Training(
            model=self.model,
            topology=Topology(**case.axes),
            batch=self.batch,
            sequence=self.sequence,
            microbatches=self.micro_batches,
            weight_decay=WEIGHT_DECAY,
            bucket_bytes=80_000,
            **rest,  # type: ignore[arg-type]
        )


def objections(case: Case, options: Mapping[str, object]) -> list[str]:
    """Why the model or the batch cannot be cut for this case; ValueError when options are wrong."""
    unknown = set(options) - set(Task.__dataclass_fields__)
    if unknown:
        known = ", ".join(Task.__dataclass_fields__)
        raise ValueError(f"options: {', '.join(sorted(unknown))} unknown (known: {known})")
    task = Task(**options)  # type: ignore[arg-type]
    if task.preset not in PRESETS:
        raise ValueError(f"options: preset {task.preset} unknown (known: {', '.join(PRESETS)})")
    corpus(task.data).check(task.model.vocab, task.sequence)
    return problems(task.training(case))


@cache
def corpus(source: str) -> data.Corpus:
    return data.load(source)


@cache
def mesh_of(topology: Topology, rank: int, device: str) -> Mesh:
    return Mesh(topology, rank, torch.device(device))


def batches(task: Task, seed: int, steps: int) -> Iterator[Batch]:
    """Text, with every token of the vocabulary in turn in the first places of its sequences, and
    with targets that are not scored: a sequence's end, of any length; and the first eighth of all
    sequences, which is the whole share of dp rank 0 of 8, and of microbatch 0 of 8.
    """
    vocab = task.model.vocab
    borders = min(5, task.sequence)
    turn = torch.arange(task.batch * borders).view(task.batch, borders)
    for step in range(steps):
        tokens, targets = corpus(task.data).batch(seed, step, task.batch, task.sequence)
        tokens[:, :borders] = turn % vocab
        targets[:, :borders] = (turn + vocab // 2) % vocab
        scored = torch.randint(
            task.sequence + 1, (task.batch, 1), generator=stream(seed, "mask", step)
        )
        scored[: task.batch // 8] = 0
        ends = torch.arange(task.sequence) >= scored
        yield Batch(tokens, targets.masked_fill(ends, -100))


@cache
def weights(task: Task, seed: int) -> dict[str, Tensor]:
    """A generic value for every parameter of the plain model, exact in bfloat16; float64, and the
    same tensors each time.
    """
    values = {}
    for name, parameter in plain_model(task).named_parameters():
        noise = torch.randn(parameter.shape, generator=stream(seed, "weights", name))
        if parameter.ndim == 1:
            value = 0.2 * noise + float(".ln_" in f".{name}" and name.endswith("weight"))
        elif name.startswith(("wte", "wpe")):
            value = 0.2 * noise
        else:
            value = 0.8 * noise / parameter.shape[1] ** 0.5
        values[name] = value.bfloat16().double()
    return values


def plain_model(task: Task) -> PlainGPT:
    m = task.model
    return PlainGPT(m.vocab, m.context, m.d_model, m.heads, m.layers, m.tied)


def plain(run: Run) -> Trace:
    """The independent baseline: the whole batch at once on one device."""
    task = Task(**run.options)  # type: ignore[arg-type]
    trace = Trace()
    for kind, steps in (("sgd", 1), ("adamw", run.steps)):
        losses, norms = [], []
        model = plain_model(task).to(run.device, getattr(torch, run.dtype))
        load_plain(model, weights(task, run.seed), run.nudge)
        detail = run.detail and kind == "sgd"
        for name, parameter in model.named_parameters() if detail else ():
            trace.add("parameter", name, parameter)
        sgd = torch.optim.SGD(model.parameters(), lr=LR["sgd"])
        optimizer = sgd if kind == "sgd" else adamw(model, LR["adamw"], WEIGHT_DECAY)
        for tokens, targets in batches(task, run.seed, steps):
            optimizer.zero_grad()
            with record_modules(trace, model) if detail else nullcontext():
                logits = model(tokens.to(run.device))
                if kind == "sgd":
                    trace.add("forward", "logits", logits)
                loss = mean_loss(logits, targets.to(run.device))
                loss.backward()
            if kind == "sgd":
                record_plain_gradients(trace, model)
            norms.append(clip(model, MAX_NORM[kind]))
            losses.append(loss.detach())
            optimizer.step()
        trace.add("norm", f"{kind} by step", torch.stack(norms))
        record_plain_state(trace, kind, model, optimizer)
        trace.add("loss", f"{kind} by step", torch.stack(losses))
    return trace


def clip(model: PlainGPT, max_norm: float) -> Tensor:
    """torch's clipping, its norm in float32 at least, as heiretsu has it."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    norm = nn.utils.get_total_norm([grad.to(dtype) for grad in grads])
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def load_plain(model: PlainGPT, values: dict[str, Tensor], seed: int) -> None:
    model.load_state_dict(values)
    for name, parameter in model.named_parameters():
        nudge(parameter, name, seed)


def record_plain_gradients(trace: Trace, model: PlainGPT) -> None:
    for name, parameter in reversed(list(model.named_parameters())):
        assert parameter.grad is not None
        trace.add("gradient", name, parameter.grad)


def record_plain_state(
    trace: Trace, kind: str, model: PlainGPT, optimizer: torch.optim.Optimizer
) -> None:
    for name, parameter in model.named_parameters():
        for part, tensor in state_of(optimizer, parameter):
            trace.add("state", f"{kind} {part}{name}", tensor)


def state_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> Iterator[tuple[str, Tensor]]:
    """Moments before the parameter: it is made from them."""
    state = optimizer.state.get(parameter, {})
    for part in ("exp_avg", "exp_avg_sq"):
        if part in state:
            yield f"{part} of ", state[part]
    yield "", parameter


def candidate(run: Run) -> Trace:
    """heiretsu, on every rank of its topology."""
    task = Task(**run.options)  # type: ignore[arg-type]
    training = task.training(run.case, dtype=run.dtype, seed=run.seed, **run.variant)
    mesh = mesh_of(training.topology, run.rank, run.device)
    trace = Trace(at=mesh.at._asdict())
    for kind, steps in (("sgd", 1), ("adamw", run.steps)):
        losses, norms = [], []
        step = replace(training, optimizer=kind, lr=LR[kind], max_norm=MAX_NORM[kind])
        trainer = Trainer(step, mesh)
        load(trainer, weights(task, run.seed), run.nudge)
        # Under masks AdamW's first step is to begin where SGD's does: its own records are dropped.
        first = trace if kind == "sgd" else Trace()
        for number, batch in enumerate(batches(task, run.seed, steps)):
            logits: list[Tensor] = []
            hook = trainer.model.register_forward_hook(
                lambda _, __, out, logits=logits: logits.append(out.detach())
            )
            detail = run.detail and number == 0
            if detail:
                record_parameters(first, trainer)
            with record_pieces(first, trainer) if detail else nullcontext():
                losses.append(trainer.gradients(batch))
            hook.remove()
            if detail and kind != "sgd":
                record_gradients(first, trainer)
            if kind == "sgd":
                record_logits(trace, trainer, logits)
                record_gradients(trace, trainer)
            norms.append(trainer.update())
        trace.add("norm", f"{kind} by step", torch.stack(norms))
        record_state(trace, kind, trainer)
        trace.add("loss", f"{kind} by step", torch.stack(losses))
    return trace


def load(trainer: Trainer, values: dict[str, Tensor], seed: int) -> None:
    mesh = trainer.mesh
    with torch.no_grad():
        for name, parameter, layout in layouts(trainer.model):
            whole = values[name].to(parameter.dtype, copy=True)
            nudge(whole, name, seed)
            parameter.copy_(layout.take(whole, mesh.size("tp"), mesh.at.tp))


def record_logits(trace: Trace, trainer: Trainer, logits: list[Tensor]) -> None:
    """The last stage's microbatches are this dp rank's rows, and this tp rank's columns."""
    mesh, run = trainer.mesh, trainer.run
    if not mesh.is_last_stage:
        return
    shape = (run.batch, run.sequence, run.model.vocab)
    row, _ = share(run.batch, mesh.size("dp"), mesh.at.dp)
    (_, column, _) = Layout(shape, Cut("tp", 2)).spans(mesh.size("tp"), mesh.at.tp)[0]
    trace.add("forward", "logits", torch.cat(logits), shape=shape, offset=(row, 0, column))


def record_parameters(trace: Trace, trainer: Trainer) -> None:
    for name, parameter, layout in layouts(trainer.model):
        add(trace, trainer.mesh, "parameter", name, parameter, layout)


def record_pieces(trace: Trace, trainer: Trainer) -> AbstractContextManager[None]:
    """What modules see: rows of this dp rank's microbatch, and a piece of what is cut over tp."""
    mesh, run = trainer.mesh, trainer.run
    first, rows = share(run.batch, mesh.size("dp"), mesh.at.dp)
    modules = dict(trainer.model.named_modules())

    def place(seen: Seen) -> Placed | None:
        is_whole = mesh.is_first_stage if seen.is_input else mesh.is_last_stage
        if not seen.path and not is_whole:
            return None  # a stage, which the baseline does not have
        row, _ = share(rows, run.microbatches, seen.call)
        cut = cut_of(modules[seen.path], seen.is_input)
        *inner, last = seen.tensor.shape[1:]  # of tokens: nothing, and T
        size, spans = last, [Span(0, 0, last)]
        if cut is not None:
            size, blocks = cut
            layout = Layout((size,), Cut("tp", 0, blocks))
            spans = layout.spans(mesh.size("tp"), mesh.at.tp)
        zeros = (0,) * len(inner)
        return Placed(
            (run.batch, *inner, size),
            [
                ((first + row, *zeros, start), partial(Tensor.narrow, dim=-1, start=own, length=n))
                for own, start, n in spans
            ],
        )

    return record_modules(trace, trainer.model, place)


def cut_of(module: nn.Module, is_input: bool) -> tuple[int, int] | None:
    """The whole size of a last dimension that is cut over tp, and its blocks; None if it is not."""
    if isinstance(module, GPT) and not is_input:
        return module.config.vocab, 1
    if isinstance(module, ColumnLinear) and not is_input:
        whole, cut = module.layouts["bias"]
        return whole[0], cut.blocks if cut else 1
    if isinstance(module, RowLinear) and is_input:
        return module.layouts["weight"].shape[1], 1
    return None


def record_gradients(trace: Trace, trainer: Trainer) -> None:
    for name, parameter, layout in reversed(list(layouts(trainer.model))):
        assert parameter.grad is not None
        add(trace, trainer.mesh, "gradient", name, parameter.grad, layout)


def record_state(trace: Trace, kind: str, trainer: Trainer) -> None:
    for name, parameter, layout in layouts(trainer.model):
        for part, tensor in state_of(trainer.optimizer, parameter):
            add(trace, trainer.mesh, "state", f"{kind} {part}{name}", tensor, layout)


def add(trace: Trace, mesh: Mesh, check: str, name: str, local: Tensor, layout: object) -> None:
    assert isinstance(layout, Layout)
    for offset, box in layout.place(local, mesh.size("tp"), mesh.at.tp):
        trace.add(check, name, box, shape=layout.shape, offset=offset)
