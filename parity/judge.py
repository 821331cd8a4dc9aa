"""Is it the same function, is it as precise? One tensor against what was expected of it.

In float64 rounding is 1e-15 and a mistake is 1e-6 or far more: beyond the bound it is a `bug`. In a
working dtype the float64 baseline is the truth T; with r the disturbed baselines and p the
candidate, rho = ||p - T|| / ||r - T||, and beyond the bound it is `drift`: the right function,
computed less precisely. Both bounds are bounds.ALLOWED times measured noise, row by row.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from parity.bounds import ALLOWED, Expected, as_float64, norm, rounding, rows
from parity.trace import Key
from parity.whole import Finding, Whole, same_bits

LOGIC = "float64"
GOOD = ("exact", "ok")


class Override(NamedTuple):
    """A bound by the user's word: the relative error a record may have. The report shows it."""

    pattern: str  # "check" or "check/name", with * as in fnmatch
    bound: float
    reason: str

    def covers(self, key: Key) -> bool:
        return fnmatchcase(f"{key.check}/{key.name}", self.pattern) or self.pattern == key.check


class Verdict(NamedTuple):
    """What is to be said about one record of one run, against one baseline.

    `error` and `allowed` are relative to the tensor (Frobenius norms), `rho` is in units of the
    baseline's own noise, `excess` is the worst row's error over what that row is allowed. `place`
    is the element that is furthest off in the worst row.
    """

    key: Key
    status: str  # exact ok drift bug nan, shape split hole overlap, missing extra dtype
    text: str = ""
    error: float = 0.0
    allowed: float = 0.0
    rho: float = 0.0
    excess: float = 0.0
    place: tuple[int, ...] = ()
    got: float = 0.0
    want: float = 0.0
    elements: int = 0
    copies: int = 0

    @property
    def good(self) -> bool:
        return self.status in GOOD


def judge(key: Key, whole: Whole, expected: Expected, override: Override | None = None) -> Verdict:
    """Findings about the pieces come first: where copies disagree there is no one value."""
    verdict = _compare(key, whole.tensor, expected, override)
    verdict = verdict._replace(copies=whole.copies)
    return _with_findings(verdict, whole.findings)


def _with_findings(verdict: Verdict, findings: list[Finding]) -> Verdict:
    if not findings:
        return verdict
    status, text = findings[0]
    text = "; ".join([finding.text for finding in findings] + ([verdict.text] * bool(verdict.text)))
    return verdict._replace(status=status, text=text)


def _compare(
    key: Key, got: Tensor | None, expected: Expected, override: Override | None
) -> Verdict:
    if got is None:
        return Verdict(key, "hole")
    if got.shape != expected.exact.shape:
        text = f"its shape is {tuple(got.shape)}, the baseline's {tuple(expected.exact.shape)}"
        return Verdict(key, "shape", text)
    if got.dtype != expected.exact.dtype:
        text = f"its dtype is {got.dtype}, the baseline's {expected.exact.dtype}"
        return Verdict(key, "dtype", text)
    if not got.isfinite().all():
        count = got.numel() - int(got.isfinite().sum())
        return Verdict(key, "nan", f"{count} of {got.numel()} elements are not finite")
    return _measure(key, got, expected, override)


def _measure(key: Key, got: Tensor, expected: Expected, override: Override | None) -> Verdict:
    difference = _difference(got, expected)
    off = rows(difference).square().sum(1).sqrt()
    distance = norm(difference)
    allowed = override.bound if override else ALLOWED * expected.total / expected.scale
    ratio = off / (ALLOWED * expected.noise)
    ratio[off == 0] = 0.0  # also where no error and no noise meet
    excess = ratio.amax().item() if ratio.numel() else 0.0
    if override:
        excess = distance / expected.scale / override.bound
    verdict = Verdict(
        key,
        status="ok" if excess <= 1 else _wrong(got.dtype),
        error=distance / expected.scale,
        allowed=allowed,
        rho=distance / expected.total if expected.total else 0.0,
        excess=excess,
        elements=got.numel(),
    )
    if same_bits(got, expected.exact):
        # The candidate is the baseline to the bit; in a working dtype it still has its own rho.
        return verdict._replace(status="exact")
    return verdict if verdict.good else _locate(verdict, got, expected, difference, ratio)


def _difference(got: Tensor, expected: Expected) -> Tensor:
    """In float64. What does not round is equal or not: 2^60 + 1 has no float64 of its own."""
    if rounding(got.dtype) == 0.0:
        return (got != expected.exact).double()
    return as_float64(got) - expected.truth


def _wrong(dtype: torch.dtype) -> str:
    has_precision_to_lose = rounding(dtype) > rounding(getattr(torch, LOGIC))
    return "drift" if has_precision_to_lose else "bug"


def _locate(
    verdict: Verdict, got: Tensor, expected: Expected, difference: Tensor, ratio: Tensor
) -> Verdict:
    row = int(ratio.argmax())
    column = int(rows(difference)[row].abs().argmax())
    width = rows(difference).shape[1]
    flat = row * width + column
    shape = difference.shape
    place = torch.unravel_index(torch.tensor(flat), shape) if shape else ()
    return verdict._replace(
        place=tuple(int(i) for i in place),
        got=as_float64(got).reshape(-1)[flat].item(),
        want=expected.truth.reshape(-1)[flat].item(),
    )
