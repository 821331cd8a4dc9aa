"""What a program is called with: everything on one device, its own share on each rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parity.bounds import nudge
from parity.case import Run
from parity.subject.placing import Axes, Cuts, shares, taken
from parity.subject.program import Inputs, Subject, change, leaves

Batch = tuple[Inputs, Sequence[Any]]  # inputs, targets


def called(function: Callable[..., Any], inputs: Inputs, targets: Sequence[Any] = ()) -> Any:
    """A call as the user means it."""
    if isinstance(inputs, Mapping):
        return function(*targets, **inputs)
    return function(*inputs, *targets)


def entries(inputs: Inputs) -> list[tuple[int | str, Any]]:
    """Each input by its place or its name."""
    return list(inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs))


def _each(inputs: Inputs, function: Callable[[int | str, Tensor], Tensor]) -> Inputs:
    """All tensors in them changed, by the place or name of the input that they are in."""
    if isinstance(inputs, Mapping):
        return {at: change(x, partial(function, at)) for at, x in inputs.items()}
    return [change(x, partial(function, at)) for at, x in enumerate(inputs)]


def inputs(subject: Subject, run: Run) -> Inputs:
    """In the run's dtype, and disturbed as the parameters are."""

    def one(at: int | str, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.to(run.device, copy=True)
        x = x.detach().to(subject.start).to(run.device, getattr(torch, run.dtype), copy=True)
        nudge(x, str(tuple(x.shape)), run.nudge)
        # Of the gradient of a whole one each rank has a part, which nobody is to add up.
        return x.requires_grad_(subject.input_gradients and at not in subject.whole)

    return _each(subject.inputs, one)


def others(subject: Subject, inputs: Inputs) -> Inputs:
    """Other inputs of the same shapes: their rows the other way round, and what is in a row moved.
    Places and lengths that are no rank's own stay as they are.
    """

    def one(at: int | str, x: Tensor) -> Tensor:
        x = x.detach()
        if not _has_rows(x) or (at in subject.whole and not x.is_floating_point()):
            return x
        return x.flip(0).roll(1, -1) if x.ndim > 1 else x.flip(0)

    return _each(inputs, one)


def _has_rows(x: Tensor) -> bool:
    return x.ndim > 0 and x.layout == torch.strided


def targets(subject: Subject, run: Run) -> list[Any]:
    def one(x: Tensor) -> Tensor:
        return x.to(run.device, getattr(torch, run.dtype) if x.is_floating_point() else x.dtype)

    return [change(x, one) for x in subject.targets]


def batch(
    subject: Subject,
    inputs: Inputs,
    targets: Sequence[Any],
    step: int,
    axes: Axes | None = None,
) -> Batch:
    """Of one step: the rows begin further on each time. With `axes`, this rank's share of it."""

    def moved(x: Tensor) -> Tensor:
        if not step or not _has_rows(x):
            return x
        return x.detach().roll(-step, 0).requires_grad_(x.requires_grad)

    inputs = _each(inputs, lambda at, x: x if at in subject.whole else moved(x))
    targets = [change(x, moved) for x in targets]
    if axes is None:
        return inputs, targets
    return own_inputs(inputs, subject, axes), own_targets(targets, subject, axes)


def own_inputs(inputs: Inputs, subject: Subject, axes: Axes) -> Inputs:
    """This rank's part of each, a leaf of its own."""
    return _each(inputs, lambda at, x: _own(x, {} if at in subject.whole else subject.cuts, axes))


def own_targets(targets: Sequence[Any], subject: Subject, axes: Axes) -> list[Any]:
    return [change(x, lambda t: _own(t, subject.cuts, axes)) for x in targets]


def _own(x: Tensor, cuts: Cuts, axes: Axes) -> Tensor:
    mine = x.detach()
    for dim, names in cuts.items() if x.ndim else ():
        mine = taken(mine, dim, shares(mine.shape[dim], names, axes, even=True))
    return mine.clone().requires_grad_(x.requires_grad)


def zigzag(subject: Subject) -> dict[str, set[int]]:
    """The axes over which each rank has two parts, and how long what they cut is."""
    cut = [x for at, x in entries(subject.inputs) if at not in subject.whole]
    tensors = [x for value in (*cut, *subject.targets) for _, x in leaves(value, "") if x.ndim]
    dims = {**subject.data, **subject.split}
    return {
        axis: {x.shape[dims[axis]] for x in tensors if -x.ndim <= dims[axis] < x.ndim}
        for axis in subject.zigzag
    }


def rows(subject: Subject) -> int | None:
    """How many rows the whole batch has."""
    cut = [x for at, x in entries(subject.inputs) if at not in subject.whole]
    return next((len(x) for _, x in leaves(cut, "input") if x.ndim), None)
