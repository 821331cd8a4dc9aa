"""Tests that run once per combination: `@parity.matrix(tp=[1, 2, 4])`. Values; torch is not needed.

The same function is collected by pytest (plugin.py), one item per case, and run by `parity check`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TypeVar

from parity.case import Case, Scalar

F = TypeVar("F", bound=Callable[..., object])
MARK = "__parity_matrix__"  # the attribute of a function that holds its Combinations


@dataclass(frozen=True)
class Combinations:
    """The cases of a test: every size of every axis with every value of every option."""

    axes: Mapping[str, Sequence[int]]
    options: Mapping[str, Sequence[Scalar]] = field(default_factory=dict)
    max_world: int | None = None
    when: Callable[[Case], object] | None = None

    @property
    def cases(self) -> list[Case]:
        """In the order written, the last axis or option fastest."""
        every = [
            Case(
                dict(zip(self.axes, sizes, strict=True)),
                dict(zip(self.options, values, strict=True)),
            )
            for sizes in product(*self.axes.values())
            for values in product(*self.options.values())
        ]
        return [case for case in every if self.when is None or self.when(case)]

    def why_not(self, case: Case, room: int, of: str = "") -> str:
        """Why it cannot be run where there is room for so many ranks (`of`: what kind of room);
        empty if it can.
        """
        if case.world > room:
            return f"it has {case.world} ranks, and there is room for {room}{of}"
        if self.max_world is not None and case.world > self.max_world:
            return f"it has {case.world} ranks, and the test allows {self.max_world} (max_world)"
        return ""


def matrix(
    *,
    options: Mapping[str, Sequence[Scalar]] | None = None,
    max_world: int | None = None,
    when: Callable[[Case], object] | None = None,
    **axes: Sequence[int],
) -> Callable[[F], F]:
    """Run the test for every combination of the sizes of its mesh axes, and of `options`.

    The test takes one argument, `case` (parity.TestCase). `max_world`: cases of more ranks are
    skipped. `when` is asked for each case whether it exists at all. Raises ValueError or TypeError
    for what is no axis: sizes are whole numbers from 1 up.
    """
    if not axes:
        raise ValueError("parity.matrix: it needs an axis and its sizes, as in tp=[1, 2, 4]")
    for axis, sizes in axes.items():
        if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
            raise TypeError(f"parity.matrix: {axis} must be a list of sizes, as in [1, 2, 4]")
        wrong = [size for size in sizes if type(size) is not int or size < 1]
        if wrong or len(set(sizes)) < len(sizes):
            raise ValueError(
                f"parity.matrix: {axis}={list(sizes)}: sizes are different whole numbers from 1 up"
            )
    for name, values in (options or {}).items():
        if name in axes:
            raise ValueError(f"parity.matrix: {name} is an axis, and cannot be an option too")
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise TypeError(f"parity.matrix: options: {name} must be a list of values")
        if len({repr(value) for value in values}) < len(values):
            raise ValueError(f"parity.matrix: options: {name}={list(values)}: one is listed twice")
    combinations = Combinations(axes, dict(options or {}), max_world, when)

    def mark(test: F) -> F:
        if isinstance(test, type):
            raise TypeError(f"parity.matrix: put it above the methods of {test.__name__}")
        test.__dict__[MARK] = combinations
        return test

    return mark


def combinations_of(test: object) -> Combinations | None:
    """What `matrix` has said about a test, if it is one."""
    found = getattr(test, MARK, None)
    return found if isinstance(found, Combinations) else None
