"""Bugs of the tied embedding, of which both ends of a pipeline have a copy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import heiretsu.sync
import heiretsu.train
from heiretsu.sync import sum_tied
from tests.bugs.bug import AFTER_GRADIENTS, ALL_BUT_FORWARD, Patch, bug

TIED = "gradient of wte.weight"


@bug(
    "the embedding of the first and of the last stage go their own ways",
    case="dp1-tp1-pp2",
    first=TIED,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="not reduced",
)
def tied_gradient_not_summed() -> Iterable[Patch]:
    yield heiretsu.train, "sum_tied", lambda model: None


@bug(
    "the hook of a shared parameter is registered for its other name too",
    case="dp1-tp1-pp2",
    first=TIED,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="scaled",
)
def tied_gradient_summed_twice() -> Iterable[Patch]:
    def twice(model: Any) -> None:
        sum_tied(model)
        sum_tied(model)

    yield heiretsu.train, "sum_tied", twice


@bug(
    "the two ends of the pipeline average what they should add",
    case="dp1-tp1-pp2",
    first=TIED,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="scaled",
)
def tied_gradient_averaged() -> Iterable[Patch]:
    def averaged(model: Any) -> None:
        sum_tied(model)
        if model.mesh.size("pp") > 1 and hasattr(model, "wte"):
            model.wte.weight.grad /= 2

    yield heiretsu.train, "sum_tied", averaged


@bug(
    "the sum of the tied gradient stays where the embedding is",
    case="dp1-tp1-pp2",
    first=TIED,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="some ranks",
)
def tied_gradient_summed_on_the_first_stage_only() -> Iterable[Patch]:
    def one_sided(model: Any) -> None:
        own = model.wte.weight.grad.clone()
        sum_tied(model)
        if not model.mesh.is_first_stage:
            model.wte.weight.grad = own

    yield heiretsu.train, "sum_tied", one_sided


@bug(
    "NVIDIA/Megatron-LM#1012 (the head's gradient is made after the sum over dp was begun)",
    case="dp2-tp1-pp2",
    first=TIED,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    status="split",
)
def head_gradient_comes_after_the_sum_over_dp() -> Iterable[Patch]:
    def average(model: Any, limit: int, right: Any = heiretsu.train.average) -> None:
        late = model.wte.weight.grad.clone()
        right(model, limit)
        if model.mesh.is_last_stage and not model.mesh.is_first_stage:
            model.wte.weight.grad = late

    yield heiretsu.train, "average", average


@bug(
    "NVIDIA/Megatron-LM#7228",
    case="dp1-tp1-pp2",
    first="norm of sgd by step",
    seen=AFTER_GRADIENTS,
    silent="dp1-tp2-pp1",
    diagnosis="counted often",
)
def tied_embedding_counted_at_both_ends() -> Iterable[Patch]:
    yield (
        heiretsu.sync,
        "counts_here",
        lambda name, is_whole, mesh: not is_whole or mesh.at.tp == 0,
    )


@bug(
    "the last stage takes its copy of the tied embedding for a head, which is not decayed",
    case="dp1-tp1-pp2",
    first="state of adamw wte.weight",
    seen="state",
    silent="dp1-tp2-pp1",
    status="split",
    steps=1,
    diagnosis="decay",
)
def tied_head_is_not_decayed() -> Iterable[Patch]:
    def make(model: Any, run: Any, right: Any = heiretsu.train.make_optimizer) -> Any:
        optimizer = right(model, run)
        if run.optimizer == "adamw" and not model.mesh.is_first_stage:
            decayed, spared = optimizer.param_groups
            head = model.wte.weight
            decayed["params"] = [p for p in decayed["params"] if p is not head]
            spared["params"] = [*spared["params"], head]
        return optimizer

    yield heiretsu.train, "make_optimizer", make


def mixed_buckets(model: Any, limit: int) -> Iterable[list[torch.Tensor]]:
    # Whether bits differ depends on where the buckets end; with this limit they do.
    return heiretsu.sync._packed(heiretsu.sync.gradients(model)[::-1], 100_000)


# This one and `shared_parameters_in_mixed_buckets` were real, in the first version of heiretsu, and
# parity found them. Gloo and NCCL add in an order that depends on an element's place in the buffer.


@bug(
    "found by parity: both ends of the pipeline reduce the tied gradient in unequal buckets",
    case="dp3-tp1-pp2",
    first=TIED,
    seen="gradient state",
    silent="dp2-tp1-pp1",
    dtype="float32",
    status="split",
    diagnosis="rounding",
)
def tied_gradient_summed_before_the_average() -> Iterable[Patch]:
    right = heiretsu.sync.sum_tied

    def average(model: Any, limit: int, once: Any = heiretsu.train.average) -> None:
        right(model)
        once(model, limit)

    yield heiretsu.train, "average", average
    yield heiretsu.train, "sum_tied", lambda model: None
    yield heiretsu.sync, "buckets", mixed_buckets
