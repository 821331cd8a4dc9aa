"""A matrix and a user's wishes to a plan: everything decided and checked before a rank starts."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from parity import matrix_file as matrices
from parity.backend import Settings
from parity.case import Case, Run, Scalar, parse_axes
from parity.errors import UsageError
from parity.judge import Override
from parity.launcher import Backend
from parity.ledger import SIZE
from parity.matrix_file import DTYPES, Matrix, Skip
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


class Space(NamedTuple):
    """What may be drawn: choices for options, cases, and who objects to which."""

    choices: Mapping[str, Sequence[Scalar] | matrices.Range]
    cases: Sequence[Case]
    objections: Callable[[Case, Mapping[str, Scalar]], Sequence[str]]


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


def prepare(path: Path, wish: Wish) -> tuple[Plan, list[Skip]]:
    """The plan, and what is skipped; raises UsageError with all that is wrong."""
    # Targets are imported from where the matrix lies: `tests.bridge` is beside it.
    sys.path.insert(0, str(path.resolve().parent))
    matrix = matrices.load(path)
    device, room = room_for(wish, matrix.max_world)
    options = {**matrix.options, **_settings(wish.settings, matrix)}
    every = matrices.combinations(matrix, room)
    skipped = list(matrices.skips(every, room, _objections(matrix, options)))
    chosen = _chosen(wish.cases, every, skipped)
    out = [skip.case for skip in skipped]
    cases = [case for case in chosen if case not in out]
    plan = _plan(wish, matrix, device, options, cases)
    for target in dict.fromkeys([plan.target, *(b.target for b in plan.baselines)]):
        resolve(target)
    return plan, [skip for skip in skipped if skip.case in chosen]


def prepare_soak(path: Path, wish: Wish) -> tuple[Plan, Space]:
    """The plan that draws vary, and what they may be."""
    plan, skipped = prepare(path, wish)
    matrix = matrices.load(path)
    if not matrix.soak:
        raise UsageError(
            f"{path}: nothing to draw from; add soak: with options and what they may be, as in "
            "soak: {batch: {from: 2, to: 16}, tied: [true, false]}"
        )
    ask = _asker(matrix)
    ask(Case(dict.fromkeys(matrix.axes, 1)), {**plan.options, **_largest(matrix)})
    cases = [case for case in (*plan.cases, *(s.case for s in skipped)) if not case.options]
    return plan, Space(matrix.soak, cases, ask)


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


_KIND = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _settings(texts: Sequence[str], matrix: Matrix) -> dict[str, Scalar]:
    """--set key=value, the value read as the type that the matrix gives the key."""
    settings: dict[str, Scalar] = {}
    wrong = []
    examples = {**_largest(matrix), **matrix.options}
    for text in texts:
        key, equals, value = text.partition("=")
        known = examples.get(key)
        if not equals or known is None:
            names = ", ".join(examples)
            wrong.append(f"--set {text}: write it as KEY=VALUE, with a key of: {names}")
            continue
        try:
            words = {"true": True, "false": False}
            settings[key] = words[value] if isinstance(known, bool) else type(known)(value)
        except (KeyError, ValueError):
            wrong.append(f"--set {text}: expected {_KIND[type(known)]}")
    if wrong:
        raise UsageError(*wrong)
    return settings


def _largest(matrix: Matrix) -> dict[str, Scalar]:
    """One value for each option that a soak varies."""
    return {
        name: choice.to if isinstance(choice, matrices.Range) else choice[-1]
        for name, choice in matrix.soak.items()
    }


def _objections(matrix: Matrix, options: dict[str, Scalar]) -> Callable[[Case], Sequence[str]]:
    ask = _asker(matrix)
    return lambda case: ask(case, {**options, **case.options})


def _asker(matrix: Matrix) -> Callable[[Case, Mapping[str, Scalar]], Sequence[str]]:
    """What the target objects to; raises UsageError for options that are wrong in any case."""
    ask = resolve(matrix.objections) if matrix.objections else lambda case, options: []

    def objections(case: Case, options: Mapping[str, Scalar]) -> Sequence[str]:
        try:
            return ask(case, options)
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error

    return objections


def _chosen(patterns: Sequence[str], cases: list[Case], skipped: list[Skip]) -> list[Case]:
    """The cases that match any pattern. One that names nothing, or only what is skipped, is the
    user's mistake: silence would look like success.
    """
    if not patterns:
        return cases
    wrong, reasons = [], {skip.case.id: skip.reason for skip in skipped}
    for pattern in patterns:
        ids = [case.id for case in cases if fnmatchcase(case.id, pattern)]
        if not ids:
            wrong.append(f"--case {pattern}: {_why_unknown(pattern, cases)}")
        elif all(name in reasons for name in ids):
            wrong += [f"--case {name}: {reasons[name]}" for name in ids]
    if wrong:
        raise UsageError(*wrong)
    return [case for case in cases if any(fnmatchcase(case.id, p) for p in patterns)]


def _why_unknown(pattern: str, cases: Sequence[Case]) -> str:
    largest = max((case.world for case in cases), default=0)
    try:
        world = Case(parse_axes(pattern)).world
    except ValueError:
        world = 0
    if world > largest:
        return f"it has {world} ranks, and there is room for {largest} (--max-world)"
    near = get_close_matches(pattern, [case.id for case in cases], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no such case (parity list shows them){hint}"


def _plan(
    wish: Wish,
    matrix: Matrix,
    device: str,
    options: dict[str, Scalar],
    cases: Sequence[Case],
) -> Plan:
    overrides = [Override(o.tensor, o.bound, o.reason) for o in matrix.overrides]
    if wish.thresh is not None:
        overrides.insert(0, Override("*", wish.thresh, "--thresh, set by the user"))
    deadline = wish.deadline or matrix.deadline
    return Plan(
        target=matrix.target,
        baselines=_baselines(matrix),
        cases=cases,
        dtypes=_dtypes(wish.dtypes or matrix.dtypes),
        variants=matrix.variants,
        options=options,
        steps=wish.steps or matrix.steps,
        seed=matrix.seed if wish.seed is None else wish.seed,
        overrides=overrides,
        backend=backend_for(wish, device, deadline),
    )


def backend_for(wish: Wish, device: str, deadline: float) -> Backend:
    """How ranks are to talk, by what is asked for and where they are."""
    name = wish.backend
    if name == "auto":
        name = "nccl" if device == "cuda" and not wish.ledger else "parity"
    # Real rings add in an order that depends on the buffer, and mistakes come to light by it.
    settings = Settings(ledger=SIZE if wish.ledger else 0, order="place")
    return Backend(name, device, deadline, settings)


def _baselines(matrix: Matrix) -> list[Baseline]:
    one = Case(dict.fromkeys(matrix.axes, 1))
    return [
        Baseline(name, entry, one)
        if isinstance(entry, str)
        else Baseline(name, matrix.target, Case(parse_axes(entry.case)))
        for name, entry in matrix.baselines.items()
    ]


def _dtypes(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise UsageError(
            *(f"--dtype {name}: unknown (known: {', '.join(DTYPES)})" for name in unknown)
        )
    return list(dict.fromkeys(names))
