"""Steps of training, recorded: the same for both sides, but for where things lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parity.case import Run
from parity.errors import TraceError
from parity.modules import MODEL, record_modules
from parity.subject.alignment import Part, local
from parity.subject.data import Batch, called
from parity.subject.places import Places
from parity.subject.placing import as_dtensor
from parity.subject.program import Inputs, Program, Subject, leaves, states_of
from parity.trace import Trace

AGAIN = ", in eval mode"  # ends the names of what the second call puts out


class Side(NamedTuple):
    """One side of a comparison on one rank. `parts` are where a parameter lies, by its own name."""

    subject: Subject
    run: Run
    trace: Trace
    program: Program
    parts: Callable[[str], Sequence[Part]]
    places: Places


def train(side: Side, batch: Callable[[int], Batch], others: Inputs) -> None:
    """All steps of the run, each on a batch of its own. After them a module is called with
    `others`, in eval mode: nothing may be kept from one call to the next. (It is no `forward`,
    which a program of its own lacks.)
    """
    program, run = side.program, side.run
    if run.detail:
        for name, p in program.trained.items():
            _pieces(side, "parameter", "", name, p)
    for step in range(run.steps):
        inputs, targets = batch(step)
        for p in program.trained.values():
            p.grad = None
        with ExitStack() as recording:
            if run.detail and step == 0:
                is_scheduled = _try_out(side, inputs, targets)
                recording.enter_context(_modules(side, is_scheduled))
            outputs = _step(side, inputs, targets)
        side.trace.forget(side.places.incomplete)
        if program.step is None and not list(leaves(outputs, "output")):
            raise TraceError(f"the module put out {type(outputs).__name__}, and no tensor")
        later = f"step {step + 1} of " if step else ""
        for name, y in leaves(outputs, "output"):
            _whole_or_piece(side, "forward", later + name, y)
        if step == 0:
            _gradients(side, inputs)
        if program.optimizer is not None:
            program.optimizer.step()
            if step in (0, run.steps - 1):
                _state(side, later)
    if program.step is None:
        _call_again(side, others)


def _call_again(side: Side, others: Inputs) -> None:
    shapes = side.places.shapes
    if shapes is not None and not any(name.endswith(AGAIN) for _, name in shapes):
        return
    try:
        with torch.no_grad():
            outputs = called(side.program.modules[0].eval(), others)
    except Exception:
        if shapes is None:  # the baseline wants its rows as they were (sorted lengths, say)
            return
        raise
    for name, y in leaves(outputs, "output"):
        _whole_or_piece(side, "activation", f"{name} of {MODEL}{AGAIN}", y)


def _step(side: Side, inputs: Inputs, targets: Sequence[Any]) -> Any:
    if side.program.step is not None:
        return called(side.program.step, inputs, targets)
    outputs = called(side.program.modules[0], inputs)
    if side.subject.loss is not None:
        loss = side.subject.loss(outputs, *targets)
        loss.backward()
        return outputs
    found = [
        (name, y)
        for name, y in leaves(outputs, "output")
        if y.requires_grad and y.is_floating_point()
    ]
    torch.autograd.backward(
        [y for _, y in found], [_cotangent(side, name, y) * side.places.times for name, y in found]
    )
    return outputs


def _cotangent(side: Side, name: str, y: Tensor) -> Tensor:
    """The gradient that an output is given: numbers without a pattern, the same on both sides."""
    place = side.places.of("forward", name, y)
    digest = hashlib.blake2b(name.encode(), digest_size=6).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    whole = torch.randn(place.shape, generator=generator, dtype=torch.float32)
    whole = whole.to(side.subject.start).to(y.device, y.dtype)
    piece = place.part_of(whole)
    if (whole_y := as_dtensor(y)) is None:
        return piece
    return type(whole_y).from_local(
        piece,
        whole_y.device_mesh,
        whole_y.placements,
        run_check=False,
        shape=y.shape,
        stride=y.stride(),
    )


def _gradients(side: Side, inputs: Inputs) -> None:
    """Back to front, as the backward makes them. None is a zero, so that it is not overlooked."""
    program = side.program
    for name, p in reversed(program.trained.items()):
        gradient = program.gradient(p)
        if gradient is None and program.gradient is Program.gradient:
            gradient = torch.zeros_like(p)
        # One that the baseline trains and the candidate does not has a gradient of zero.
        if gradient is not None and (p.requires_grad or _is_trained(side, name)):
            gradient = _placed_as(gradient, p)
            _pieces(side, "gradient", "", name, gradient)
            if Trace.masks and p.requires_grad and program.gradient is Program.gradient:
                p.grad = gradient  # a right value may be in it
    if side.subject.input_gradients:
        for name, x in leaves(inputs, "input"):
            if x.requires_grad:
                gradient = torch.zeros_like(x) if x.grad is None else x.grad
                _whole_or_piece(side, "gradient", name, gradient, side.places.times)
                x.grad = None


def _is_trained(side: Side, name: str) -> bool:
    shapes = side.places.shapes or {}
    return any(("gradient", part.whole) in shapes for part in side.parts(name))


def _placed_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A DTensor's gradient may have parts that are still to be summed, as its optimizer does."""
    mine, owner = as_dtensor(gradient), as_dtensor(parameter)
    if mine is None or owner is None:
        return gradient
    return mine.redistribute(placements=owner.placements)


def _state(side: Side, later: str) -> None:
    for name, p in side.program.trained.items():
        _pieces(side, "state", later, name, p)
        for kind, value in states_of(side.program.optimizer, p).items():
            _pieces(side, "state", f"{later}{kind} of ", name, value)


def _pieces(side: Side, check: str, prefix: str, name: str, tensor: Tensor) -> None:
    """A parameter, or what is of its shape, as the boxes that it holds of the wholes."""
    flat = local(tensor).detach().reshape(-1)
    for whole in side.parts(name):
        for offset, positions in whole.boxes:
            box = flat[positions.to(flat.device)]
            name = prefix + whole.whole
            side.trace.add(check, name, box, shape=whole.shape, offset=offset, again=True)
            if Trace.masks:  # a right value may have taken its place: it is to be gone on from
                flat[positions.to(flat.device)] = box


def _whole_or_piece(side: Side, check: str, name: str, tensor: Tensor, times: int = 1) -> None:
    place = side.places.of(check, name, tensor)
    for offset, slices in place.boxes:
        piece = local(tensor)[slices]
        side.trace.add(check, name, piece, shape=place.shape, offset=offset, times=times)


def _try_out(side: Side, inputs: Inputs, targets: Sequence[Any]) -> bool:
    """Steps that nobody looks at, and whether a pipeline schedule makes them. In their first one,
    schedules call their stages once more, to learn shapes; after it each call has its own rows.
    """
    program, calls = side.program, [0, 0]
    if program.step is None or program.gradient is not Program.gradient:
        return False  # what one step more would leave behind elsewhere is not known
    for step in range(2):

        def count(module: nn.Module, inputs: Any, step: int = step) -> None:
            calls[step] += 1

        hooks = [module.register_forward_pre_hook(count) for module in program.modules]
        called(program.step, inputs, targets)
        for hook in hooks:
            hook.remove()
    for tensor in [*program.trained.values(), *(x for _, x in leaves(inputs, "input"))]:
        tensor.grad = None
    return calls[0] > calls[1]


def _modules(side: Side, is_scheduled: bool) -> ExitStack:
    stack = ExitStack()

    def is_sound(gradient: Tensor, of: Tensor) -> bool:
        if is_scheduled:
            return False  # a schedule may weigh its microbatches after they are all added up
        mine, owner = as_dtensor(gradient), as_dtensor(of)
        if mine is None or owner is None:
            return True
        return bool(mine.placements == owner.placements)  # else its sum is still to be made

    for i, module in enumerate(side.program.modules):
        prefix = f"{i}." if len(side.program.modules) > 1 else ""

        def rename(path: str, prefix: str = prefix) -> str | None:
            return side.places.path_of(prefix + path)

        place = side.places.of_seen
        stack.enter_context(record_modules(side.trace, module, place, rename, is_sound))
    return stack
