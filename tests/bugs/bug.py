"""What a planted bug is: a small patch of heiretsu, with where it must be seen, and where not.

A bug is itself a target (`tests.bugs.tensor_parallel:row_bias_on_every_rank`): called on a rank it
patches heiretsu for as long as the run takes. The identifiers in `source` are those of shared bug
reports: a public thread, or the mechanism in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

from parity import Run, Trace
from tests import bridge

Patch = tuple[object, str, Any]  # (whose attribute, its name, what it becomes)


@dataclass(frozen=True, kw_only=True)
class Bug:
    """`case` must turn red under `schedules`, and under no other: first at what begins with
    `first`, with `status`, and in all in the checks `seen`. `silent` must stay green. (Without a
    pipeline only 1f1b is run.)

    `steps` of AdamW are run. The second one shows what a wrong first one leads to; where a bug of
    the optimizer is to be seen at the very tensor that it hits, one is enough, since the norms of
    all steps are recorded before the state.
    """

    name: str
    module: str
    patches: Callable[[], Iterable[Patch]]
    source: str
    case: str
    first: str
    seen: str
    silent: str | None
    dtype: str
    status: str
    schedules: str
    steps: int
    diagnosis: str

    @property
    def target(self) -> str:
        return f"{self.module}:{self.name}"

    def __call__(self, run: Run) -> Trace:
        with ExitStack() as planted:
            self.plant(planted)
            return bridge.candidate(run)

    def plant(self, planted: ExitStack) -> None:
        for owner, name, value in self.patches():
            planted.enter_context(mock.patch.object(owner, name, value))


BUGS: list[Bug] = []  # in the order in which the modules are imported: see catalogue.py


def bug(
    source: str,
    *,
    case: str,
    first: str,
    seen: str,
    silent: str | None,
    dtype: str = "float64",
    status: str = "bug",
    schedules: str = "gpipe 1f1b",
    steps: int = 2,
    diagnosis: str = "",
) -> Callable[[Callable[[], Iterable[Patch]]], Bug]:
    def register(patches: Callable[[], Iterable[Patch]]) -> Bug:
        made = Bug(
            name=patches.__name__,
            module=patches.__module__,
            patches=patches,
            source=source,
            case=case,
            first=first,
            seen=seen,
            silent=silent,
            dtype=dtype,
            status=status,
            schedules=schedules,
            steps=steps,
            diagnosis=diagnosis,
        )
        BUGS.append(made)
        return made

    return register


EVERYTHING = "forward gradient norm state loss"
ALL_BUT_FORWARD = "gradient norm state loss"
AFTER_GRADIENTS = "norm state loss"
LAST = "gradient of ln_f.bias"  # the first gradient that a backward pass finishes
