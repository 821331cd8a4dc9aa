"""What modules take in and put out, and the gradients of that, recorded without touching the model.

A rank's modules see pieces: some rows of the batch at a time, and perhaps a cut of the last
dimension. Where a piece lies is the caller's to say (`Place`); the default is that it is whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parity.trace import Box, Key, Trace

MODEL = "the model"  # the path of the outermost module is empty


class Seen(NamedTuple):
    """What a module has taken in (`is_input`) or put out; `call` counts its calls, from 0."""

    path: str
    is_input: bool
    call: int
    tensor: Tensor

    @property
    def name(self) -> str:
        return f"{'input' if self.is_input else 'output'} of {self.path or MODEL}"


class Placed(NamedTuple):
    """Boxes of a whole of `shape`: the offset of each, and which part of the tensor it is. `times`:
    the gradient is so many times that of the whole (it is still to be averaged).
    """

    shape: Sequence[int]
    boxes: Sequence[tuple[Sequence[int], Callable[[Tensor], Tensor]]]
    times: int = 1


Place = Callable[[Seen], Placed | None]  # None: not to be recorded
Sound = Callable[[Tensor, Tensor], bool]


def whole(seen: Seen) -> Placed | None:
    """For a program on one device that calls each module once."""
    shape = tuple(seen.tensor.shape)
    return Placed(shape, [((0,) * len(shape), lambda x: x)]) if seen.call == 0 else None


@contextmanager
def record_modules(
    trace: Trace,
    model: nn.Module,
    place: Place = whole,
    rename: Callable[[str], str | None] = lambda path: path,
    is_sound: Sound | None = None,
) -> Iterator[None]:
    """Record, as `activation` and `backward`, what `model` and all modules in it see meanwhile.

    `rename` is from a module's path to the baseline's; modules without one are left out. With
    `is_sound`, which is asked of each gradient and its tensor whether it can be compared, that of
    what a module takes in is what this module adds to it, whoever else takes the tensor in.
    """
    recorder = _Recorder(trace, place, is_sound)
    hooks = []
    for path, module in model.named_modules():
        if (theirs := rename(path)) is not None and not isinstance(module, torch.jit.ScriptModule):
            hooks += recorder.hook(theirs, module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Recorder:
    def __init__(self, trace: Trace, place: Place, is_sound: Sound | None) -> None:
        self.trace, self.place, self.is_sound = trace, place, is_sound
        self.calls: Counter[str] = Counter()
        self.placed: dict[str, Placed | None] = {}  # by name: in its latest call
        self.gradients: set[tuple[str, int]] = set()  # that were seen: names and calls
        self.followed: set[str] = set()  # of which the gradient will be seen

    def hook(self, path: str, module: nn.Module) -> list[Any]:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not inputs:
                return None
            x, *others = inputs  # those are masks and the like
            is_apart = self.is_sound is not None and isinstance(x, Tensor) and x.requires_grad
            # A view would lose its gradient there, or that of what is written over.
            is_apart &= torch.is_grad_enabled() and not getattr(module, "inplace", False)
            own = x.view_as(x) if is_apart else x
            self.see(path, True, own)
            return (own, *others) if is_apart else None

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self.see(path, False, output)
            self.calls[path] += not _is_computed_again()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def see(self, path: str, is_input: bool, x: Any) -> None:
        if not isinstance(x, Tensor) or x.layout != torch.strided or _is_wrapped(x):
            return
        seen = Seen(path, is_input, self.calls[path], x)
        if is_again := _is_computed_again():
            # Which of several calls it is, nobody says.
            placed = self.placed.get(seen.name) if seen.call == 1 else None
        else:
            placed = self.placed[seen.name] = self.place(seen)
        if placed is None:
            return
        self.add("activation", seen.name, placed, x, is_again=is_again)
        # Of what is computed again the gradient comes by only if it did not at first (re-entrant).
        if x.requires_grad and not (is_again and seen.name in self.followed):
            self.followed.add(seen.name)
            x.register_hook(lambda grad: self.see_gradient(seen, placed, x, grad))

    def see_gradient(self, seen: Seen, placed: Placed, x: Tensor, grad: Tensor) -> Tensor | None:
        if self.is_sound is not None and not self.is_sound(grad, x):
            return None
        if (seen.name, seen.call) in self.gradients:
            return None  # of a gradient that is a part of the forward, and then of the loss
        self.gradients.add((seen.name, seen.call))
        if Key("backward", seen.name) not in self.trace.masks:
            self.add("backward", seen.name, placed, grad)
            return None  # not even a copy: it may be a mistake to work on this one in place
        right = grad.clone()
        self.add("backward", seen.name, placed, right)
        return right

    @torch.no_grad()
    def add(
        self, check: str, name: str, placed: Placed, x: Tensor, *, is_again: bool = False
    ) -> None:
        times = placed.times if check == "backward" else 1
        for offset, part in placed.boxes:
            if is_again:
                self.trace.put_right(
                    Box(Key(check, name), tuple(placed.shape), tuple(offset)), part(x)
                )
            else:
                self.trace.add(check, name, part(x), shape=placed.shape, offset=offset, times=times)


def _is_wrapped(x: Tensor) -> bool:
    """Inside of torch.func's transforms (vmap, grad) tensors are not what they are outside."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _is_computed_again() -> bool:
    """Activations that were not kept (torch.utils.checkpoint) are made once more in the backward;
    torch's own checkpoint asks the same.
    """
    return int(torch._C._current_graph_task_id()) != -1
