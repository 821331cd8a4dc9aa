"""`parity.record`: a line in a training script, and every rank writes down what it has.

No collective is issued and nothing of the run is changed: each rank copies its own tensors to the
CPU and writes its own files. Ranks may be on any machines, under any launcher, as long as the
folder can be brought together afterwards.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parity.bounds import nudge as nudge_parameter
from parity.errors import UsageError
from parity.offline.names import Rename, plain, plain_names
from parity.offline.place import Layout, Piece, Rules, Where, whereabouts
from parity.offline.store import Kept, hold, write_header, write_step
from parity.subject.alignment import Held
from parity.subject.program import leaves

FIRST_STEPS = 3  # what is wrong shows in the first steps, and a step is as large as the model


def record(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    optimizer: Any = None,
    mesh: Any = None,
    at: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
    layout: Layout | None = None,
    rename: Rename | None = None,
    sketch: bool = False,
    nudge: int | None = None,
    activations: bool = False,
    steps: int | Collection[int] | None = FIRST_STEPS,
) -> Recorder:
    """Record what this rank holds in the given steps, for `parity diff`.

    With `optimizer`, its steps are recorded as they happen: gradients before, parameters and
    optimizer state after. Without, call `gradients()` and `state()` of what is returned. Call it
    when the parameters have their initial values.

    * `mesh` (a DeviceMesh) or `at` (coordinates, as in {"dp": 0, "tp": 1}; `sizes` of the axes are
      needed for sketches only) says which rank this is. DTensors bring their own.
    * `layout` says how plain tensors are cut: {"*.up.weight": {0: "tp"}}; DTensors need none, and
      what it leaves out the diff infers from shapes. What is fused, flattened, padded or has
      another name is told by what `parity.held` finds.
    * `rename`: a function, or prefixes and what to put in their place, for stages of a pipeline.
    * `sketch`: 64 numbers per tensor in place of its values.
    * `nudge`: move every parameter by one rounding, differently for each number; default: the
      environment's PARITY_NUDGE, else not.
    * `activations`: what modules put out, too.
    * `steps`: how many, or which (from 0); None: all.

    Raises UsageError, before anything is written, where one of these cannot be.
    """
    rank, world = _rank_and_world()
    if mesh is None and at is None:
        mesh = _mesh_of(model)
    where = whereabouts(mesh, at, sizes, rank, world)
    given = {plain(k) if isinstance(v, Held) else k: v for k, v in (layout or {}).items()}
    rules, amount = Rules(given, where), _amount(nudge)
    names = plain_names((path for path, _ in model.named_parameters()), rename)
    shapes = {names[path]: tuple(p.shape) for path, p in _local(model)}
    is_stage = rename is not None or where.sizes.get("pp", 1) > 1
    objections = rules.objections(shapes, is_stage)
    objections += [] if shapes else ["model: it has no parameters; expected a model to record"]
    objections += _contradictions(
        optimizer, amount, world, is_sketch=sketch, has_activations=activations
    )
    if sketch:
        objections += _unplaced(model, names, rules)
    if objections:
        raise UsageError(*objections)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    write_header(Path(folder), where, dtypes, amount, is_sketch=sketch)
    for path, parameter in model.named_parameters():
        nudge_parameter(parameter, names[path], amount)
    recorder = Recorder(model, Path(folder), rules, rename, steps, is_sketch=sketch)
    recorder.attach(optimizer, activations=activations)
    return recorder


class Recorder:
    """Made by `record`. A step ends with `state()`, and its file is written then."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        rules: Rules,
        rename: Rename | None,
        steps: int | Collection[int] | None,
        *,
        is_sketch: bool,
    ) -> None:
        self._model, self._folder, self._rules = model, folder, rules
        self._rename, self._is_sketch = rename, is_sketch
        self._steps = range(steps) if isinstance(steps, int) else steps
        self._step, self._began = 0, False
        self._has_gradients = False  # of this step
        self._optimizer: Any = None
        self._held: list[Kept] = []
        self._seen: Counter[str] = Counter()  # losses and calls of modules in this step
        self._hooks: list[Any] = []

    def attach(self, optimizer: Any, *, activations: bool) -> None:
        if optimizer is not None:
            self._optimizer = optimizer
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: self.gradients()),
                optimizer.register_step_post_hook(lambda *_: self.state()),
            ]
        if activations:
            # Wrappers have the name of what they wrap: the innermost one is taken.
            modules = {plain(path, self._rename): m for path, m in self._model.named_modules()}
            for path, module in modules.items():
                hook = module.register_forward_hook(self._see_output(path))
                self._hooks.append(hook)

    @property
    def _is_wanted(self) -> bool:
        return self._steps is None or self._step in self._steps

    def loss(self, value: Tensor | float, *, mean: str = "", total: str = "") -> None:
        """The loss as this rank has it. Where that is of its own part of the batch, `mean` or
        `total` names the axis over which the losses of the ranks are averaged or added.
        """
        where = self._rules.where
        if not self._is_wanted:
            return
        if where.world == 1:
            mean = total = ""  # the script of the parallel run, on one process
        for axis in filter(None, (mean, total)):
            if axis not in where.at:
                known = ", ".join(where.at)
                raise UsageError(
                    f"loss: no axis '{axis}'; expected one of: {known}; give the coordinates of "
                    "this rank to parity.record by mesh= or at="
                )
        if isinstance(value, DTensor):
            value = value.to_local()
        tensor = torch.as_tensor(value).detach()
        tensor = tensor.double() if not isinstance(value, Tensor) else tensor
        place = (tuple(tensor.shape), (0,) * tensor.ndim)
        axes = ((total,) if total else (), (mean,) if mean else ())
        self._hold("loss", self._numbered("loss"), [Piece(tensor, *place, None, *axes)])

    def gradients(self) -> None:
        """The gradients as they are now; called before the optimizer uses them."""
        if self._has_gradients:
            self._end()  # of a step whose state was not asked for
        self._has_gradients = True
        if not self._is_wanted:
            return
        if not self._began:
            self._began = True
            for name, parameter in self._named():
                self._add("parameter", name, parameter, parameter)
        for name, parameter in reversed(list(self._named())):
            if parameter.grad is not None:
                self._add("gradient", name, parameter.grad, parameter)

    def state(self, optimizer: Any = None) -> None:
        """Parameters and optimizer state after a step; then that step is written."""
        if self._is_wanted:
            states = getattr(optimizer or self._optimizer, "state", {})
            for name, parameter in self._named():
                self._add("state", name, parameter, parameter)
                for kind, value in sorted(states.get(parameter, {}).items()):
                    if isinstance(value, bool | int | float):
                        value = torch.tensor(float(value), dtype=torch.float64)
                    if isinstance(value, Tensor):
                        self._add("state", f"{kind} of {name}", value, parameter)
        self._end()

    def close(self) -> None:
        """Stop recording. What belongs to no finished step (a loss) is written as one."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._held:
            self._end()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _end(self) -> None:
        if self._held or self._is_wanted:  # a rank that has nothing says so
            write_step(self._folder, self._step, self._rules.where.rank, self._held)
        self._held, self._step = [], self._step + 1
        self._has_gradients = False
        self._seen.clear()

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for path, parameter in self._model.named_parameters():
            yield plain(path, self._rename), parameter

    def _numbered(self, name: str) -> str:
        self._seen[name] += 1
        times = self._seen[name]
        return name if times == 1 else f"{name} (call {times})"

    def _see_output(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            if not self._is_wanted:
                return
            nothing = torch.empty(0)  # no layout of a parameter is meant for it
            for leaf, tensor in leaves(output, "output"):
                name = self._numbered(f"{leaf} of {path or 'the model'}")
                self._add("forward", name, tensor, nothing)

        return see

    @torch.no_grad()
    def _add(self, check: str, name: str, tensor: Tensor, like: Tensor) -> None:
        owner = name.split(" ")[-1]
        for whole, pieces in self._rules.pieces(owner, tensor, like):
            self._hold(check, name.removesuffix(owner) + whole, pieces)

    def _hold(self, check: str, name: str, pieces: list[Piece]) -> None:
        for piece in pieces:
            if self._is_sketch:
                piece = _sketchable(check, name, piece, self._rules.where)
            self._held.append(hold(check, name, piece, is_sketch=self._is_sketch))


def _contradictions(
    optimizer: Any, nudge: int, world: int, *, is_sketch: bool, has_activations: bool
) -> Iterator[str]:
    """Options that do not go together, or that this run cannot have."""
    if nudge < 0:
        yield f"nudge: {nudge}; expected a whole number, 0 for none; correct it"
    if nudge and world > 1:
        yield (
            f"nudge: {nudge}, on {world} ranks; expected a run of one process, since copies on "
            "several ranks would be moved apart; unset PARITY_NUDGE for this run"
        )
    if is_sketch and has_activations:
        yield (
            "sketch: with activations=True; a sketch needs the place of a tensor, which is not "
            "known of activations; leave out one of the two"
        )
    if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
        yield (
            f"optimizer: a {type(optimizer).__name__} has no register_step_post_hook; expected a "
            "torch.optim.Optimizer; give the one inside of it, or leave it out and call "
            ".gradients() before each step and .state(optimizer) after it"
        )


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    said = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    if not all(text.isdigit() for text in said) or int(said[0]) >= int(said[1]):
        raise UsageError(
            f"RANK={said[0]} WORLD_SIZE={said[1]}: expected a rank from 0 to WORLD_SIZE - 1; set "
            "both, or neither, or call torch.distributed.init_process_group first"
        )
    return int(said[0]), int(said[1])


def _amount(nudge: int | None) -> int:
    if nudge is not None:
        return nudge
    text = os.environ.get("PARITY_NUDGE", "0")
    if not text.isdigit():
        raise UsageError(f"PARITY_NUDGE={text}: expected a whole number, 0 for none; correct it")
    return int(text)


def _local(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, parameter in model.named_parameters():
        yield path, parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _mesh_of(model: nn.Module) -> Any:
    """That of the DTensors, if the model has any: the one with the most axes."""
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    named = [mesh for mesh in meshes if mesh.mesh_dim_names is not None]
    return max(named, key=lambda mesh: mesh.ndim, default=None)


def _unplaced(model: nn.Module, names: Mapping[str, str], rules: Rules) -> list[str]:
    """Of which parameters a sketch cannot be made."""
    said = []
    for path, parameter in model.named_parameters():
        try:
            for name, pieces in rules.pieces(names[path], parameter, parameter):
                for piece in pieces:
                    _sketchable("parameter", name, piece, rules.where)
        except UsageError as error:
            said.append(str(error))
    return said


def _sketchable(check: str, name: str, piece: Piece, where: Where) -> Piece:
    """With its place: by the layout, if all ranks along an axis hold equally much."""
    if piece.offset is not None:
        return piece
    if piece.cut is None:
        owner = name.split(" ")[-1]
        raise UsageError(
            f"sketch: where {check} of {name} lies in the whole is not known; expected a DTensor "
            f'or a layout; give layout={{"{owner}": {{0: "<axis>"}}}}, or "{owner}": {{}} if every '
            "rank holds all of it"
        )
    shape, offset = list(piece.tensor.shape), [0] * piece.tensor.ndim
    for dim, axes in piece.cut.items():
        for axis in axes:
            if axis not in where.sizes:
                raise UsageError(
                    f"sketch: the size of axis '{axis}' is not known; expected one for every "
                    f'axis that cuts a parameter; give sizes={{"{axis}": ...}}'
                )
            offset[dim] = offset[dim] * where.sizes[axis] + where.at[axis]
            shape[dim] *= where.sizes[axis]
        offset[dim] *= piece.tensor.shape[dim]
    return piece._replace(shape=tuple(shape), offset=tuple(offset), cut=None)
