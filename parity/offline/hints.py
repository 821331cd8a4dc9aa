"""Which simple mistake makes this difference: a sum that is missing, a factor. Part by part.

The words are those of mistakes.py; what is computed are products of the tensors, which add up over
the parts, so nothing whole is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from parity.bounds import as_float64
from parity.evidence import FITS, Evidence
from parity.judge import Verdict
from parity.offline.boxes import Box, common, regions
from parity.offline.compare import assemble, sketch_of
from parity.offline.spread import Source, Spread
from parity.wording import factor_text, why

_MOST_PARTS = 64  # of a whole number in a factor
_Lines = list[Sequence[Source]]  # for each box, the ranks along some axes that hold it


class Products(NamedTuple):
    """Of two tensors x and y: <x, x>, <x, y>, <y, y>."""

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, x: Tensor, y: Tensor) -> Products:
        pairs = ((x * x).sum(), (x * y).sum(), (y * y).sum())
        return Products(*(a + b.item() for a, b in zip(self, pairs, strict=True)))

    @property
    def ratio(self) -> float:
        """k, where x is about k y; the simple fraction that is near it, if one is."""
        k = self.xy / self.yy if self.yy else 0.0
        simple = float(Fraction(k).limit_denominator(_MOST_PARTS))
        return simple if abs(simple - k) <= FITS * abs(k) else k

    def left(self, k: float) -> float:
        """The norm of x - k y."""
        return sqrt(max(0.0, self.xx - 2 * k * self.xy + k * k * self.yy))


def hints(verdict: Verdict, want: Spread, got: Spread) -> list[str]:
    """What explains the difference, in words; nothing, if nothing simple does."""
    if verdict.status not in ("bug", "differs", "split") or not got.is_whole:
        return []
    sizes = {axis: len({at[axis] for at in got.at}) for axis in (got.at[0] if got.at else {})}
    groups = _groups(got, [axis for axis, n in sizes.items() if n > 1])
    own, sums, twins = Products(), dict.fromkeys(groups, Products()), dict.fromkeys(groups, 0.0)
    for truth, mine, totals in _parts(want, got, groups):
        own = own.add(mine, truth)
        for axes, total in totals.items():
            count = prod(sizes[axis] for axis in axes)
            sums[axes] = sums[axes].add(total, truth)
            twins[axes] += (total - count * mine).square().sum().item()
    e = Evidence(verdict.key, torch.empty(0), torch.empty(0), axes=sizes)
    enough = max(FITS * own.left(1.0), 1e-7 * sqrt(own.yy))  # float64 products know no better
    if not own.xx and own.yy:
        return ["it is zero everywhere: never computed, or cleared too late"]
    said = list[str]()
    for axes, products in sums.items():
        if sqrt(twins[axes]) > enough:  # else they hold the same, and their sum says nothing
            said += _unreduced(axes, products, prod(sizes[a] for a in axes), enough, e)
    return said[:1] or _scaled(own, enough, verdict.elements, e)


def _unreduced(
    axes: tuple[str, ...], products: Products, count: int, enough: float, e: Evidence
) -> Iterator[str]:
    k, name = products.ratio, " and ".join(axes)
    if not k or products.left(k) > enough * count:
        return
    if k == count:
        text = f"the mean over {name} of what the ranks hold equals the baseline"
        yield f"{text}: an average over {name} is missing"
    elif factor := factor_text(k, e):
        times = "" if k == 1 else f"{factor} times "
        text = f"the sum over {name} of what the ranks hold equals {times}the baseline"
        yield f"{text}: a sum over {name} (an all-reduce) is missing"


def _scaled(own: Products, enough: float, elements: int, e: Evidence) -> list[str]:
    k = own.ratio
    if not k or k == 1 or own.left(k) > enough:
        return []
    name = factor_text(k, e)
    if not name and elements == 1:
        return []  # one number is always some multiple of another
    return [f"it is {name or f'{k:.6g}'} times the baseline{why(k, e)}"]


def _groups(got: Spread, axes: Sequence[str]) -> dict[tuple[str, ...], _Lines]:
    """By axes: for each box the ranks that differ in these coordinates alone, if all hold it."""
    found = {}
    for some in (*combinations(axes, 1), *combinations(axes, 2)):
        count = prod(len({at[axis] for at in got.at}) for axis in some)
        lines = [_line(copies, some, got) for copies in got.boxes]
        if lines and all(len(line) == count for line in lines):
            found[some] = lines
    return found


def _line(copies: Sequence[Source], axes: Sequence[str], got: Spread) -> Sequence[Source]:
    def rest(source: Source) -> tuple[int, ...]:
        return tuple(i for axis, i in got.at[source.rank].items() if axis not in axes)

    return [source for source in copies if rest(source) == rest(copies[0])]


def _parts(
    want: Spread, got: Spread, groups: dict[tuple[str, ...], _Lines]
) -> Iterator[tuple[Tensor, Tensor, dict[tuple[str, ...], Tensor]]]:
    """The baseline, the candidate, and sums over axes: region by region, or of sketches."""
    if want.is_sketch or got.is_sketch:
        if got.is_sketch:
            totals = {
                axes: torch.stack([s.sketch() for line in lines for s in line]).sum(0)
                for axes, lines in groups.items()
            }
        else:
            totals = {}
        yield sketch_of(want), sketch_of(got), totals
        return
    for region in regions(want.shape):
        totals = {axes: _total(lines, region) for axes, lines in groups.items()}
        yield as_float64(assemble(want, region)), as_float64(assemble(got, region)), totals


def _total(lines: _Lines, region: Box) -> Tensor:
    total = torch.zeros(region.size, dtype=torch.float64)
    for line in lines:
        part = common(line[0].box, region)
        for source in line if part is not None else ():
            assert part is not None
            total[part.within(region)] += as_float64(source.read(part))
    return total
