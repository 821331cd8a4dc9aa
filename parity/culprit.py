"""The first record that differs, in words: which piece of the program made it, and by what mistake.

Records are judged in program order, so what stands before the first that differs is sound: it is
made from right inputs, by the code between the last right record and itself.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from parity.backend import Entry
from parity.bounds import ALLOWED, Expected, as_float64, norm
from parity.case import Case, Run
from parity.diagnose import PARTS, diagnose, is_like
from parity.evidence import Evidence, Fit, part_of
from parity.judge import Verdict
from parity.ledger import short
from parity.modules import MODEL
from parity.trace import DETAILS, Key, Piece, Recording
from parity.whole import Whole

PART_NAMES = {part.__name__ for part in PARTS}


class PieceError(NamedTuple):
    """What one rank holds of the record, and how far it is off, relative to what it should be."""

    rank: int
    at: Mapping[str, int]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    error: float


class Culprit(NamedTuple):
    """`names` are the records of the one tensor, `alike` the others of its check in which the same
    mistake is seen, `nearby` the verdicts around it in program order, itself among them. `backward`
    are those of the same piece of the program that a mistake in its forward may be all there is to.
    """

    run: Run
    verdict: Verdict
    where: str
    fits: list[Fit]
    hint: str
    names: list[Key]
    alike: list[Key]
    pieces: list[PieceError]
    nearby: list[Verdict]
    backward: Sequence[Culprit] = ()


def find(
    run: Run,
    verdicts: Sequence[Verdict],
    verdict: Verdict,
    recording: Recording,
    wholes: Mapping[Key, Whole],
    expected: Mapping[Key, Expected],
    known: Container[Key] = (),
) -> Culprit:
    """Everything that can be said about `verdict`, the first of `verdicts` that is bad and not
    `known`.
    """
    good = {v.key for v in verdicts if v.good}
    names, verdict = innermost(verdict, verdicts, good)
    key, place = verdict.key, verdicts.index(verdict)
    evidence = gather(run, key, recording, wholes, expected)
    bad = [v for v in verdicts if not v.good and v.key.check == key.check]
    bad = [v for v in bad if v.key not in names and v.key not in known]
    if verdict.status in ("hole", "overlap", "shape", "dtype", "missing", "nan"):
        fits, alike = [Fit(verdict.status, verdict.text)], []
    elif verdict.status == "drift":
        fits = [imprecision(verdict, run.dtype)]
        alike = [v.key for v in bad if v.status == "drift"]
    else:
        said = [Fit(verdict.status, verdict.text)] * bool(verdict.text)
        fits = diagnose(evidence) if evidence is not None else said
        if not any(fit.by not in PART_NAMES for fit in fits):
            fits += fused(key, verdicts[:place], recording)
        others = {v.key: gather(run, v.key, recording, wholes, expected) for v in bad if fits}
        alike = [k for k, e in others.items() if e is not None and is_like(e, fits[0])]
    return Culprit(
        run,
        verdict,
        where(key, good),
        fits,
        hint(fits, key, run.case, [entry for each in recording.ledgers for entry in each]),
        names,
        alike,
        [] if evidence is None else [_piece_error(p, evidence) for p in evidence.pieces],
        list(verdicts[max(0, place - 3) : place + 4]),
    )


def innermost(
    verdict: Verdict, verdicts: Sequence[Verdict], good: set[Key]
) -> tuple[list[Key], Verdict]:
    """A tensor has as many names as modules pass it on: all of them, and the verdict by the one
    that the module to blame has for it.
    """
    names, chosen = [verdict.key], verdict
    if verdict.key.check not in DETAILS:
        return names, chosen
    for other in verdicts[verdicts.index(verdict) + 1 :]:
        side, _, path = other.key.name.partition(" of ")
        if other.key.check != verdict.key.check or other.error != verdict.error:
            break
        names.append(other.key)
        agrees = Key("backward", f"output of {path}") in good
        if side == "input" and agrees and other.key.check == "backward":
            chosen = other
    return names, chosen


def gather(
    run: Run,
    key: Key,
    recording: Recording,
    wholes: Mapping[Key, Whole],
    expected: Mapping[Key, Expected],
) -> Evidence | None:
    """None where there is nothing to compare: one side has no such tensor, or not of that shape."""
    whole = wholes.get(key)
    if whole is None or whole.tensor is None or key not in expected:
        return None
    want = expected[key].truth
    if as_float64(whole.tensor).shape != want.shape:
        return None
    pieces = recording.pieces(key)
    numbers = {k: v for k, v in run.options.items() if type(v) is int}
    return Evidence(
        key,
        worst(as_float64(whole.tensor), pieces, want),
        want,
        ALLOWED * expected[key].total,
        pieces,
        coordinates(run.case, recording),
        run.case.axes,
        numbers,
        {k.name: e.truth for k, e in expected.items() if k.check == "parameter"},
        [
            (e.truth, recording.pieces(k))
            for k, e in expected.items()
            if key.check == "norm" and k.check == "gradient" and k in recording.keys
        ],
        {k.name: e.truth for k, e in expected.items() if k.check == key.check and k != key},
        *flow(key, expected),
    )


def flow(key: Key, expected: Mapping[Key, Expected]) -> tuple[Tensor | None, Tensor | None]:
    """Of a parameter's gradient: that of what its module puts out, and what the module takes in;
    of what a module puts out, the latter.
    """
    path = key.name.rpartition(".")[0] if key.check == "gradient" else key.name.partition(" of ")[2]
    slope = expected.get(Key("backward", f"output of {path}"))
    given = expected.get(Key("activation", f"input of {path}"))
    inner = None if given is None else given.truth if is_real(given.exact) else given.exact
    if key.check == "gradient":
        return slope and slope.truth, inner
    return None, inner if key.name.startswith("output of ") else None


def is_real(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def worst(whole: Tensor, pieces: Sequence[Piece], want: Tensor) -> Tensor:
    """Of copies that differ, the one that is furthest off: that of the lowest rank may be right."""
    if sum(piece.tensor.numel() for piece in pieces) == whole.numel():
        return whole
    whole, far = whole.clone(), dict[tuple[tuple[int, ...], ...], float]()
    for piece in pieces:
        box, tensor = (piece.offset, tuple(piece.tensor.shape)), as_float64(piece.tensor)
        off = norm(tensor - part_of(want, piece))
        if off > far.get(box, -1.0):
            far[box] = off
            part_of(whole, piece).copy_(tensor)
    return whole


def fused(key: Key, before: Sequence[Verdict], recording: Recording) -> list[Fit]:
    """What a cut of the record before may have to do with it: a conjecture, not a proof."""
    if key.check != "activation" or not key.name.startswith("input of ") or not before:
        return []
    last = before[-1].key
    (width, *_), (wanted, *_) = ({s[-1] for s in recording.shapes(k)} for k in (last, key))
    boxes = {(p.rank, p.offset[-1]) for p in recording.pieces(last)}
    starts = {start for _, start in boxes}
    if width <= wanted or len(starts) < 2 or len(boxes) > len({rank for rank, _ in boxes}):
        return []
    text = (
        f"{last.name.partition(' of ')[2]} before it is cut in one piece per rank: if several "
        "projections are fused in it (q, k, v; gate, up), each of them is to be cut by itself"
    )
    return [Fit("fused", text)]


def coordinates(case: Case, recording: Recording) -> Sequence[Mapping[str, int]]:
    """Of every rank, by its own word; where only one axis is cut, there is no need to be told."""
    told = [recording.at(rank) for rank in range(case.world)]
    cut = [axis for axis, size in case.axes.items() if size > 1]
    if len(cut) == 1 and not any(told):
        return [{**dict.fromkeys(case.axes, 0), cut[0]: rank} for rank in range(case.world)]
    return told if all(told) else []


def where(key: Key, good: set[Key]) -> str:
    """Which part of the program is between the last right record and this one."""
    side, _, path = key.name.partition(" of ")
    match key.check, side:
        case "parameter", _:
            return "the parameter differs before the first step: it was loaded or cut wrongly"
        case "activation", "input" if path == MODEL:
            return "what the model is given: the data, or their share"
        case "activation", "output":
            return f"module {path}: what it takes in agrees, what it puts out does not"
        case "activation", "input":
            return f"the code that calls module {path}: everything before agrees, its input differs"
        case "backward", "input" if Key("backward", f"output of {path}") in good:
            return (
                f"the backward of module {path}: the gradient of what it puts out agrees, of what "
                "it takes in does not"
            )
        case "backward", _ if path == MODEL:
            return "the loss: the gradient of the logits is the first to differ"
        case "forward", _ if key.name.startswith("step "):
            return (
                f"{key.name.partition(' of ')[0]}: parameters are compared after the first and the "
                "last step only; a step before this one may be wrong"
            )
        case "backward", _:
            return (
                f"the code behind module {path}: the gradient of its {side} is the first to differ"
            )
    return _WHERE.get(key.check, "").format(name=key.name)


_WHERE = {
    "forward": "the last part of the forward",
    "gradient": "the gradient of {name} itself: that of every activation recorded agrees",
    "norm": "the gradient norm: the gradients that it is made of agree",
    "state": "the optimizer's step: gradients and norms agree",
    "loss": "the loss: everything else agrees",
}


def hint(fits: Sequence[Fit], key: Key, case: Case, entries: Sequence[Entry]) -> str:
    """Where the reduction that is missing here is to be found elsewhere in the program."""
    axis = next((fit.axis for fit in fits if fit.axis), "")
    if not axis or not entries:
        return ""
    # Where an axis is the whole world, a mesh takes the group that is there already.
    names = {axis, "world"} if case.axes[axis] == case.world else {axis}
    over = [e for e in entries if e.group in names]
    if not over:
        return f"its ranks say nothing to each other over {axis} in the whole run"
    module = key.name.partition(" of ")[2] or key.name.rpartition(".")[0]
    leaf = module.rpartition(".")[2]
    phase = "forward" if key.check in ("activation", "forward") else "backward"
    like = [e for e in over if e.module.rpartition(".")[2] == leaf and e.module != module]
    same = [e for e in over if e.phase == phase]
    found = [e for e in like if e.phase == phase] or like or same or over
    e = found[-1]
    inside = f" in {e.module}" if e.module else ""
    return f"elsewhere there is one over {axis}: {e.op}{inside} ({e.phase}), at {short(e.site)}"


def imprecision(verdict: Verdict, dtype: str) -> Fit:
    """Of a drift there is one thing to be said, and all that drifts in a check drifts by it."""
    text = (
        f"the right function, computed less precisely: {verdict.rho:.3g} times the rounding of "
        f"{dtype}: look for a cast, or a sum kept in a shorter type"
    )
    return Fit("drift", text)


def _piece_error(piece: Piece, e: Evidence) -> PieceError:
    want = part_of(e.want, piece)
    size = norm(want) or norm(e.want) or 1.0
    error = norm(as_float64(piece.tensor) - want) / size if want.numel() else 0.0
    at = e.at[piece.rank] if e.at else {}
    return PieceError(piece.rank, at, piece.offset, tuple(piece.tensor.shape), error)


def pattern(key: Key) -> str:
    """`output of blocks.*.mlp.down`: the same record of all layers of a kind. Other digits are part
    of a name, as in `ln_1`, and the children of one module are not of a kind.
    """
    start, of, path = key.name.rpartition(" of ")
    path, dot, leaf = path.rpartition(".") if key.check not in DETAILS else (path, "", "")
    return start + of + re.sub(r"(?<![^.])\d+(?=\.)", "*", path) + dot + leaf
