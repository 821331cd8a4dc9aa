"""A case is a point of the matrix, a run is a case computed in one way: values, made anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

Scalar = str | int | float | bool
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """The size of every axis, in the matrix's order, and options that only this case has.

    >>> case = Case({"dp": 2, "tp": 2, "pp": 1})
    >>> case.id, case.world, case.title
    ('dp2-tp2-pp1', 4, 'dp=2 tp=2 pp=1')
    """

    axes: Mapping[str, int]
    options: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def id(self) -> str:
        sizes = "-".join(f"{axis}{size}" for axis, size in self.axes.items())
        return sizes + "".join(f"-{key}={value}" for key, value in self.options.items())

    @property
    def title(self) -> str:
        pairs = [*self.axes.items(), *self.options.items()]
        return " ".join(f"{key}={value}" for key, value in pairs)

    @property
    def world(self) -> int:
        return prod(self.axes.values())


def parse_axes(text: str) -> dict[str, int]:
    """Read `dp2-tp2-pp1`; raises ValueError when it is none."""
    axes: dict[str, int] = {}
    for part in text.split("-"):
        match = re.fullmatch(r"([a-z_]+)([1-9]\d*)", part)
        if match is None or match[1] in axes:
            raise ValueError(f"'{text}' is no case; write it as in dp2-tp2-pp1")
        axes[match[1]] = int(match[2])
    return axes


@dataclass(frozen=True)
class Run:
    """One computation of a case: what a target is called with, on every rank.

    `variant` chooses among ways to compute the same function (a pipeline schedule); `options` say
    which function it is (model, data). `nudge` is 0, or the seed of a disturbance by one rounding,
    which a baseline must apply to its initial parameters (`parity.nudge`). `rank`, `device` are
    filled in on the rank; torch.distributed is initialised with `case.world` ranks by then.
    `detail` asks for the records that say where a failure begins (`parity.record_modules`).
    `masks` is a file of baseline values that take the place of the candidate's (trace.py).
    """

    case: Case
    dtype: str
    steps: int
    seed: int = 0
    variant: Mapping[str, Scalar] = field(default_factory=dict)
    options: Mapping[str, Scalar] = field(default_factory=dict)
    nudge: int = 0
    detail: bool = False
    masks: str = ""
    rank: int = 0
    device: str = "cpu"

    @property
    def label(self) -> str:
        """What sets this run apart from the others of its case, as in `float64 schedule=1f1b`."""
        return " ".join([self.dtype, *(f"{key}={value}" for key, value in self.variant.items())])
