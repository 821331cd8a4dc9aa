"""Recordings as they lie on disk: checked before anything of them is believed, read in parts.

Files are mapped into memory, and pages that were touched count as memory of this process until the
file is closed. So files are closed after every few megabytes that were read of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parity.errors import UsageError
from parity.offline.boxes import Box

_MOST_READ = 8 << 20  # bytes, of all files together, before they are closed
_STEP = re.compile(r"step(\d+)-rank(\d+)\.safetensors")

Count = Annotated[int, Field(ge=0)]
Shape = list[Count]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Header(_Strict):
    """`rank3.json`: which rank wrote, and how the run was cut."""

    schema_: Literal[1] = Field(alias="schema")
    torch: str
    dtypes: Annotated[list[str], Field(min_length=1)]
    world: Annotated[int, Field(ge=1)]
    rank: Count
    at: dict[str, Count]
    sizes: dict[str, Annotated[int, Field(ge=1)]]
    sketch: bool
    nudge: Count


class About(_Strict):
    """What is said of one piece; `store.hold` writes it."""

    check: Literal["parameter", "forward", "gradient", "state", "loss"]
    name: Annotated[str, Field(min_length=1)]
    dtype: str
    size: Shape
    shape: Shape | None
    offset: Shape | None
    cut: dict[str, list[str]] | None
    total: list[str]
    mean: list[str]
    norm: float | None
    nonfinite: Count = 0
    digest: str = ""


class Step(_Strict):
    schema_: Literal[1] = Field(alias="schema")
    step: Count
    rank: Count
    records: list[About]


class Files:
    """Open files, of which no more than a few megabytes are in memory."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._read = 0

    def file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def read(self, path: Path, name: str, part: tuple[slice, ...]) -> Tensor:
        """A part of a tensor; of one without dimensions, all of it."""
        file = self.file(path)
        tensor: Tensor = file.get_slice(name)[part] if part else file.get_tensor(name)
        self._read += tensor.numel() * tensor.element_size()
        if self._read > _MOST_READ:
            tensor = tensor.clone()
            self.close()
        return tensor

    def close(self) -> None:
        self._open, self._read = {}, 0


class Stored(NamedTuple):
    """A piece of one rank in a file."""

    rank: int
    about: About
    path: Path
    tensor: str  # what the file calls it
    files: Files

    def read(self, part: Box) -> Tensor:
        """A part of the piece, by its own indices."""
        slices = tuple(slice(i, j) for i, j in zip(part.offset, part.end, strict=True))
        return self.files.read(self.path, self.tensor, slices)

    def sketch(self) -> Tensor:
        """Of a recording of sketches: all of what is stored."""
        return self.files.read(self.path, self.tensor, ())


class Recorded(NamedTuple):
    """What all ranks wrote in one run; the pieces of a step are listed when they are asked for."""

    folder: Path
    headers: Sequence[Header]  # in order of the ranks
    steps: Mapping[int, Sequence[Path]]  # in order of the ranks, those that every rank wrote
    unfinished: Mapping[int, Sequence[int]]  # steps that only some ranks wrote, and which did not
    files: Files

    @property
    def is_sketch(self) -> bool:
        return self.headers[0].sketch

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes: by the coordinates that there are."""
        axes = self.headers[0].at
        return {axis: max(h.at[axis] for h in self.headers) + 1 for axis in axes}

    def pieces(self, step: int) -> dict[tuple[str, str], list[Stored]]:
        """By (check, name), in the order of the ranks and of their programs."""
        found: dict[tuple[str, str], list[Stored]] = {}
        for rank, path in enumerate(self.steps[step]):
            for i, about in enumerate(_step(path, step, rank, self.files).records):
                piece = Stored(rank, about, path, str(i), self.files)
                found.setdefault((about.check, about.name), []).append(piece)
        return found


def open_recording(folder: Path) -> Recorded:
    """Raises UsageError, naming the file, for what is not a whole recording."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected one that parity.record wrote")
    paths = sorted(folder.glob("rank*.json"))
    if not paths:
        raise UsageError(
            f"{folder}: it holds no recording; expected rank0.json and so on, which parity.record "
            "writes; give the folder that was named there"
        )
    headers = sorted((_header(path) for path in paths), key=lambda h: h.rank)
    _agree(folder, headers)
    files: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("step*-rank*.safetensors")):
        if match := _STEP.fullmatch(path.name):
            files.setdefault(int(match[1]), {})[int(match[2])] = path
    steps, unfinished = {}, {}
    for step, by_rank in sorted(files.items()):
        lacking = [h.rank for h in headers if h.rank not in by_rank]
        if lacking:
            unfinished[step] = lacking
        else:
            steps[step] = [by_rank[h.rank] for h in headers]
    if not steps:
        raise UsageError(
            f"{folder}: no step was recorded by all ranks; expected step0-rank0.safetensors and so "
            "on; did the run end before its first optimizer step?"
        )
    return Recorded(folder, headers, steps, unfinished, Files())


def _agree(folder: Path, headers: Sequence[Header]) -> None:
    """That the headers are those of one run."""
    first, ranks = headers[0], [h.rank for h in headers]
    for h in headers[1:]:
        for what in ("world", "sketch", "nudge", "sizes"):
            a, b = (json.dumps(h_.model_dump()[what]) for h_ in (first, h))
            if a != b:
                raise UsageError(
                    f"{folder}: ranks {first.rank} and {h.rank} are not of one run ({what}: {a} "
                    f"and {b}); expected the files of one run; record each to a folder of its own"
                )
        if set(h.at) != set(first.at):
            raise UsageError(
                f"{folder}: rank {first.rank} has the axes {', '.join(first.at)}, rank {h.rank} "
                f"{', '.join(h.at)}; expected the same on every rank; see mesh= and at= of "
                "parity.record"
            )
    if ranks != list(range(first.world)):
        lacking = sorted(set(range(first.world)) - set(ranks))
        raise UsageError(
            f"{folder}: the files of ranks {', '.join(map(str, lacking)) or 'beyond'} are not "
            f"there; expected {first.world}, one per rank; copy those of all machines together"
        )
    places = [tuple(sorted(h.at.items())) for h in headers]
    for i, place in enumerate(places):
        if place in places[:i]:
            said = ", ".join(f"{axis}={n}" for axis, n in place)
            raise UsageError(
                f"{folder}: ranks {places.index(place)} and {i} are both at {said}; expected "
                "coordinates that differ; give all axes to parity.record, by mesh= or at="
            )


def _header(path: Path) -> Header:
    try:
        return Header.model_validate_json(path.read_bytes())
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        raise _foreign(path, error) from error


def _step(path: Path, step: int, rank: int, files: Files) -> Step:
    try:
        file = files.file(path)
        said = Step.model_validate_json((file.metadata() or {}).get("parity", ""))
        if (said.step, said.rank) != (step, rank):
            raise ValueError(f"it is of step {said.step}, rank {said.rank}")
        names = set(file.keys())
        for i, about in enumerate(said.records):
            _check(about, i, file if str(i) in names else None)
    except (ValidationError, SafetensorError, OSError, ValueError) as error:
        raise _foreign(path, error) from error
    return said


def _check(about: About, i: int, file: Any) -> None:
    """That the file has what is said of it."""
    if file is None:
        raise ValueError(f"tensor {i}, {about.check} of {about.name}, is not in it")
    if not isinstance(getattr(torch, about.dtype, None), torch.dtype):
        raise ValueError(f"{about.name} has a dtype '{about.dtype}' that torch does not know")
    stored = list(file.get_slice(str(i)).get_shape())
    if not about.digest and stored != about.size:
        raise ValueError(f"{about.name} is said to be of {about.size}, and is of {stored}")
    sizes = {len(x) for x in (about.size, about.shape, about.offset) if x is not None}
    if len(sizes) != 1 or (about.shape is None) != (about.offset is None):
        raise ValueError(f"{about.name} has a place that is none: {about.offset} in {about.shape}")
    if about.cut and any(not d.isdigit() or int(d) >= len(about.size) for d in about.cut):
        raise ValueError(f"{about.name} is cut along a dimension that it does not have")


def _foreign(path: Path, error: Exception) -> UsageError:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"]
    else:
        said = str(error).splitlines()[0]
    return UsageError(
        f"{path}: it is broken, or nothing that parity.record of this version wrote ({said}); "
        "expected a file as it was written; copy it again, or record anew"
    )
