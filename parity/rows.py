"""Mistakes that show in the rows of a record, or in the parts of the batch that made it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from parity.evidence import (
    CLOSE,
    FITS,
    Evidence,
    Fit,
    batch_cuts,
    contributions,
    is_close,
    part_of,
    ratio,
    rows_of,
)
from parity.wording import (
    added_text,
    factor_text,
    mix_text,
    parts_text,
    spans,
    why,
)


def rows_scaled(e: Evidence) -> Iterator[Fit]:
    """Every row along some dimension has a factor of its own; most of them, few factors."""
    for dim in range(e.want.ndim):
        got, want = rows_of(e.got, dim), rows_of(e.want, dim)
        if want.shape[1] < 2:
            continue
        size = want.square().sum(1)
        k = (got * want).sum(1) / size.where(size > 0, 1.0)
        k = torch.where(size > 0, k, 1.0)
        values = k[size > 0].round(decimals=6).unique()
        if len(values) == 1 or len(values) > len(k) // 2:
            continue
        left = e.residual(e.want * k.view([-1 if d == dim else 1 for d in range(e.want.ndim)]))
        texts = []
        for value in values.tolist():
            some = ((k - value).abs() < 2 * CLOSE).nonzero().flatten().tolist()
            if abs(value - 1) > CLOSE:
                name = factor_text(value, e) or f"{value:.6g}"
                times = "zero" if value == 0 else f"{name} times the baseline"
                texts.append(f"{spans(some)} are {times}{why(value, e)}")
        rest = f"; {len(texts) - 3} more factors, as when each part is divided by its own count"
        more = rest if len(texts) > 3 else ""
        yield Fit("rows scaled", f"along dim {dim}, {'; '.join(texts[:3])}{more}", left)
        return


def mixed_rows(e: Evidence) -> Iterator[Fit]:
    """Each part of the batch is made of several parts of the baseline's."""
    if e.key.check not in ("activation", "backward", "forward") or e.want.ndim < 2:
        return
    for count, name in batch_cuts(e):
        got, want = (x.reshape(count, -1, x.shape[-1]) for x in (e.got, e.want))
        if count > 16 or count > got[0].numel() // 4:
            continue
        filled = want.flatten(1).norm(dim=1) > 0
        # Centred, so that a vector which is added to every row alike, a bias, does not matter.
        terms, sums = ((x - x.mean(1, keepdim=True)).flatten(1).T for x in (want[filled], got))
        weights = torch.linalg.lstsq(terms, sums, driver="gelsd").solution.T  # [parts, filled]
        mixed = (weights @ want[filled].flatten(1)).view(want.shape)
        left = e.residual((mixed + (got - mixed).mean((0, 1))).view(e.want.shape))
        k = weights.diagonal().mean().item()
        if is_close(weights, k * torch.eye(*weights.shape, dtype=weights.dtype)):
            if left <= FITS < e.residual(k * e.want) and abs(k - 1) > CLOSE:
                name = factor_text(k, e) or f"{k:.6g}"
                text = f"but for one vector in all rows (a bias) it is {name} times the baseline"
                yield Fit("scaled", text + why(k, e), left)
            return
        said = mix_text(weights, filled.nonzero().flatten().tolist())
        if said and left <= FITS:
            yield Fit("mixed rows", f"of {count} parts of the batch ({name}, from 0), {said}", left)
            return


def pieces_scaled(e: Evidence) -> Iterator[Fit]:
    """Within what a rank holds every row has one factor, but for an element or two."""
    if e.want.ndim < 2 or not e.pieces:
        return
    factors, kept = [], []
    for piece in e.pieces:
        got, want = (rows_of(part_of(x, piece).movedim(-1, 0), 0).T for x in (e.got, e.want))
        some = (want != 0).all(1)
        if want.shape[1] < 4 or not some.any():
            continue
        ratios = got[some] / want[some]
        middle = ratios.median(1, keepdim=True).values
        factors.append(middle.flatten())
        kept.append(((ratios - middle).abs() <= CLOSE * middle.abs()).double().mean(1))
    if not factors:
        return
    all_factors = torch.cat(factors)
    like = torch.cat(kept)
    if like.quantile(0.05) < 0.8:
        return
    if len({piece.offset[-1] for piece in e.pieces}) == 1:
        if (like < 1).double().mean() < 0.3:
            return
        text = "every row is right, or has one factor, but for single elements: another target was "
        yield Fit("picked", f"{text}taken, or an element was picked wrongly")
    elif (all_factors - 1).abs().max() > CLOSE:
        text = (
            "within the piece of each rank every row has a factor of its own, but for single "
            "elements: it was normalised by what the rank itself holds"
        )
        yield Fit("rows scaled", text)


def picked(e: Evidence) -> Iterator[Fit]:
    """Each row differs in two elements, by opposite amounts: another one was meant."""
    if e.want.ndim < 2 or e.want.shape[-1] < 8:
        return
    off = (e.got - e.want).reshape(-1, e.want.shape[-1])
    off = off[off.abs().amax(1) > 0]
    big = off.abs() > 1e-6 * off.abs().amax(1, keepdim=True)
    pairs = (big.sum(1) == 2) & (off.sum(1).abs() < 1e-6 * off.abs().amax(1))
    if len(off) and pairs.double().mean() > 0.4:  # others have lost or won a target altogether
        text = (
            "rows differ in two elements each, by opposite amounts: something that picks an "
            "element (a target, a maximum) is wrong, or has a gradient of its own"
        )
        yield Fit("picked", text)


def parts_of_batch(e: Evidence) -> Iterator[Fit]:
    """A parameter's gradient is a sum over the batch: which of its parts are in it, how often?"""
    if e.slope is None:
        return
    terms = contributions(e)
    for count, name in batch_cuts(e):
        if terms is None or count > terms[0].numel():
            continue
        parts = terms.reshape(count, -1, e.want.numel()).sum(1)  # [count, P]
        counts = parts.norm(dim=1) > CLOSE * parts.norm()  # a part without a target does not
        some = torch.linalg.lstsq(parts[counts].T, e.got.reshape(-1, 1)).solution.flatten()
        if (some - some[0]).abs().max() < CLOSE:
            return  # all alike: that is a factor, or zero
        weights = torch.ones(count, dtype=some.dtype).masked_scatter(counts, some)
        said = parts_text(weights, count, name)
        if said:
            yield Fit("parts", said, e.residual((weights @ parts).view(e.want.shape)))


def same_in_batch(e: Evidence) -> Iterator[Fit]:
    """The difference is the same in all rows of the batch, position by position."""
    if e.want.ndim < 3 or len(e.want) < 2:
        return
    off = (e.got - e.want).mean(0)
    left = e.residual(e.want + off)
    if left > FITS:
        return
    for name, parameter in e.parameters.items():
        rows = parameter[: len(off)]
        if rows.shape == off.shape and (c := ratio(off, rows)) and is_close(c * rows, off):
            yield Fit("bias", added_text(c, name, "sequence", e), left)
            return
    yield Fit("same added", "all sequences differ by the same, position by position", left)
