"""What a baseline and a candidate are: modules, and how a step of training is made with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from parity.subject.placing import Cuts

Optimizer = Any  # with step(); torch.optim's, or one that shards its state
Inputs = Sequence[Any] | Mapping[str, Any]  # in order, or by name


@dataclass(frozen=True)
class Program:
    """What a candidate returns on a rank if it is more than a module.

    `step(*inputs, *targets)` (by name: `step(*targets, **inputs)`) makes the forward and the
    backward and returns what the forward put out, or None on ranks that do not have it: a pipeline
    schedule. `optimizer` takes the place of the baseline's, with its step(). `gradient` is where a
    parameter's gradient is found, if not in `grad`; None says that this rank has no part in it.
    `parameters` are what is trained, by name, if not those of the module.
    """

    module: nn.Module | Sequence[nn.Module]
    step: Callable[..., Any] | None = None
    optimizer: Optimizer = None
    gradient: Callable[[Tensor], Tensor | None] = attrgetter("grad")
    parameters: Mapping[str, Tensor] | None = None

    @property
    def modules(self) -> list[nn.Module]:
        return [self.module] if isinstance(self.module, nn.Module) else list(self.module)

    @property
    def trained(self) -> dict[str, Tensor]:
        """Its parameters by the candidate's own names; one that has two is there once."""
        if self.parameters is not None:
            return dict(self.parameters)
        several = len(self.modules) > 1
        return {
            f"{i}.{name}" if several else name: p
            for i, module in enumerate(self.modules)
            for name, p in module.named_parameters()
        }


def as_program(made: Any) -> Program:
    """Raises TypeError for what is neither a module nor a Program."""
    if isinstance(made, Program):
        return made
    if isinstance(made, nn.Module):
        return Program(made)
    raise TypeError(
        f"the candidate returned {type(made).__name__}; expected a torch.nn.Module, or a "
        "parity.Program"
    )


@dataclass(frozen=True)
class Subject:
    """A comparison as its user wrote it: what `case.check` is given (see check.py)."""

    baseline: Callable[[], nn.Module]
    candidate: Callable[..., Any]
    inputs: Inputs
    targets: Sequence[Any] = ()
    loss: Callable[..., Tensor] | None = None
    optimizer: Callable[[Any], Optimizer] | None = None
    data: Mapping[str, int] = field(default_factory=dict)
    split: Mapping[str, int] = field(default_factory=dict)
    zigzag: Sequence[str] = ()  # axes over which each rank has two parts (see placing.Axes)
    whole: Sequence[int | str] = ()  # inputs that are not cut: places in `inputs`, or names
    output: Mapping[str, Cuts] = field(default_factory=dict)  # by name; "": of all others
    layout: Mapping[str, Cuts] = field(default_factory=dict)
    generic: bool = True
    input_gradients: bool = True
    start: torch.dtype = torch.float32  # initial values are exact in it

    @property
    def cuts(self) -> Cuts:
        """How the inputs are cut: over the axes of `data` first."""
        cuts: dict[int, tuple[str, ...]] = {}
        for axis, dim in [*self.data.items(), *self.split.items()]:
            cuts[dim] = (*cuts.get(dim, ()), axis)
        return cuts


def leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a module was given or put out, each by where it is: `output.logits`."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{name}[{i}]" if len(value) > 1 else name)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from leaves(getattr(value, part.name), f"{name}.{part.name}")
    elif isinstance(value, bool | int | float):
        yield name, torch.tensor(value, dtype=torch.float64)


def change(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure, each tensor in it changed."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)  # of its own type, with what else that has
        for key, x in value.items():
            changed[key] = change(x, function)
        return changed
    if isinstance(value, Mapping):
        return {key: change(x, function) for key, x in value.items()}
    if isinstance(value, list | tuple):
        inner = [change(x, function) for x in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in fields(value) if part.init}
        return replace(value, **{name: change(x, function) for name, x in parts.items()})
    return value


@torch.no_grad()
def make_generic(model: nn.Module, dtype: torch.dtype) -> None:
    """Constant parameters get values of their own (zeros and ones hide mistakes), and all become
    exact in `dtype`.
    """
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point() and p.numel():
            if p.numel() == 1 or (p == p.reshape(-1)[0]).all():
                # In another dtype other numbers would be drawn.
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                p.add_(0.1 * noise.to(p))
            p.copy_(p.to(dtype).to(p.dtype))


def states_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps for a parameter on this rank, in the parameter's shape, by name."""
    # One that shards its state wraps the optimizer of this rank's share, as `optim`.
    for owner in (optimizer, getattr(optimizer, "optim", None)):
        state = getattr(owner, "state", {}).get(parameter, {})
        if state:
            return {
                name: value
                for name, value in state.items()
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim
            }
    return {}
