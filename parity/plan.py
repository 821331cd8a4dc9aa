"""What is compared with what, in which ways and where: values, whoever has decided them."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch

from parity.backend import Settings
from parity.case import Case, Run, Scalar
from parity.errors import UsageError
from parity.judge import Override
from parity.launcher import Backend
from parity.ledger import SIZE
from parity.room import room


class Packed(NamedTuple):
    """A target that has no name to be imported by: a callable, pickled."""

    name: str
    data: bytes


Target = str | Packed


@dataclass(frozen=True)
class Baseline:
    """What candidates are held against: a target of its own on one rank, or a case of theirs."""

    name: str
    target: Target
    case: Case


@dataclass(frozen=True)
class Plan:
    """Everything a matrix decides, checked and expanded: what a session needs, and no more."""

    target: Target
    baselines: Sequence[Baseline]
    cases: Sequence[Case]
    dtypes: Sequence[str]
    variants: Mapping[str, Sequence[Scalar]]
    options: Mapping[str, Scalar]
    steps: int
    seed: int = 0
    overrides: Sequence[Override] = ()
    backend: Backend = field(default_factory=Backend)
    detail: bool = False

    def runs(self, case: Case) -> list[Run]:
        """A case is computed once per dtype and combination of variants."""
        keys = list(self.variants)
        return [
            self.run(case, dtype, dict(zip(keys, values, strict=True)))
            for dtype in self.dtypes
            for values in product(*self.variants.values())
        ]

    def run(self, case: Case, dtype: str, variant: Mapping[str, Scalar]) -> Run:
        options = {**self.options, **case.options}
        return Run(case, dtype, self.steps, self.seed, variant, options, detail=self.detail)

    @property
    def first_variant(self) -> dict[str, Scalar]:
        return {key: values[0] for key, values in self.variants.items()}


@dataclass(frozen=True)
class Wish:
    """What a user asks for beyond what the matrix says; None and empty leave the matrix's word."""

    cases: Sequence[str] = ()
    max_world: int | None = None
    device: str = "auto"
    backend: str = "auto"
    ledger: bool = False
    settings: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    steps: int | None = None
    seed: int | None = None
    thresh: float | None = None
    deadline: float | None = None
    gpus: int | None = None  # how many there are; None: torch is asked


def resolve(path: Target) -> Callable[..., Any]:
    """`package.module:function` to the function; raises UsageError when there is none."""
    if isinstance(path, Packed):
        return pickle.loads(path.data)  # type: ignore[no-any-return]  # noqa: S301 (our own)
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code, which may do anything
        text = f"{path}: {type(error).__name__}: {error} (write it as package.module:function)"
        raise UsageError(text) from error
    if not callable(found):
        raise UsageError(f"{path}: is no function")
    return found  # type: ignore[no-any-return]


def room_for(wish: Wish, most: int) -> tuple[str, int]:
    """The device, and how many ranks fit (room.py). Raises UsageError."""
    gpus = wish.gpus
    if gpus is None:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        gpus = torch.cuda.device_count()
    found = room(wish.device, wish.backend, wish.max_world, most, gpus)
    if wish.ledger and wish.backend not in ("auto", "parity"):
        raise UsageError(
            f"--ledger: {wish.backend} keeps none; leave --backend out, or choose parity"
        )
    return found


def backend_for(wish: Wish, device: str, deadline: float) -> Backend:
    """How ranks are to talk, by what is asked for and where they are."""
    name = wish.backend
    if name == "auto":
        name = "nccl" if device == "cuda" and not wish.ledger else "parity"
    # Real rings add in an order that depends on the buffer, and mistakes come to light by it.
    settings = Settings(ledger=SIZE if wish.ledger else 0, order="place")
    return Backend(name, device, deadline, settings)
