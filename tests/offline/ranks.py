"""Recordings of several ranks, written by one process: the launcher's variables say which it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import parity
from parity.offline.diff import Report, diff
from parity.offline.recorder import Recorder


class Model(nn.Module):
    """Parameters of these names, dots and all."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in parameters.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            needs = value.is_floating_point() or value.is_complex()
            module.register_parameter(last, nn.Parameter(value.clone(), requires_grad=needs))


def recorder(
    folder: Path, parameters: Mapping[str, Tensor], rank: int = 0, world: int = 1, **options: Any
) -> Recorder:
    """parity.record, on that rank."""
    with mock.patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": str(world)}):
        return parity.record(options.pop("model", None) or Model(parameters), folder, **options)


def write(
    folder: Path,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor] | None = None,
    rank: int = 0,
    world: int = 1,
    steps: int = 1,
    has_state: bool = True,
    **options: Any,
) -> Path:
    """A rank's recording: gradients, and parameters after steps that do nothing."""
    model = Model(parameters)
    recording = recorder(folder, parameters, rank, world, model=model, **options)
    for name, parameter in model.named_parameters():
        if gradients and name in gradients:
            parameter.grad = gradients[name].clone()
    for _ in range(steps):
        recording.gradients()
        if has_state:
            recording.state()
    recording.close()
    return folder


def write_all(
    folder: Path, ranks: Sequence[tuple[Mapping[str, int], Mapping[str, Tensor]]], **options: Any
) -> Path:
    """One recording: the coordinates and the gradients of every rank; parameters are all ones."""
    for rank, (at, gradients) in enumerate(ranks):
        ones = {name: torch.ones_like(g) for name, g in gradients.items()}
        write(folder, ones, gradients, rank, len(ranks), at=at, **options)
    return folder


def wrong(report: Report) -> dict[str, str]:
    """What is wrong, and how: by check and name."""
    return {str(j.verdict.key): j.verdict.status for j in report.wrong}


def compare(baseline: Path, candidate: Path, *nudged: Path) -> Report:
    return diff(baseline, candidate, nudged)
