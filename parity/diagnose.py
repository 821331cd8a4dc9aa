"""Which simple mistake makes exactly this difference? Explanations are tried; those that fit, told.

An explanation is one function: Evidence -> the Fits that it found. To add one, write it
(mistakes.py, rows.py, parts.py) and list it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from parity import mistakes, parts, rows
from parity.bounds import norm
from parity.evidence import (
    FITS,
    Evidence,
    Fit,
)

Explanation = Callable[[Evidence], Iterator[Fit]]

EXPLANATIONS: tuple[Explanation, ...] = (
    mistakes.zero,
    mistakes.untied,
    mistakes.unreduced,
    mistakes.unchanged,
    mistakes.miscounted,
    mistakes.scaled,
    mistakes.step_scaled,
    mistakes.decayed,
    mistakes.late,
    mistakes.carried_over,
    mistakes.another,
    mistakes.another_added,
    mistakes.transposed,
    mistakes.moved,
    mistakes.same_added,
    rows.same_in_batch,
    mistakes.shards_added,
    rows.rows_scaled,
    rows.mixed_rows,
    rows.pieces_scaled,
    rows.picked,
    rows.parts_of_batch,
    mistakes.of_others,
    mistakes.rounded,
)
PARTS: tuple[Explanation, ...] = (parts.by_input, parts.some_rows, parts.some_columns, parts.ranks)


def diagnose(e: Evidence) -> list[Fit]:
    """Every explanation that fits, the simplest first; if none does, which part differs."""
    if e.got.shape != e.want.shape or not e.got.numel() or not e.got.isfinite().all():
        return []
    if norm(e.got - e.want) <= e.noise:
        return _fits(mistakes.last_bits, e)
    for several in (EXPLANATIONS, PARTS):
        if fits := [fit for explain in several for fit in _fits(explain, e)]:
            is_one_factor = any(fit.by == mistakes.scaled.__name__ for fit in fits)
            return [fit for fit in fits if not is_one_factor or fit.kind != "rows scaled"]
    return []


def is_like(e: Evidence, fit: Fit) -> bool:
    """Whether the same is to be said of another record."""
    if e.got.shape != e.want.shape or norm(e.got - e.want) <= e.noise:
        return False
    found = [x for x in (*EXPLANATIONS, *PARTS, mistakes.last_bits) if x.__name__ == fit.by]
    return any(other.text == fit.text for x in found for other in _fits(x, e))


def _fits(explain: Explanation, e: Evidence) -> list[Fit]:
    return [fit._replace(by=explain.__name__) for fit in explain(e) if fit.residual <= FITS]
