"""Which part of a record differs, where no mistake is known that explains it."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import torch

from parity.bounds import norm
from parity.evidence import (
    Evidence,
    Fit,
    part_of,
)
from parity.wording import (
    coordinates_text,
    spans,
)


def some_rows(e: Evidence) -> Iterator[Fit]:
    """Only a few rows differ."""
    if e.want.ndim < 2:
        off = (e.got - e.want).reshape(-1, 1)
    else:
        off = (e.got - e.want).reshape(-1, e.want.shape[-1])
    far = off.square().sum(1).sqrt()
    limit = max(1e-6 * far.max().item(), e.noise / sqrt(len(far)))
    wrong = (far > limit).nonzero().flatten()
    filled = e.want.reshape(off.shape).any(1)
    if len(wrong) and not filled[wrong].any():
        yield Fit(
            "leak", "only rows that should be zero differ: what is masked or padded leaked in"
        )
        return
    if not 0 < 2 * len(wrong) <= int(filled.sum()):  # of rows of zeros nothing can be told
        return
    shape = e.want.shape[:-1] if e.want.ndim > 1 else e.want.shape
    if len(shape) == 1:
        places = spans(wrong.tolist())
    else:
        first = [torch.unravel_index(i, shape) for i in wrong[:3]]
        places = "rows " + ", ".join(str([int(x) for x in place]) for place in first)
        places += ", ..." if len(wrong) > 3 else ""
    columns = (off.abs().amax(0) > 1e-6 * off.abs().max()).nonzero().flatten()
    inside = f", there in {spans(columns.tolist()).replace('row', 'column')}"
    narrow = off.shape[1] > 1 and 2 * len(columns) <= off.shape[1]
    text = f"only {len(wrong)} of {len(far)} rows differ: {places}{inside * narrow}"
    yield Fit("some rows", text)


def by_input(e: Evidence) -> Iterator[Fit]:
    """What a lookup puts out differs for some of the values that it was given, and for no other."""
    if e.given is None or e.given.is_floating_point() or e.given.shape != e.want.shape[:-1]:
        return
    off = (e.got - e.want).square().sum(-1).sqrt()
    wrong = off > max(1e-6 * off.max().item(), e.noise / sqrt(off.numel()))
    values, all_values = e.given[wrong].unique(), e.given.unique()
    if 2 * len(values) <= len(all_values) and wrong[torch.isin(e.given, values)].all():
        which = spans(values.tolist()).removeprefix("rows ").removeprefix("row ")
        yield Fit("by input", f"it differs where the input is {which}, always, and nowhere else")


def some_columns(e: Evidence) -> Iterator[Fit]:
    """In every row, only a few columns differ."""
    if e.want.ndim < 2:
        return
    off = (e.got - e.want).reshape(-1, e.want.shape[-1]).square().sum(0).sqrt()
    limit = max(1e-6 * off.max().item(), e.noise / sqrt(len(off)))
    wrong = (off > limit).nonzero().flatten()
    if 0 < 2 * len(wrong) <= len(off):
        places = spans(wrong.tolist()).replace("row", "column")
        yield Fit("some columns", f"only {places} of {len(off)} differ")


def ranks(e: Evidence) -> Iterator[Fit]:
    """Only the pieces of some ranks differ."""
    wrong = [p.rank for p in e.pieces if norm(p.tensor.double() - part_of(e.want, p)) > e.noise]
    holders = {p.rank for p in e.pieces}
    bad = sorted(set(wrong))
    if not 0 < len(bad) < len(holders):
        return
    text = f"only the pieces of {'rank' if len(bad) == 1 else 'ranks'} {', '.join(map(str, bad))}"
    yield Fit("some ranks", f"{text} differ{coordinates_text(e, bad, holders)}")
