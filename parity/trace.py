"""A trace is what one rank saw: named tensors in program order, each a box of some whole.

Ranks write their traces to files (safetensors: no code runs when one is read), and the parent joins
and judges them. No collective of the program under test takes part.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from parity.backend import Entry
from parity.errors import TraceError

# The checks, in the order in which a training step makes what they compare.
CHECKS = ("forward", "gradient", "norm", "state", "loss")
# Recorded only where `run.detail` asks for it: what parameters were before the first step, what
# modules put out in it, and the gradients of that.
DETAILS = ("parameter", "activation", "backward")


class Key(NamedTuple):
    """The name of a record: which check it belongs to, and which tensor it is."""

    check: str
    name: str

    def __str__(self) -> str:
        return f"{self.check} of {self.name}"


class Box(NamedTuple):
    """Where a piece lies: element 0 of it is at `offset` in a whole of `shape`."""

    key: Key
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class Piece(NamedTuple):
    """A box of the whole that one rank holds."""

    rank: int
    offset: tuple[int, ...]
    tensor: Tensor


class Trace:
    """The records of one rank. `add` copies, so the program may go on changing its tensors.

    `at` are the coordinates of the rank by axis, as in {"dp": 0, "tp": 1}: with them a diagnosis
    can say over which axis a reduction is missing. Where `masks` holds the baseline's value of a
    record, `add` writes it over the tensor that it was given, once that is recorded: the program
    goes on as if it had been right until here.
    """

    masks: ClassVar[Mapping[Key, Tensor]] = {}  # of the run that is under way on this rank

    def __init__(self, at: Mapping[str, int] | None = None) -> None:
        self.at = dict(at or {})
        self.boxes: list[Box] = []
        self.tensors: list[Tensor] = []
        self._shapes: dict[Key, tuple[int, ...]] = {}
        self._seen: set[tuple[Box, tuple[int, ...]]] = set()

    def add(
        self,
        check: str,
        name: str,
        tensor: Tensor,
        *,
        shape: Sequence[int] | None = None,
        offset: Sequence[int] | None = None,
        again: bool = False,
        times: int = 1,
    ) -> None:
        """Record `tensor` as the box at `offset` of a whole of `shape`; without them it is whole.

        A piece of several boxes is added box by box. One that reaches beyond its whole is for the
        judge to find. Raises TraceError for a box that cannot be a part of the whole, that gives
        the whole another shape, or that was added before, unless a rank may hold it `again`:
        copies are to agree. `times`: the program has so many times what is to be recorded (a
        gradient that is still to be averaged).
        """
        shape = tuple(tensor.shape if shape is None else shape)
        offset = (0,) * len(shape) if offset is None else tuple(offset)
        box = Box(Key(check, name), shape, offset)
        _check(box, tuple(tensor.shape))
        known = self._shapes.setdefault(box.key, shape)
        if known != shape:
            raise TraceError(f"{box.key}: its whole was {known} before, and is {shape} now")
        if not again and (box, tuple(tensor.shape)) in self._seen:
            raise TraceError(f"{box.key}: recorded twice by the same rank at {box.offset}")
        self._seen.add((box, tuple(tensor.shape)))
        self.boxes.append(box)
        once = tensor.detach() if times == 1 else tensor.detach() / times
        self.tensors.append(once.to("cpu", copy=True).contiguous())
        self.put_right(box, tensor, times)

    def put_right(self, box: Box, tensor: Tensor, times: int = 1) -> None:
        """Write what is right over it, where that is asked for."""
        if (right := self.masks.get(box.key)) is not None and right.shape == box.shape:
            part = right[_slices(box, tensor)]
            if part.shape == tensor.shape:
                # Not `detach`: autograd, which may have saved the tensor, is not to know of it.
                tensor.data.copy_(part * times)

    def forget(self, names: Container[str]) -> None:
        """What was recorded of modules under these names."""
        kept = [
            (box, tensor)
            for box, tensor in zip(self.boxes, self.tensors, strict=True)
            if box.key.check not in DETAILS or box.key.name not in names
        ]
        self.boxes, self.tensors = [box for box, _ in kept], [tensor for _, tensor in kept]

    def save(self, path: Path) -> None:
        tensors = {str(i): tensor for i, tensor in enumerate(self.tensors)}
        metadata = {"parity": json.dumps(self.boxes), "at": json.dumps(self.at)}
        save_file(tensors, path, metadata=metadata)


def _check(box: Box, size: tuple[int, ...]) -> None:
    if box.key.check not in CHECKS + DETAILS:
        known = ", ".join(CHECKS + DETAILS)
        raise TraceError(f"{box.key}: no such check (known: {known})")
    if not len(size) == len(box.shape) == len(box.offset) or min(box.offset, default=0) < 0:
        raise TraceError(
            f"{box.key}: a box of {size} at {box.offset} does not lie in a whole of {box.shape}"
        )


def _slices(box: Box, tensor: Tensor) -> tuple[slice, ...]:
    return tuple(slice(i, i + n) for i, n in zip(box.offset, tensor.shape, strict=True))


def save_masks(masks: Mapping[Key, Tensor], path: Path) -> None:
    save_file({"\n".join(key): value.contiguous() for key, value in masks.items()}, path)


def load_masks(path: Path) -> dict[Key, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {Key(*name.split("\n")): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class Recording:
    """The saved traces of all ranks of one run; tensors are read when they are asked for."""

    def __init__(self, paths: Sequence[Path], ledgers: Sequence[list[Entry]] = ()) -> None:
        """`paths`, and `ledgers` if any were kept, in order of the ranks."""
        self.ledgers = ledgers
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._where: dict[Key, list[tuple[int, Box, str]]] = {}
        for rank, file in enumerate(self._files):
            for i, ((check, name), shape, offset) in enumerate(
                json.loads(file.metadata()["parity"])
            ):
                box = Box(Key(check, name), tuple(shape), tuple(offset))
                self._where.setdefault(box.key, []).append((rank, box, str(i)))

    def at(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank by its own word; empty if it gave none."""
        return {k: int(v) for k, v in json.loads(self._files[rank].metadata()["at"]).items()}

    @property
    def keys(self) -> list[Key]:
        """Every record, in the order of the ranks and of their programs."""
        return list(self._where)

    def shapes(self, key: Key) -> list[tuple[int, ...]]:
        """The shape of the whole by each piece's word; they agree in a sound recording."""
        return [box.shape for _, box, _ in self._where[key]]

    def held(self, key: Key) -> dict[int, set[tuple[int, ...]]]:
        """Where the pieces of each rank begin."""
        offsets: dict[int, set[tuple[int, ...]]] = {}
        for rank, box, _ in self._where[key]:
            offsets.setdefault(rank, set()).add(box.offset)
        return offsets

    def pieces(self, key: Key) -> list[Piece]:
        return [
            Piece(rank, box.offset, self._files[rank].get_tensor(name))
            for rank, box, name in self._where[key]
        ]
