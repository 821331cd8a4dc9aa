"""A matrix file and a user's wishes to a plan: all is decided and checked before a rank starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from parity import matrix_file as matrices
from parity.case import DTYPES, Case, Scalar, parse_axes
from parity.errors import UsageError
from parity.judge import Override
from parity.matrix_file import Matrix, Skip
from parity.plan import Baseline, Plan, Wish, backend_for, resolve, room_for


class Space(NamedTuple):
    """What may be drawn: choices for options, cases, and who objects to which."""

    choices: Mapping[str, Sequence[Scalar] | matrices.Range]
    cases: Sequence[Case]
    objections: Callable[[Case, Mapping[str, Scalar]], Sequence[str]]


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
