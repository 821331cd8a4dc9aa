"""What a record would be by this mistake or that: one function for each, Evidence -> Fits.

Most compute what the mistake would have given; the residual is how far that is from what was got,
in units of the difference: 0 explains everything, 1 nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch

from parity.evidence import (
    CLOSE,
    Evidence,
    Fit,
    box_of,
    held_twice,
    is_close,
    known_vector,
    nearest,
    norm_on,
    norm_with_copies,
    norms_added,
    part_of,
    ratio,
    rows_of,
    same_in_rows,
    source_rows,
    sum_over,
)
from parity.trace import Piece
from parity.wording import (
    added_text,
    factor_text,
    move_text,
    why,
)

_MOST_ELEMENTS = 1 << 22  # values are looked up among so many
_FEW = 8  # elements, which chance may make a multiple of others
_MOST_ROWS = 4096  # rows in another order are looked for among so many


def zero(e: Evidence) -> Iterator[Fit]:
    if not e.got.any() and e.want.any():
        yield Fit("zero", "it is zero everywhere: never computed, or cleared too late")


def unreduced(e: Evidence) -> Iterator[Fit]:
    """What the ranks along an axis hold, together, is the baseline."""
    axes = [axis for axis, size in e.axes.items() if size > 1]
    for some in [*combinations(axes, 1), *combinations(axes, 2)]:
        total, count = sum_over(e, some)
        if total is None or is_close(total, count * e.got):  # they hold the same, nearly
            continue
        k, name = ratio(total, e.want), " and ".join(some)
        if vector := same_in_rows(total - e.want, e):
            text = f"the sum over {name} of what the ranks hold equals the baseline, but for "
            yield Fit(
                "not reduced",
                f"{text}{vector}: a sum over {name} (an all-reduce) is missing",
                0.0,
                some[0],
            )
        elif abs(k - count) < CLOSE:
            text = f"the mean over {name} of what the ranks hold equals the baseline"
            yield Fit(
                "not averaged",
                f"{text}: an average over {name} is missing",
                e.residual(e.want, total / count),
                some[0],
            )
        elif factor := factor_text(k, e):
            times = "" if abs(k - 1) < CLOSE else f"{factor} times "
            text = f"the sum over {name} of what the ranks hold equals {times}the baseline"
            yield Fit(
                "not reduced",
                f"{text}: a sum over {name} (an all-reduce) is missing",
                e.residual(k * e.want, total),
                some[0],
            )


def untied(e: Evidence) -> Iterator[Fit]:
    """Of the copies that a rank holds, each has a part of the gradient."""
    twice = held_twice(e)
    if twice and all(
        is_close(torch.stack(copies).sum(0), box_of(e.want, *box))
        for (_, box), copies in twice.items()
    ):
        text = "copies of it on one rank add up to the baseline: a tied weight that is tied no more"
        yield Fit("untied", text)


def last_bits(e: Evidence) -> Iterator[Fit]:
    """Copies that are right, and not equal."""
    text = (
        "all copies are right but for rounding: ranks add in different orders, as when they "
        "reduce equal tensors in unequal buffers"
    )
    yield Fit("rounding", text)


def scaled(e: Evidence) -> Iterator[Fit]:
    k = ratio(e.got, e.want)
    if not k or abs(k - 1) < CLOSE:
        return
    name = factor_text(k, e)
    if not name and e.got.numel() == 1:
        return  # one number is always some multiple of another
    name = name or f"{k:.6g}"
    yield Fit("scaled", f"it is {name} times the baseline{why(k, e)}", e.residual(k * e.want))


def unchanged(e: Evidence) -> Iterator[Fit]:
    if e.before is not None:
        text = "it is what it was before the step: never updated"
        yield Fit("stale", text, e.residual(e.before))


def step_scaled(e: Evidence) -> Iterator[Fit]:
    if e.before is None:
        return
    k = ratio(e.got - e.before, e.want - e.before)
    if k and abs(k - 1) >= CLOSE:
        name = factor_text(k, e) or f"{k:.6g}"
        text = f"its step is {name} times the baseline's: learning rate, clipping, or the gradient"
        yield Fit("step scaled", text, e.residual(e.before + k * (e.want - e.before)))


def decayed(e: Evidence) -> Iterator[Fit]:
    if e.own is None:
        return
    c = ratio(e.got - e.want, e.own)
    if c:
        how = "too little" if c > 0 else "too much"
        text = f"it differs by {c:+.3g} times the parameter itself: decayed {how}"
        if e.before is None:
            text = f"it differs by {c:+.3g} times the parameter itself: decay got into the moments"
        yield Fit("decay", text, e.residual(e.want + c * e.own))


def late(e: Evidence) -> Iterator[Fit]:
    """A value per step, each of the step before."""
    if e.got.ndim == 1 and len(e.got) > 2 and e.key.name.endswith("by step"):
        expected = torch.cat([e.got[:1], e.want[:-1]])
        yield Fit("stale", "each step has the value of the step before", e.residual(expected))


def carried_over(e: Evidence) -> Iterator[Fit]:
    """A value per step: the first ones are right."""
    if e.key.name.endswith("by step") and e.got.ndim == 1:
        wrong = ((e.got - e.want).abs() > CLOSE * 1e-3 * e.want.abs()).nonzero().flatten()
        if len(wrong) and (first := int(wrong[0])):
            said = "step 1 is" if first == 1 else f"steps 1 to {first} are"
            text = f"{said} right, and from step {first + 1} on it differs: something is carried "
            yield Fit("carried over", f"{text}over (gradients not cleared, a value kept)")


def transposed(e: Evidence) -> Iterator[Fit]:
    if e.want.ndim == 2 and min(e.want.shape) > 1:
        turned = e.want.T.reshape(e.want.shape)
        yield Fit("transposed", "it is the baseline's transpose", e.residual(turned))


def moved(e: Evidence) -> Iterator[Fit]:
    """Every row of some dimension is a row of the baseline, but of another place."""
    for dim in range(e.want.ndim):
        n = e.want.shape[dim]
        if not 1 < n <= _MOST_ROWS:
            continue
        source = source_rows(rows_of(e.got, dim), rows_of(e.want, dim))
        if torch.equal(source, torch.arange(n)):
            continue
        kind, text = move_text(source, dim)
        yield Fit(kind, text, e.residual(e.want.index_select(dim, source)))


def rounded(e: Evidence) -> Iterator[Fit]:
    """In float64 one rounding to float32 stands out."""
    size = e.want.abs()
    off = ((e.got - e.want).abs() / size)[size > 0]
    # Rounding goes up as often as down; what a small constant does goes one way.
    change = ((e.got - e.want) * e.want)[size > 0]
    up = (change > 0).double().mean().item()
    if off.numel() and 1e-9 < off.median() < 3e-7 and (off.numel() < 8 or 0.25 < up < 0.75):
        text = "its error is that of float32: it was computed in it, or went through it"
        yield Fit("rounded", text)


def of_others(e: Evidence) -> Iterator[Fit]:
    """Its elements are those of other records: looked up one by one."""
    known = sum(other.numel() for other in e.others.values())
    if not 0 < known <= _MOST_ELEMENTS or any(another(e)):
        return
    names = list(e.others)
    pool = torch.cat([e.others[name].reshape(-1) for name in names])
    sizes = torch.tensor([e.others[name].numel() for name in names])
    owner = torch.repeat_interleave(torch.arange(len(names)), sizes)
    ordered, places = pool.sort()
    wrong = e.got[(e.got - e.want).abs() > CLOSE * e.want.abs()]
    near = nearest(ordered, wrong)
    found = ((ordered[near] - wrong).abs() <= 1e-9 * wrong.abs()) & (wrong != 0)
    if not len(wrong) or found.sum() < 0.9 * (wrong != 0).sum() or found.sum() < 8:
        return
    counts = torch.bincount(owner[places[near[found]]], minlength=len(names))
    top = [names[i] for i in counts.argsort(descending=True)[:3] if counts[i]]
    yield Fit("another's", f"what it holds belongs to {', '.join(top)}")


def another(e: Evidence) -> Iterator[Fit]:
    """It is what another record of its check should be."""
    for name, other in e.others.items():
        if other.shape == e.got.shape and is_close(other, e.got):
            yield Fit("another's", f"it is what {name} should be", e.residual(other), of=name)
            return


def another_added(e: Evidence) -> Iterator[Fit]:
    """The difference is some multiple of what another record should be."""
    off = e.got - e.want
    for name, other in e.others.items():
        if other.shape != off.shape or not (c := ratio(off, other)):
            continue
        if is_close(other, e.want):  # its own value, under another name: that is a factor
            continue
        # Of a few elements anything is a multiple; and what a step adds is one of the gradient.
        is_sum = e.key.check in ("activation", "backward", "forward")
        if abs(c - round(c)) >= CLOSE and (other.numel() < _FEW or not is_sum):
            continue
        if abs(c) > CLOSE and is_close(c * other, off):
            times = "" if abs(abs(c) - 1) < CLOSE else f"{abs(c):.6g} times "
            what = f"{times}what {name} is"
            text = f"it has {what} too much" if c > 0 else f"it lacks {what}"
            yield Fit("another's", text, of=name)
            return


def shards_added(e: Evidence) -> Iterator[Fit]:
    """Different shards, of one shape, were added up as if they were terms of a sum."""
    for axis, size in e.axes.items():
        lines: dict[tuple[int, ...], list[Piece]] = {}
        for piece in e.pieces if e.at and size > 1 else ():
            rest = tuple(v for k, v in e.at[piece.rank].items() if k != axis)
            lines.setdefault(rest, []).append(piece)
        for pieces in lines.values():
            shapes = {tuple(piece.tensor.shape) for piece in pieces}
            if len({p.offset for p in pieces}) != size or len(pieces) != size or len(shapes) != 1:
                break
            total = torch.stack([part_of(e.want, piece) for piece in pieces]).sum(0)
            if not all(is_close(piece.tensor.double(), total) for piece in pieces):
                break
        else:
            if lines:
                text = f"every rank of {axis} holds the sum of all their shards: what is cut over "
                yield Fit("shards added", f"{text}{axis} was reduced over it")


def same_added(e: Evidence) -> Iterator[Fit]:
    """The difference is one vector, in every row."""
    if e.want.ndim < 2 or e.want.shape[-1] < 2 or e.want.numel() == e.want.shape[-1]:
        return
    vector = (e.got - e.want).reshape(-1, e.want.shape[-1]).mean(0)
    left = e.residual(e.want + vector)
    c, name = known_vector(vector, e)
    if not name:
        yield Fit("same added", "every row differs by the same vector, as by a bias", left)
        return
    yield Fit("bias", added_text(c, name, "row", e), left)


def miscounted(e: Evidence) -> Iterator[Fit]:
    """A norm, of the gradients as they lie on the ranks: what was counted, and how often."""
    if e.key.check != "norm" or e.got.ndim != 1 or not e.gradients or not e.at:
        return
    for axis, size in e.axes.items():
        if size == 1:
            continue
        if is_close(norm_with_copies(e, axis), e.got[0]):
            text = f"parameters that the ranks of {axis} all hold are counted once per rank"
            yield Fit("counted often", text, 0.0, "")
        if any(is_close(norms_added(e, axis, once), e.got[0]) for once in (True, False)):
            text = f"the norms of the places along {axis} are added, and not their squares"
            yield Fit("norms added", text)
        for piece in e.pieces:
            own = {rank for rank, at in enumerate(e.at) if at[axis] == e.at[piece.rank][axis]}
            value = piece.tensor.double()[0]
            if not is_close(value, e.want[0]) and is_close(norm_on(e, own), value):
                text = f"each rank's norm is that of its own place along {axis}: a sum is missing"
                yield Fit("not reduced", text, 0.0, axis)
                break
