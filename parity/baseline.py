"""What candidates are held against: each baseline is run once per dtype, and kept.

The first one is run again under disturbances of one rounding (bounds.py): how far it moves is the
noise that all comparisons are measured by, those with other baselines too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parity.bounds import (
    LOOSE,
    NUDGES,
    Expected,
    as_float64,
    coarser,
    hidden_bits,
    measure,
    norm,
)
from parity.case import Case
from parity.errors import ParityError, RanksFailed, TraceError
from parity.judge import LOGIC
from parity.plan import Baseline, Plan
from parity.trace import CHECKS, DETAILS, Key, Recording
from parity.tracing import record
from parity.whole import join, on_one_thread, same_bits

Wholes = dict[Key, Tensor]
_Run = tuple[str, int]  # dtype, nudge
FAR = 0.25  # rounding of bfloat16 through a deep model stays well below


class BaselineFailed(ParityError):
    """Without its baselines a matrix cannot be judged."""


class Baselines:
    """The expectations of a plan. Cases with options of their own have baselines of their own."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._bits: dict[str, int] = {}  # that the first one keeps in a dtype which has more
        self._expected: dict[tuple[str, str, str], dict[Key, Expected]] = {}

    def is_ready(self, case: Case) -> bool:
        first = self.plan.baselines[0].name
        return (first, self.plan.dtypes[0], _options_id(case)) in self._expected

    @property
    def coarse(self) -> str:
        """In which dtypes the first baseline rounds more coarsely than they do; or ''."""
        found = [f"{bits} bits in {dtype}" for dtype, bits in self._bits.items()]
        if not found:
            return ""
        kept = ", ".join(found)
        said = f"the baseline itself keeps about {kept} (autocast?), so finer drift is not seen"
        return said if LOGIC in self.plan.dtypes else f"{said}, nor are many mistakes: add {LOGIC}"

    def expected(self, baseline: Baseline, dtype: str, case: Case) -> dict[Key, Expected]:
        return self._expected[baseline.name, dtype, _options_id(case)]

    @on_one_thread
    def prepare(self, case: Case) -> None:
        """Run the baselines for the options of this case. Raises BaselineFailed or TraceError."""
        if self.is_ready(case):
            return
        first, *others = self.plan.baselines
        wholes = {first.name: self._run(first, case, self._keys(range(NUDGES + 1)))}
        disturbed = wholes[first.name]
        self._disturb_coarsely(first, case, disturbed)
        for baseline in others:
            wholes[baseline.name] = self._run(baseline, case, self._keys(range(1)))
        _check(wholes)
        self._check_noise(first.name, _measured(disturbed, disturbed, LOGIC))
        for name, own in wholes.items():
            for dtype in self.plan.dtypes:
                expected = _measured(own, disturbed, dtype)
                if dtype != LOGIC:
                    _check_precision(name, dtype, expected)
                self._expected[name, dtype, _options_id(case)] = expected

    def _disturb_coarsely(self, first: Baseline, case: Case, own: dict[_Run, Wholes]) -> None:
        """Where a program rounds far more coarsely than its dtype (autocast), one rounding of the
        dtype is swallowed on the way and says nothing: disturb it by one of those it makes.
        """
        for dtype in self.plan.dtypes:
            if bits := self._hidden_bits(own, dtype):
                self._bits[dtype] = bits
                keys = {(dtype, coarser(n, bits)): (dtype, n) for n in range(1, NUDGES + 1)}
                runs = self._run(first, case, list(keys))
                own.update({keys[at]: wholes for at, wholes in runs.items()})

    def _hidden_bits(self, own: dict[_Run, Wholes], dtype: str) -> int:
        early = CHECKS[:2]  # an optimizer's step may move by much more than its gradient
        exact, short = (_measured(own, own, name) for name in (LOGIC, dtype))
        pairs = ((exact[key], e) for key, e in short.items() if key.check in early)
        return hidden_bits(pairs, getattr(torch, dtype))

    def _check_noise(self, name: str, expected: dict[Key, Expected]) -> None:
        """Noise of the size of a mistake would excuse every mistake."""
        for key, e in expected.items():
            spared = any(override.covers(key) for override in self.plan.overrides)
            if not e.total <= LOOSE * e.scale and not spared:
                raise TraceError(
                    f"the baseline '{name}', {key}: it moves by {e.total / e.scale:.1e} of its "
                    "size when its parameters move by one rounding, so nothing can be held against "
                    "it; leave out what is random (dropout: p=0) or seed it by run.seed alone, or "
                    "make it less chaotic"
                )

    def _keys(self, nudges: Sequence[int]) -> list[_Run]:
        """The truth, in float64, is needed whatever is judged, and what one rounding does to it."""
        judged = [(dtype, nudge) for dtype in self.plan.dtypes for nudge in nudges]
        return list(dict.fromkeys([*((LOGIC, nudge) for nudge in nudges[:2]), *judged]))

    def _run(self, baseline: Baseline, case: Case, keys: Sequence[_Run]) -> dict[_Run, Wholes]:
        where = replace(baseline.case, options=case.options)
        runs = [
            replace(self.plan.run(where, dtype, self.plan.first_variant), nudge=nudge)
            for dtype, nudge in keys
        ]
        # On CPU, runs of one rank go side by side, as many as there are cores.
        alone = self.plan.backend.device == "cpu" and where.world == 1
        lanes = min(len(runs), os.cpu_count() or 1) if alone else 1
        # A case may take the deadline; these are as many runs as several cases have.
        times = -(-len(runs) // len(self.plan.runs(where)))
        backend = replace(self.plan.backend, deadline=times * self.plan.backend.deadline)
        try:
            with record(baseline.target, runs, backend, lanes) as recordings:
                wholes = [_sound(baseline.name, recording) for recording in recordings]
        except RanksFailed as error:
            text = f"the baseline '{baseline.name}' could not be run"
            raise BaselineFailed(f"{text}\n{error}") from error
        return dict(zip(keys, wholes, strict=True))


def _check_precision(name: str, dtype: str, expected: dict[Key, Expected]) -> None:
    """A baseline that starts from other values in each dtype would excuse every candidate."""
    outputs = [e for key, e in expected.items() if key.check == CHECKS[0]]
    errors = [norm(as_float64(e.exact) - e.truth) / e.scale for e in outputs]
    far = min(errors, default=0.0)
    if not far <= FAR:
        raise TraceError(
            f"the baseline '{name}' is off by {far:.1e} of its size in {dtype}, from what it is in "
            f"{LOGIC}: that is no rounding; draw its initial values and data in one dtype, and "
            "cast them to that of the run"
        )


def _sound(name: str, recording: Recording) -> Wholes:
    """The records of a baseline. It is the yardstick: pieces that do not join are an error."""
    wholes = {}
    for key in recording.keys:
        whole = join(recording.pieces(key), recording.shapes(key))
        if whole.tensor is None or whole.findings:
            raise TraceError(f"the baseline '{name}', {key}: {whole.findings[0].text}")
        if not whole.tensor.isfinite().all():
            raise TraceError(f"the baseline '{name}', {key}: it is not finite, and no yardstick")
        wholes[key] = whole.tensor.clone()
    if not wholes:
        raise TraceError(f"the baseline '{name}' recorded nothing, so nothing can be compared")
    return wholes


def _check(wholes: dict[str, dict[_Run, Wholes]]) -> None:
    """Baselines record the same tensors, and the first of them heeds its disturbances."""
    (first, runs), *others = wholes.items()
    for (dtype, nudge), disturbed in runs.items():
        start = runs[dtype, 0]
        if nudge and all(same_bits(tensor, start[key]) for key, tensor in disturbed.items()):
            raise TraceError(
                f"the baseline '{first}' gives the same bits under nudge {nudge} as without: call "
                "parity.nudge(parameter, name, run.nudge) for each of its initial parameters"
            )
    for name, own in others:
        for at, tensors in own.items():
            _check_alike(first, runs[at], name, tensors)


def _check_alike(first: str, a: Wholes, second: str, b: Wholes) -> None:
    for key in [*a, *b]:
        if key.check in DETAILS and not (key in a and key in b):
            continue
        if key not in a or key not in b:
            by, without = (first, second) if key in a else (second, first)
            raise TraceError(f"{key} is recorded by the baseline '{by}' and not by '{without}'")
        x, y = a[key], b[key]
        if x.shape != y.shape or x.dtype != y.dtype:
            raise TraceError(
                f"{key} is {tuple(x.shape)} {x.dtype} in the baseline '{first}', and "
                f"{tuple(y.shape)} {y.dtype} in '{second}'"
            )


def _measured(
    own: dict[_Run, Wholes], disturbed: dict[_Run, Wholes], dtype: str
) -> dict[Key, Expected]:
    """What is expected of each record: by a baseline's own values, and the first one's noise."""
    largest = _largest(own[LOGIC, 0])
    return {
        key: measure(
            exact,
            own[LOGIC, 0][key],
            [wholes[key] for (of, nudge), wholes in disturbed.items() if of == dtype and nudge],
            largest[key.check],
        )
        for key, exact in own[dtype, 0].items()
    }


def _largest(wholes: Wholes) -> dict[str, float]:
    """The largest norm of each check's records."""
    largest: dict[str, float] = {}
    for key, whole in wholes.items():
        largest[key.check] = max(largest.get(key.check, 0.0), norm(as_float64(whole)))
    return largest


def _options_id(case: Case) -> str:
    return repr(sorted(case.options.items()))
