"""One tensor of two runs, part by part: how far apart, and how far they may be.

With nudged recordings the noise is measured, as in bounds.py, and what is allowed is Student's t at
a chance of 1e-12, with as many degrees of freedom as there are nudged recordings.

Without, half of the digits must agree: a row may be off by sqrt(eps) of its own size and that of
its neighbours, eps being that of the coarser dtype. Adding n numbers in another order errs by
about sqrt(n) roundings, so half of the digits are lost to rounding when n is 1/eps (8 million in
float32), and a mistake in a program changes the leading ones. To that comes one eps of the largest
tensor of the same check, because a gradient that is zero in exact arithmetic (a key's bias) holds
the rounding of what was summed. It is a guess where a measurement can be had: Adam divides such
rounding by its own size, and what comes of it is no longer bounded by any of this.

Two dtypes: the finer one is the truth, and roundings are those of the coarser one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from parity.bounds import FALSE_ALARM, as_float64, measure, rounding, rows, t_quantile
from parity.judge import Verdict
from parity.offline.boxes import Box, common, regions
from parity.offline.sketch import size as size_of
from parity.offline.sketch import sketch
from parity.offline.spread import Source, Spread
from parity.trace import Key
from parity.whole import same_bits


class Bound(NamedTuple):
    """What is the same for all tensors of a check in a step."""

    multiple: float  # of the noise that is allowed
    largest: float  # norm of any tensor of the check, in the baseline


def multiple(nudged: int) -> float:
    return t_quantile(FALSE_ALARM, nudged) if nudged else 1.0


def judge(key: Key, want: Spread, got: Spread, nudged: Sequence[Spread], bound: Bound) -> Verdict:
    """`want` is whole; `nudged` are like it."""
    verdict = Verdict(key, "ok", copies=got.copies)
    if got.findings:
        return verdict._replace(status=got.findings[0].status, text=got.findings[0].text)
    if got.shape != want.shape:
        text = f"its shape is {got.shape}, the baseline's {want.shape}"
        return verdict._replace(status="shape", text=text)
    if not _are_comparable(want.dtype, got.dtype):
        text = f"its dtype is {got.dtype}, the baseline's {want.dtype}"
        return verdict._replace(status="dtype", text=text)
    tally = Tally(coarser(want.dtype, got.dtype), bound)
    if want.is_sketch or got.is_sketch:
        tally.add_sketches(want, got, nudged)
    else:
        for region in regions(want.shape):
            tally.add(region, want, got, nudged)
    return tally.verdict(verdict, prod(want.shape))


def split_of(spread: Spread) -> str:
    """Which of its copies differ, in words; nothing, if none do."""
    tally = Tally(spread.dtype, Bound(1.0, 1.0))
    if spread.is_sketch:
        tally.compare_digests(spread)
    for region in () if spread.is_sketch else regions(spread.shape):
        tally.compare_copies(spread, region)
    return tally.split_text()


def _are_comparable(a: torch.dtype, b: torch.dtype) -> bool:
    return a == b or (a.is_floating_point and b.is_floating_point)


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if rounding(a) >= rounding(b) else b


class Tally:
    """What adds up over the parts of a tensor."""

    def __init__(self, dtype: torch.dtype, bound: Bound) -> None:
        self.dtype, self.bound = dtype, bound
        self.off = self.truth = self.allowed = 0.0  # squares
        self.excess, self.got, self.want = 0.0, 0.0, 0.0
        self.place: tuple[int, ...] = ()
        self.nonfinite, self.is_same = 0, True
        self.is_truth_finite = True
        self.splits: dict[tuple[int, int], tuple[int, float]] = {}

    def add(self, region: Box, want: Spread, got: Spread, nudged: Sequence[Spread]) -> None:
        exact, mine = assemble(want, region), assemble(got, region)
        self.compare_copies(got, region)
        self.nonfinite += mine.numel() - int(mine.isfinite().sum())
        self.is_same &= same_bits(exact, mine)
        truth = as_float64(exact)
        self.is_truth_finite &= bool(truth.isfinite().all())
        if rounding(self.dtype) == 0.0:
            difference = (mine != exact).double()
        else:
            difference = as_float64(mine) - truth
        off = rows(difference).square().sum(1).sqrt()
        allowed = self._allowed(truth, [assemble(other, region) for other in nudged])
        self.off += off.square().sum().item()
        self.truth += truth.square().sum().item()
        self.allowed += allowed.square().sum().item()
        ratio = off / allowed
        ratio[off == 0] = 0.0  # also where no error and no noise meet
        worst = int(ratio.argmax())
        if ratio[worst].item() > self.excess:
            self.excess = ratio[worst].item()
            self._locate(region, worst, difference, truth)

    def _allowed(self, truth: Tensor, disturbed: list[Tensor]) -> Tensor:
        """Per row, as float64."""
        eps = rounding(self.dtype)
        if disturbed:
            # Of a finer dtype they moved by less than one rounding of the coarser one.
            times = eps / rounding(disturbed[0].dtype) if eps else 1.0
            moved = [truth + (as_float64(other) - truth) * times for other in disturbed]
            like = torch.empty(0, dtype=self.dtype)
            return measure(like, truth, moved, self.bound.largest).noise * self.bound.multiple
        squares = rows(truth).square().sum(1)
        return (squares + squares.mean()).sqrt() * sqrt(eps) + eps * self.bound.largest

    def compare_copies(self, got: Spread, region: Box) -> None:
        for first, *others in got.boxes:
            part = common(first.box, region) if others else None
            if part is None:
                continue
            one = first.read(part)
            for other in others:
                two = other.read(part)
                if not same_bits(one, two):
                    self._split(first, other, int((one != two).sum()), _apart(one, two))

    def _split(self, a: Source, b: Source, count: int, far: float) -> None:
        before, most = self.splits.get((a.rank, b.rank), (0, 0.0))
        self.splits[a.rank, b.rank] = before + count, max(most, far)

    def _locate(self, region: Box, row: int, difference: Tensor, truth: Tensor) -> None:
        line = rows(difference)[row].abs()
        flat = row * len(line) + int(line.argmax())
        self.want = truth.reshape(-1)[flat].item()
        self.got = self.want + difference.reshape(-1)[flat].item()
        index = torch.unravel_index(torch.tensor(flat), difference.shape) if region.size else ()
        self.place = tuple(int(i) + j for i, j in zip(index, region.offset, strict=False))

    def add_sketches(self, want: Spread, got: Spread, nudged: Sequence[Spread]) -> None:
        truth, mine = sketch_of(want), sketch_of(got)
        length = norm_of(want)
        self.is_truth_finite = bool(truth.isfinite().all())
        self.off, self.truth = size_of(mine - truth) ** 2, length**2
        self.is_same = bool(torch.equal(truth, mine)) and want.dtype == got.dtype
        eps, fine = rounding(self.dtype), rounding(torch.float64)
        # Adding up a sketch of n elements rounds too, whatever the dtype of the tensor.
        own = fine * sqrt(prod(want.shape)) * length
        if nudged:
            times = eps / rounding(nudged[0].dtype) if eps else 1.0
            moved = [size_of(sketch_of(other) - truth) * times for other in nudged]
            square = sum(x * x for x in moved) / len(moved) + 2 * (eps * length) ** 2
            self.allowed = (self.bound.multiple * sqrt(square) + own) ** 2
        else:
            self.allowed = (length * sqrt(2 * eps) + eps * self.bound.largest + own) ** 2
        self.excess = sqrt(self.off / self.allowed) if self.allowed else inf * bool(self.off)
        self.place = ()
        self.compare_digests(got)
        terms = [term for copies in got.boxes for term in copies[0].terms]
        self.nonfinite = sum(term.about.nonfinite for term in terms)

    def compare_digests(self, got: Spread) -> None:
        for first, other in got.digests:
            self._split(first, other, -1, size_of(first.sketch() - other.sketch()))

    def verdict(self, start: Verdict, elements: int) -> Verdict:
        distance, allowed, scale = sqrt(self.off), sqrt(self.allowed), sqrt(self.truth)
        if not isfinite(scale) or scale <= allowed:  # nothing but rounding: no size of its own
            scale = self.bound.largest or 1.0
        verdict = start._replace(
            error=distance / scale,
            allowed=allowed / scale,
            excess=self.excess,
            elements=elements,
        )
        if self.nonfinite:
            text = f"{self.nonfinite} of {elements} elements are not finite"
            return verdict._replace(status="nan", text=text)
        if not self.is_truth_finite or not isfinite(self.off + self.allowed):
            text = "of the baseline itself: its elements, or their squares, are not finite"
            return verdict._replace(status="nan", text=text)
        if self.splits:
            return verdict._replace(status="split", text=self.split_text())
        if self.is_same:
            return verdict._replace(status="exact")
        if self.excess > 1:
            status = "bug" if self.dtype == torch.float64 else "differs"
            return verdict._replace(status=status, place=self.place, got=self.got, want=self.want)
        return verdict

    def split_text(self) -> str:
        """Of the first two copies that differ; nothing, if none do."""
        if not self.splits:
            return ""
        (a, b), (count, far) = next(iter(self.splits.items()))
        if count < 0:
            return f"ranks {a} and {b} hold different copies (their sketches are {far:.1e} apart)"
        return (
            f"ranks {a} and {b} hold different copies ({count} elements differ, by up to {far:.1e})"
        )


def _apart(a: Tensor, b: Tensor) -> float:
    return float((as_float64(a) - as_float64(b)).abs().max())


def assemble(spread: Spread, region: Box) -> Tensor:
    """A region of the whole, of several copies that of the lowest rank."""
    out: Tensor | None = None
    for copies in spread.boxes:
        part = common(copies[0].box, region)
        if part is None:
            continue
        values = copies[0].read(part)
        if part == region:
            return values
        if out is None:
            out = torch.empty(region.size, dtype=values.dtype)
        out[part.within(region)] = values
    assert out is not None
    return out


def norm_of(spread: Spread) -> float:
    """By the norms of its pieces, which every recording has, or about, by its sketch."""
    firsts = [copies[0] for copies in spread.boxes]
    norms = [source.terms[0].about.norm for source in firsts if len(source.terms) == 1]
    known = [x for x in norms if x is not None]
    if len(known) == len(firsts):
        return sqrt(sum(x * x for x in known))
    return size_of(sketch_of(spread))


def sketch_of(spread: Spread) -> Tensor:
    """As it was recorded, or made now of what was."""
    if spread.is_sketch:
        return torch.stack([copies[0].sketch() for copies in spread.boxes]).sum(0)
    total = torch.zeros(0)
    for region in regions(spread.shape):
        part = sketch(assemble(spread, region), region.offset, spread.shape)
        total = part if not total.numel() else total + part
    return total
