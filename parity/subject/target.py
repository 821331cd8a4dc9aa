"""Both sides of a comparison as targets: from a Subject and a Run to a Trace, on every rank."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parity.bounds import nudge
from parity.case import Run
from parity.errors import TraceError
from parity.subject import data
from parity.subject.alignment import Box, Held, Part, Wholes, align
from parity.subject.features import features_of
from parity.subject.paths import paths_of
from parity.subject.places import Places, Shapes
from parity.subject.placing import Axes, Unplaced, cut, everything
from parity.subject.program import Program, Subject, as_program, make_generic
from parity.subject.training import Side, train
from parity.trace import Trace


class Baseline:
    """The one-device side. What it has recorded tells the other side what the wholes are."""

    def __init__(self, subject: Subject, folder: str) -> None:
        self.subject, self.folder = subject, folder

    def __call__(self, run: Run) -> Trace:
        subject, trace = self.subject, Trace()
        with _default_dtype(getattr(torch, run.dtype)):
            model = make(subject, run)
            program = Program(model, optimizer=_optimizer(subject, model.parameters()))
            wholes = Wholes(dict(model.named_parameters(remove_duplicate=False)))
            places = Places(Axes({}, {}))
            side = Side(subject, run, trace, program, _everything(wholes), places)
            inputs = data.inputs(subject, run)
            torch.manual_seed(run.seed + run.nudge)  # what is random moves it far, and is refused
            batch = partial(data.batch, subject, inputs, data.targets(subject, run))
            train(side, batch, data.others(subject, inputs))
        _tell(trace, places, _shapes_file(self.folder, run.detail))
        return trace


class Candidate:
    """The parallel side. Where its parameters lie is found once, before the first run."""

    def __init__(self, subject: Subject, folder: str) -> None:
        self.subject, self.folder = subject, folder
        self._held: list[Held] | None = None
        self._alias: dict[str, str] = {}  # of the baseline's names
        self._mesh: DeviceMesh | None = None

    def __call__(self, run: Run) -> Trace:
        subject, axes = self.subject, self._axes(run)
        trace = Trace(axes.at)
        held = self.held(run)
        with _default_dtype(getattr(torch, run.dtype)):
            baseline = make(subject, run)
            program = self._program(baseline.state_dict(), run)
            _check_dtypes(program, getattr(torch, run.dtype))
            if program.optimizer is None:
                optimizer = _optimizer(subject, program.trained.values())
                program = replace(program, optimizer=optimizer)
            shapes, calls = _told(_shapes_file(self.folder, run.detail))
            paths = paths_of(held, is_whole=program.step is None, alias=self._alias)
            rows = None if program.step is None else data.rows(subject)
            times = torch.Size([axes.sizes[axis] for axis in subject.data]).numel()
            features = features_of(held, paths, baseline)
            places = Places(
                axes, shapes, subject.cuts, subject.output, paths, rows, times, features, calls
            )
            parts = {h.name: h.parts for h in held}
            side = Side(subject, run, trace, program, parts.__getitem__, places)
            inputs = data.inputs(subject, run)
            batch = partial(data.batch, subject, inputs, data.targets(subject, run), axes=axes)
            train(side, batch, data.own_inputs(data.others(subject, inputs), subject, axes))
        return trace

    def mesh(self, run: Run) -> DeviceMesh:
        if self._mesh is None:
            sizes = run.case.axes
            kind = run.device.partition(":")[0]
            self._mesh = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return self._mesh

    def _axes(self, run: Run) -> Axes:
        at = self.mesh(run).get_coordinate() or ()
        own = dict(zip(run.case.axes, at, strict=True))
        return Axes(dict(run.case.axes), own, data.zigzag(self.subject))

    def _program(self, full: Mapping[str, Tensor], run: Run) -> Program:
        torch.manual_seed(run.seed)
        return as_program(self.subject.candidate(full, self.mesh(run)))

    def held(self, run: Run) -> list[Held]:
        """What this rank holds of the baseline's parameters."""
        if self._held is None:
            with _default_dtype(torch.float64):
                model = make(self.subject, replace(run, dtype="float64", nudge=0))
                wholes = Wholes(dict(model.named_parameters(remove_duplicate=False)))

                def build(full: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
                    here = {name: value.to(run.device) for name, value in full.items()}
                    return self._program(here, run).trained

                found = align(build, model.state_dict(), wholes)
                self._alias = wholes.alias
            self._held = [self._by_word(h, wholes, self._axes(run)) for h in found]
        return self._held

    def _by_word(self, held: Held, wholes: Wholes, axes: Axes) -> Held:
        """As the user says, where there is a word for it: values must not contradict it."""
        words = self.subject.layout.items()
        cuts = next((cuts for glob, cuts in words if fnmatchcase(held.name, glob)), None)
        if cuts is None and not held.parts and torch.Size(held.shape).numel():
            raise TraceError(
                f"the candidate's parameter {held.name} {held.shape} holds no value of the "
                "baseline's: load it from the state_dict that the candidate is given (in its "
                "dtype: a shorter one on the way changes values), or say where it lies, as in "
                f"layout={{'{held.name}': {{0: 'tp'}}}}"
            )
        if cuts is None:
            return held
        told = _cut_as_told(held, cuts, wholes, axes)
        if held.parts and not _same(held.parts, told.parts):
            raise TraceError(
                f"layout of {held.name}: by its values this rank holds {in_words(held.parts)}, "
                f"and by the layout given {in_words(told.parts)}"
            )
        return told


def make(subject: Subject, run: Run) -> nn.Module:
    """The baseline's module in the run's dtype, on its device, disturbed as the run asks."""
    torch.manual_seed(run.seed)
    with _default_dtype(torch.float32):  # in another one, other numbers would be drawn
        model = _own(subject.baseline())
    if not isinstance(model, nn.Module):
        raise TraceError(f"the baseline returned {type(model).__name__}, and no torch.nn.Module")
    _check_dropout(model)
    if subject.generic:
        make_generic(model, subject.start)
    model.to(run.device, getattr(torch, run.dtype))
    for name, p in model.named_parameters():
        if p.is_floating_point():
            nudge(p.data, name, run.nudge)
    return model


def _own(model: Any) -> Any:
    """A copy: it may be the same module each time, and one run must not begin where one ended."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:  # a parameter that is computed from others (weight_norm) has no copy
        return model


def in_words(parts: list[Part]) -> str:
    """`up.weight[0:8, 0:16]`: the boxes that are held."""
    return ", ".join(
        f"{part.whole}[{', '.join(f'{i}:{i + n}' for i, n in zip(o, p.shape, strict=True))}]"
        for part in parts
        for o, p in part.boxes
    )


def _cut_as_told(held: Held, cuts: Mapping[int, Any], wholes: Wholes, axes: Axes) -> Held:
    shape = wholes.shapes.get(wholes.alias.get(held.name, ""))
    if shape is None:
        raise TraceError(f"layout of {held.name}: the baseline has no parameter of this name")
    try:
        place = cut(everything(shape), held.shape, cuts, axes._replace(zigzag={}))
    except Unplaced as problem:
        raise TraceError(f"layout of {held.name}: {problem}") from problem
    positions = torch.arange(prod(held.shape)).reshape(held.shape)
    boxes = [Box(offset, positions[slices]) for offset, slices in place.boxes]
    return held._replace(parts=[Part(wholes.alias[held.name], shape, boxes)])


def _same(a: list[Part], b: list[Part]) -> bool:
    return in_words(a) == in_words(b) and all(
        x.positions.equal(y.positions)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p.boxes, q.boxes, strict=True)
    )


def _everything(wholes: Wholes) -> Any:
    def parts(name: str) -> list[Part]:
        first = wholes.alias[name]
        shape = wholes.shapes[first]
        box = Box((0,) * len(shape), torch.arange(prod(shape)).reshape(shape))
        return [Part(first, shape, [box])]

    return parts


def _check_dropout(model: nn.Module) -> None:
    for path, module in model.named_modules():
        p = 0.0
        if isinstance(module, nn.modules.dropout._DropoutNd):
            p = module.p
        elif isinstance(module, nn.MultiheadAttention):
            p = module.dropout
        if p and module.training:
            raise TraceError(
                f"the baseline drops out at random in {path or 'itself'} (p={p}): ranks "
                "draw other numbers than one device does; set p=0, or call .eval()"
            )


def _check_dtypes(program: Program, dtype: torch.dtype) -> None:
    for name, p in program.trained.items():
        if p.is_floating_point() and p.dtype != dtype:
            raise TraceError(
                f"the candidate's parameter {name} is {p.dtype} in a run of {dtype}: make it of "
                "the dtype of what it is given, or of torch.get_default_dtype()"
            )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What modules are made of unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _optimizer(subject: Subject, parameters: Iterable[Any]) -> Any:
    return None if subject.optimizer is None else subject.optimizer(list(parameters))


def _shapes_file(folder: str, detail: bool) -> Path:
    return Path(folder) / f"shapes{'-detail' if detail else ''}.json"


def _tell(trace: Trace, places: Places, path: Path) -> None:
    draft = path.with_suffix(f".{os.getpid()}")
    shapes = [[*box.key, box.shape] for box in trace.boxes]
    draft.write_text(json.dumps([shapes, places.calls]))
    draft.replace(path)  # at once: baselines run side by side


def _told(path: Path) -> tuple[Shapes, dict[str, int]]:
    shapes, calls = json.loads(path.read_text())
    return {(check, name): shape for check, name, shape in shapes}, calls
