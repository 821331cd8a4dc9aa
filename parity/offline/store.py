"""What a rank writes: a header, and a file for each step, whole or not at all.

`rank3.json` says how the run was cut; `step0-rank3.safetensors` holds the pieces of one step, and
as metadata what each is. Nothing in them is code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from parity.bounds import as_float64
from parity.errors import UsageError
from parity.offline.place import Piece, Where
from parity.offline.sketch import digest, sketch

SCHEMA = 1  # raised when a reader of the old files would misread the new ones


class Kept(NamedTuple):
    """A piece on its way to a file: what is said about it, and its values or their sketch."""

    about: dict[str, Any]
    tensor: Tensor


def header_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def step_path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step{step}-rank{rank}.safetensors"


def write_header(
    folder: Path, where: Where, dtypes: Sequence[str], nudge: int, *, is_sketch: bool
) -> None:
    """Refuses a folder in which this rank has written before."""
    path = header_path(folder, where.rank)
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": SCHEMA,
        "torch": torch.__version__,
        "dtypes": list(dtypes),
        "world": where.world,
        "rank": where.rank,
        "at": dict(where.at),
        "sizes": dict(where.sizes),
        "sketch": is_sketch,
        "nudge": nudge,
    }
    steps = sorted(folder.glob(f"step*-rank{where.rank}.safetensors"))
    if path.exists() or steps:
        raise UsageError(
            f"{folder}: it holds a recording of rank {where.rank} already "
            f"({(steps or [path])[0].name}); expected a new folder; name another, or remove this "
            "one first. Nothing in it was changed"
        )
    _put(path, json.dumps(document, indent=1).encode())


def hold(check: str, name: str, piece: Piece, *, is_sketch: bool) -> Kept:
    """A copy on the CPU, or the sketch of one."""
    values = piece.tensor.detach().to("cpu", copy=not is_sketch).contiguous()
    wide = as_float64(values) if not values.is_floating_point() else values
    length = torch.linalg.vector_norm(wide, dtype=torch.float64).item()
    about = {
        "check": check,
        "name": name,
        "dtype": str(values.dtype).removeprefix("torch."),
        "size": list(values.shape),
        "shape": None if piece.shape is None else list(piece.shape),
        "offset": None if piece.offset is None else list(piece.offset),
        "cut": None if piece.cut is None else {str(d): list(a) for d, a in piece.cut.items()},
        "total": list(piece.total),
        "mean": list(piece.mean),
        "norm": length if isfinite(length) else None,
    }
    if is_sketch:
        assert piece.offset is not None
        assert piece.shape is not None
        about["nonfinite"] = values.numel() - int(values.isfinite().sum())
        about["digest"] = digest(values)
        values = sketch(values, piece.offset, piece.shape)
    return Kept(about, values)


def write_step(folder: Path, step: int, rank: int, held: Sequence[Kept]) -> None:
    said = {"schema": SCHEMA, "step": step, "rank": rank, "records": [h.about for h in held]}
    path = step_path(folder, step, rank)
    part = path.with_name(f".{path.name}.part")
    tensors = {str(i): h.tensor for i, h in enumerate(held)}
    save_file(tensors, part, metadata={"parity": json.dumps(said)})
    os.replace(part, path)


def _put(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
