"""Which features of what a module takes in or puts out a rank has: those its parameters are for.

By its shape a piece of them would be one slice. But projections that are fused (q, k, v; gate, up)
are cut each by itself, and then a rank has a slice of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import nn

from parity.subject.alignment import Held
from parity.subject.placing import Stretch

# Their features are not the last dim.
CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
Features = Mapping[tuple[str, bool], Sequence[Stretch]]  # by the module's path; of its input?


def features_of(
    held: Sequence[Held], paths: Mapping[str, str], baseline: nn.Module
) -> dict[tuple[str, bool], list[Stretch]]:
    """By the paths of the baseline. `paths` are from the candidate's to those."""
    modules, found = dict(baseline.named_modules()), dict[tuple[str, bool], list[Stretch]]()
    for h in held:
        path, _, leaf = h.name.rpartition(".")
        module = modules[paths[path]] if path in paths else None
        if module is None or len(h.parts) != 1 or len(h.shape) != len(h.parts[0].shape):
            continue
        for is_input, dim in _dims(module, leaf, len(h.shape)).items():
            if (stretches := _along(h, dim)) is not None:
                found.setdefault((paths[path], is_input), stretches)
    return found


def _dims(module: nn.Module, leaf: str, dims: int) -> dict[bool, int]:
    """Which dim of a parameter goes along the features of the module's input, and of its output."""
    match leaf, dims:
        case "weight", 2 if isinstance(module, nn.Linear):
            return {False: 0, True: 1}
        case "weight", 2 if isinstance(module, nn.Embedding):
            return {False: 1}
        case "weight", 1 if not isinstance(module, CHANNELS_FIRST):
            return {False: 0, True: 0}
        case "bias", 1 if not isinstance(module, CHANNELS_FIRST):
            return {False: 0}
    return {}


def _along(held: Held, dim: int) -> list[Stretch] | None:
    """None where the tensor is kept in another order, or has only parts of its rows, or has some
    of them twice.
    """
    pairs = set[tuple[int, int]]()
    stride, count = prod(held.shape[dim + 1 :]), held.shape[dim]
    for box in held.parts[0].boxes:
        rows = box.positions.movedim(dim, 0).reshape(box.positions.shape[dim], -1)
        along = rows // stride % count
        if not (along == along[:, :1]).all():
            return None
        pairs |= set(enumerate(along[:, 0].tolist(), box.offset[dim]))
    # One that is held twice has two places, each with a part of the gradient.
    once = {whole for whole, _ in pairs}
    return _stretches(sorted(pairs)) if len(pairs) == len(once) == count else None


def _stretches(pairs: Sequence[tuple[int, int]]) -> list[Stretch]:
    found: list[Stretch] = []
    for whole, held in pairs:
        last = found[-1] if found else Stretch(-1, -1, 0)
        if (last.whole + last.length, last.held + last.length) == (whole, held) and last.length:
            found[-1] = last._replace(length=last.length + 1)
        else:
            found.append(Stretch(whole, held, 1))
    return found
