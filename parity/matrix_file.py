"""matrix.yaml: which program is held against which baseline, on which combinations.

`load` says everything that is wrong with a file at once, with its lines; `expand` makes the cases.
Combining is as in GitHub Actions: the product of the axes; `exclude` removes what it matches in
part; then `include` extends each combination that it does not contradict, or adds a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from parity.case import Case, Scalar, parse_axes
from parity.errors import UsageError
from parity.yaml_file import Document

Positive = Annotated[int, Field(ge=1)]
Reference = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CaseBaseline(_Strict):
    """The target itself, on another case; as a rule on one rank."""

    case: str


class OverrideEntry(_Strict):
    """A bound by hand, for the tensors whose `check/name` matches; it needs a reason."""

    tensor: str
    bound: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    reason: Annotated[str, Field(min_length=10)]


# The tags say which member of a union was meant, so that only its objections are raised.
BaselineEntry = Annotated[
    Annotated[Reference, Tag("<path>")] | Annotated[CaseBaseline, Tag("<case>")],
    Discriminator(lambda value: "<case>" if isinstance(value, dict) else "<path>"),
]
AxisSizes = Annotated[
    Annotated[Literal["auto"], Tag("<auto>")]
    | Annotated[list[Positive], Field(min_length=1), Tag("<sizes>")],
    Discriminator(lambda value: "<sizes>" if isinstance(value, list) else "<auto>"),
]


class Range(_Strict):
    """Whole numbers, both ends included."""

    start: int = Field(alias="from")
    to: int


Choice = Annotated[
    Annotated[list[Scalar], Field(min_length=1), Tag("<list>")] | Annotated[Range, Tag("<range>")],
    Discriminator(lambda value: "<range>" if isinstance(value, dict) else "<list>"),
]


class Matrix(_Strict):
    """The file's fields; docs/matrix.md says what each is for."""

    target: Reference
    objections: Reference | None = None
    baselines: Annotated[dict[str, BaselineEntry], Field(min_length=1)]
    axes: Annotated[dict[str, AxisSizes], Field(min_length=1)]
    max_world: Positive = 8
    dtypes: Annotated[list[Dtype], Field(min_length=1)] = ["float64", "float32"]
    variants: dict[str, Annotated[list[Scalar], Field(min_length=1)]] = {}
    options: dict[str, Scalar] = {}
    steps: Positive = 10
    seed: int = 0
    exclude: list[Annotated[dict[str, int], Field(min_length=1)]] = []
    include: list[dict[str, Scalar]] = []
    overrides: list[OverrideEntry] = []
    deadline: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    soak: dict[str, Choice] = {}


class Skip(NamedTuple):
    """A combination that is not run, and why."""

    case: Case
    reason: str


def load(path: Path) -> Matrix:
    """Raises UsageError with every objection, each as `file:line: key: what is wrong`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no UTF-8 text"
        raise UsageError(f"{path}: {why}; name a matrix file that exists") from error
    try:
        document = Document(text)
    except RecursionError as error:
        raise UsageError(
            f"{path}: an alias (*) refers to what contains it; write it out"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise UsageError(f"{path}:{line}: no YAML: {getattr(error, 'problem', error)}") from error
    objections = {loc: text for loc, text in document.objections}
    matrix = None
    try:
        matrix = Matrix.model_validate(document.value if document.value is not None else {})
    except ValidationError as error:
        for detail in error.errors():
            objections.setdefault(_in_file(detail["loc"]), _say(detail))
    if matrix is not None:
        objections.update(_contradictions(matrix))
    if objections or matrix is None:
        said = [(document.line(loc), f"{_dotted(loc)}{text}") for loc, text in objections.items()]
        raise UsageError(*(f"{path}:{line}: {text}" for line, text in sorted(said)))
    return matrix


def _in_file(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic's location without the tags of unions, which are not in the file."""
    return tuple(part for part in loc if not str(part).startswith("<"))


def _dotted(loc: tuple[int | str, ...]) -> str:
    parts = [str(part) for part in loc if part != "again"]
    return ".".join(parts) + ": " if parts else ""


def _say(detail: Any) -> str:
    """pydantic's finding in the words of our messages: what was expected, got, and is to write."""
    got, kind = detail["input"], detail["type"]
    known = ", ".join(Matrix.model_fields)
    words = {
        "missing": "is missing",
        "extra_forbidden": f"unknown key (known: {known})"
        if len(detail["loc"]) == 1
        else ("unknown key here"),
        "int_type": f"expected a whole number, got {got!r}{_unquoted(got)}",
        "float_type": f"expected a number, got {got!r}{_unquoted(got)}",
        "string_type": f"expected text, got {got!r}; write '{got}'",
        "list_type": f"expected a list, got {got!r}; write [{got}]",
        "string_pattern_mismatch": f"expected package.module:function, got {got!r}",
        "greater_than_equal": f"must be 1 or more, got {got!r}",
        "greater_than": f"must be more than 0, got {got!r}",
        "string_too_short": f"needs a sentence that says why, got {got!r}",
        "too_short": "must not be empty",
        "finite_number": f"must be a finite number, got {got!r}",
    }
    if kind == "literal_error":
        expected = str(detail["ctx"]["expected"])
        if detail["loc"][0] == "axes":
            expected += f" or a list of sizes; write [{got}]" if type(got) is int else ""
        return f"expected {expected}, got {got!r}"
    return words.get(kind, f"{detail['msg']}, got {got!r}")


def _unquoted(got: object) -> str:
    return f"; write {got}" if isinstance(got, str) and got.strip("-").isdigit() else ""


def _contradictions(matrix: Matrix) -> dict[tuple[int | str, ...], str]:
    """What is wrong between fields that are right by themselves."""
    found: dict[tuple[int | str, ...], str] = {}
    axes = ", ".join(matrix.axes)
    for i, entry in enumerate(matrix.exclude):
        for key in entry:
            if key not in matrix.axes:
                found["exclude", i, key] = f"no axis of this matrix (its axes: {axes})"
    for i, addition in enumerate(matrix.include):
        for key, value in addition.items():
            if key in matrix.axes and (type(value) is not int or value < 1):
                found["include", i, key] = f"expected a whole number from 1 on, got {value!r}"
    for name, choice in matrix.soak.items():
        if isinstance(choice, Range) and choice.start > choice.to:
            found["soak", name] = f"from {choice.start} to {choice.to} is no range; swap them"
    for name, baseline in matrix.baselines.items():
        if isinstance(baseline, CaseBaseline):
            try:
                if list(parse_axes(baseline.case)) != list(matrix.axes):
                    raise ValueError(f"'{baseline.case}' does not name the axes {axes}, in order")
            except ValueError as error:
                found["baselines", name, "case"] = str(error)
    lists: dict[tuple[int | str, ...], Sequence[object]] = {("dtypes",): matrix.dtypes}
    lists |= {("variants", name): values for name, values in matrix.variants.items()}
    lists |= {("axes", name): sizes for name, sizes in matrix.axes.items() if sizes != "auto"}
    for loc, values in lists.items():
        if len(set(values)) < len(values):
            found[loc] = f"a value is listed twice in {values}"
    return found


def combinations(matrix: Matrix, max_world: int) -> list[Case]:
    """Every case of the matrix by its size, before anything is skipped."""
    values = {
        axis: range(1, max_world + 1) if sizes == "auto" else sizes
        for axis, sizes in matrix.axes.items()
    }
    autos = [axis for axis, sizes in matrix.axes.items() if sizes == "auto"]
    rows = (dict(zip(values, row, strict=True)) for row in product(*values.values()))
    # `auto` means: whatever fits. Sizes that were asked for by name are listed even when too large.
    kept = [row for row in rows if prod(row.values()) <= max_world or not _is_auto(row, autos)]
    kept = [row for row in kept if not any(_matches(row, entry) for entry in matrix.exclude)]
    cases = [(row, dict[str, Scalar]()) for row in kept]
    originals = len(cases)
    for entry in matrix.include:
        _include(cases, originals, entry, list(matrix.axes))
    made = [Case(axes, options) for axes, options in cases]
    return sorted(made, key=lambda case: (case.world, [-n for n in case.axes.values()]))


def _is_auto(row: Mapping[str, int], autos: Sequence[str]) -> bool:
    """An axis left to `auto` has grown beyond 1."""
    return any(row[axis] > 1 for axis in autos)


def _matches(row: Mapping[str, int], entry: Mapping[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in entry.items())


def _include(
    cases: list[tuple[dict[str, int], dict[str, Scalar]]],
    originals: int,
    entry: Mapping[str, Scalar],
    axes: Sequence[str],
) -> None:
    """Extend the original combinations that the entry does not contradict; else it is a new one."""
    at = {axis: int(entry[axis]) for axis in axes if axis in entry}
    options = {key: value for key, value in entry.items() if key not in axes}
    matching = [extra for row, extra in cases[:originals] if _matches(row, at)]
    for extra in matching:
        extra.update(options)
    if not matching:
        cases.append(({axis: at.get(axis, 1) for axis in axes}, options))


def skips(
    cases: Sequence[Case],
    max_world: int,
    objections: Callable[[Case], Sequence[str]],
) -> Iterator[Skip]:
    """What cannot be run, each with every reason. `objections` is the target's own word."""
    for case in cases:
        reasons = list(objections(case))
        if case.world > max_world:
            reasons.append(f"it has {case.world} ranks, and there is room for {max_world}")
        if reasons:
            yield Skip(case, "; ".join(reasons))
