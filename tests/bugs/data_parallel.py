"""Bugs of the sum over dp: forgotten, made twice, or made of buckets that miss or mix something."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

import heiretsu.sync
import heiretsu.train
from heiretsu.comm import all_sum
from tests.bugs.bug import ALL_BUT_FORWARD, LAST, Patch, bug
from tests.bugs.tied import mixed_buckets


@bug(
    "gradient sync forgotten, as in accumulation without a last sync",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="not reduced",
)
def gradients_not_averaged_over_dp() -> Iterable[Patch]:
    yield heiretsu.train, "average", lambda model, limit: None


@bug(
    "deepspeedai/DeepSpeed#855 (the way through the pipeline leaves the reduction out)",
    case="dp2-tp1-pp2",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp2-tp1-pp1",
    status="split",
    diagnosis="not reduced",
)
def pipeline_does_not_average() -> Iterable[Patch]:
    def average(model: Any, limit: int, right: Any = heiretsu.train.average) -> None:
        if model.mesh.size("pp") == 1:
            right(model, limit)

    yield heiretsu.train, "average", average


@bug(
    "pytorch/pytorch#162338 (its mechanism: averaged by the reduction and once more by hand)",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    diagnosis="scaled",
)
def gradients_averaged_twice() -> Iterable[Patch]:
    def average(model: Any, limit: int, once: Any = heiretsu.train.average) -> None:
        once(model, limit)
        for grad in heiretsu.sync.gradients(model):
            grad /= model.mesh.size("dp")

    yield heiretsu.train, "average", average


@bug(
    "EleutherAI/gpt-neox#1259 (hooks that never fire, on the parameters that are not cut)",
    case="dp2-tp1-pp1",
    first=LAST,
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="not reduced",
)
def whole_parameters_not_averaged() -> Iterable[Patch]:
    def buckets(model: Any, limit: int) -> Iterable[list[torch.Tensor]]:
        grads = [p.grad for _, p, layout in model.parts if layout.cut is not None]
        return heiretsu.sync._packed(grads[::-1], limit)

    yield heiretsu.sync, "buckets", buckets


@bug(
    "a gradient larger than a bucket fits into none",
    case="dp2-tp1-pp1",
    first="gradient of wte.weight",
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="not reduced",
)
def gradient_larger_than_a_bucket_is_left_out() -> Iterable[Patch]:
    def packed(grads: Any, limit: int, right: Any = heiretsu.sync._packed) -> Any:
        return right([grad for grad in grads if grad.nbytes <= limit], limit)

    yield heiretsu.sync, "_packed", packed


@bug(
    "facebookresearch/fairscale#517 (its mechanism: the last bucket never gets full)",
    case="dp2-tp1-pp1",
    first="gradient of ",
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
    status="split",
    diagnosis="not reduced",
)
def last_bucket_is_not_sent() -> Iterable[Patch]:
    def packed(grads: Any, limit: int, right: Any = heiretsu.sync._packed) -> Iterator[Any]:
        yield from list(right(grads, limit))[:-1]

    yield heiretsu.sync, "_packed", packed


@bug(
    "deepspeedai/DeepSpeed#545 (its mechanism: what comes back is dealt out in another order)",
    case="dp2-tp1-pp1",
    first="gradient of ",
    seen=ALL_BUT_FORWARD,
    silent="dp1-tp2-pp1",
)
def bucket_unpacked_in_another_order() -> Iterable[Patch]:
    def average(model: Any, limit: int) -> None:
        if model.mesh.size("dp") == 1:
            return
        for bucket in heiretsu.sync.buckets(model, limit):
            flat = torch.cat([grad.flatten() for grad in bucket])
            places = bucket[::-1]
            parts = all_sum(flat, model.mesh, "dp").split([grad.numel() for grad in places])
            for grad, part in zip(places, parts, strict=True):
                grad.copy_(part.view_as(grad))

    yield heiretsu.train, "average", average


@bug(
    "found by parity: parameters that tp ranks share are reduced in buckets of unequal sizes",
    case="dp3-tp2-pp1",
    first="gradient of ",  # which one depends on the bits
    seen="gradient state",
    silent="dp2-tp2-pp1",
    dtype="float32",
    status="split",
    diagnosis="rounding",
)
def shared_parameters_in_mixed_buckets() -> Iterable[Patch]:
    yield heiretsu.sync, "buckets", mixed_buckets
