"""`parity diff`: two recordings, tensor by tensor, in the order in which the baseline made them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parity.bounds import LOOSE, t_quantile
from parity.errors import COULD_NOT_RUN, PARITY_FAILURE, PASSED, UsageError
from parity.evidence import FITS
from parity.judge import Verdict
from parity.offline.boxes import regions
from parity.offline.compare import Bound, assemble, judge, multiple, split_of
from parity.offline.hints import Products, hints
from parity.offline.read import Recorded, Stored, open_recording
from parity.offline.spread import Cut, Spread, cuts, spread
from parity.trace import Key
from parity.whole import Finding, on_one_thread

MOST_HINTS = 12  # tensors that are looked at more closely: what follows the first ones is no news


HARDLY = 0.1  # a relative error that no precision excuses


class Judged(NamedTuple):
    step: int
    verdict: Verdict
    hints: Sequence[str] = ()

    @property
    def name(self) -> str:
        return f"step {self.step}, {self.verdict.key}"


@dataclass(frozen=True)
class Report:
    """Everything that two recordings say about each other."""

    baseline: Recorded
    candidate: Recorded
    nudged: Sequence[Recorded]
    judged: Sequence[Judged]  # in program order
    seconds: float

    @property
    def wrong(self) -> list[Judged]:
        return [j for j in self.judged if not j.verdict.good]

    @property
    def steps(self) -> list[int]:
        return list(dict.fromkeys(j.step for j in self.judged))

    @property
    def hardly_judged(self) -> list[Judged]:
        """Those that rounding alone may move so far that little would be noticed."""
        is_sharp = self.nudged and self.baseline.headers[0].dtypes == ["float64"]
        return [j for j in self.judged if j.verdict.allowed > (LOOSE if is_sharp else HARDLY)]

    @property
    def is_undecided(self) -> bool:
        """Of most gradients nothing can be said: that is no agreement."""
        gradients = [j for j in self.judged if j.verdict.key.check == "gradient"]
        loose = [j for j in self.hardly_judged if j.verdict.key.check == "gradient"]
        return 2 * len(loose) > len(gradients)

    @property
    def exit_code(self) -> int:
        if self.wrong:
            return PARITY_FAILURE
        return COULD_NOT_RUN if self.is_undecided else PASSED


@on_one_thread
def diff(baseline: Path, candidate: Path, nudged: Sequence[Path] = ()) -> Report:
    """Raises UsageError for folders that cannot be compared, and where nothing was compared."""
    start = time.perf_counter()
    if baseline.resolve() == candidate.resolve():
        raise UsageError(f"{baseline}: compared with itself; expected two recordings; give another")
    a, b = open_recording(baseline), open_recording(candidate)
    others = [open_recording(folder) for folder in nudged]
    if objections := list(_objections(a, b, others)):
        raise UsageError(*objections)
    comparison = Comparison(a, b, others)
    judged = [j for step in a.steps if step in b.steps for j in comparison.step(step)]
    if not any(j.verdict.elements for j in judged) and not any(
        j.verdict.status not in ("missing", "extra") for j in judged
    ):
        raise UsageError(_nothing(a, b, judged))
    return Report(a, b, others, judged, time.perf_counter() - start)


def _objections(a: Recorded, b: Recorded, nudged: Sequence[Recorded]) -> Iterator[str]:
    for recorded, name in ((a, "baseline"), (b, "candidate")):
        if number := recorded.headers[0].nudge:
            yield (
                f"{recorded.folder}: the {name} was recorded with nudge {number}; expected one "
                "that was not moved; record it without PARITY_NUDGE, or give it by --nudged"
            )
    seen: dict[int, Path] = {}
    for other in nudged:
        number = other.headers[0].nudge
        if not number:
            yield (
                f"--nudged {other.folder}: it was recorded with nudge 0; expected a recording of "
                "the baseline that was moved; record it with PARITY_NUDGE=1 (and 2, 3, ...)"
            )
        elif number in seen:
            yield (
                f"--nudged {other.folder}: nudge {number}, as {seen[number]}; expected another "
                f"number for each; record it with PARITY_NUDGE={max(seen) + 1}"
            )
        seen.setdefault(number, other.folder)
    if nudged and (len(nudged) < 4 or len(nudged) % 2):
        yield (
            f"--nudged: {len(nudged)} recordings; expected an even number, 4 or more (with 4 the "
            f"bound is {t_quantile(1e-12, 4):,.0f} times the noise, with 8 "
            f"{t_quantile(1e-12, 8):.0f} times); record more, with PARITY_NUDGE="
            f"{max(seen) + 1} and so on"
        )


def _nothing(a: Recorded, b: Recorded, judged: Sequence[Judged]) -> str:
    if not judged:
        return (
            f"nothing was compared: {a.folder} has steps {_some(a.steps)}, {b.folder} steps "
            f"{_some(b.steps)}; expected steps that both have; record the same ones (steps=)"
        )
    missing = [j.verdict.key.name for j in judged if j.verdict.status == "missing"]
    extra = [j.verdict.key.name for j in judged if j.verdict.status == "extra"]
    return (
        f"nothing was compared: no tensor has the same name in both. {a.folder} has "
        f"{_some(missing)}; {b.folder} has {_some(extra)}; expected the same names; give "
        "parity.record a `rename`"
    )


def _some(items: Iterable[object]) -> str:
    listed = list(map(str, items))
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") or "none"


class Comparison:
    """The steps of two recordings. What was found about places in one step serves the next."""

    def __init__(self, a: Recorded, b: Recorded, nudged: Sequence[Recorded]) -> None:
        self.a, self.b, self.nudged = a, b, nudged
        self.multiple = multiple(len(nudged))
        self._cuts: dict[str, Cut] = {}  # by parameter
        self._hinted = 0

    def step(self, step: int) -> Iterator[Judged]:
        want, got = self.a.pieces(step), self.b.pieces(step)
        moved = [_moved(other, step, want) for other in self.nudged]
        keys = sorted(want, key=lambda key: key[0] != "parameter")  # else as they were recorded
        largest: dict[str, float] = {}
        for key, pieces in want.items():
            norms = [p.about.norm or 0.0 for p in pieces]
            largest[_kind(key)] = max(largest.get(_kind(key), 0.0), *norms)
        for key in keys:
            if key not in got:
                text = f"the candidate did not record it; the baseline has {_shape(want[key])}"
                yield Judged(step, Verdict(Key(*key), "missing", text))
                continue
            bound = Bound(self.multiple, largest[_kind(key)])
            yield self._judge(step, key, want[key], got[key], [m[key] for m in moved], bound)
        for key, pieces in got.items():
            if key not in want:
                text = f"the baseline did not record it; the candidate has {_shape(pieces)}"
                yield Judged(step, Verdict(Key(*key), "extra", text))

    def _judge(
        self,
        step: int,
        key: tuple[str, str],
        want: Sequence[Stored],
        got: Sequence[Stored],
        moved: Sequence[Sequence[Stored]],
        bound: Bound,
    ) -> Judged:
        truth = spread(want, self.a)
        if truth.findings:
            finding = truth.findings[0]
            text = f"of the baseline itself: {finding.text}; record it on one process, or with a "
            return Judged(step, Verdict(Key(*key), finding.status, f"{text}layout"))
        if said := split_of(truth):
            text = f"of the baseline itself: {said}; where these are parts, record it with a layout"
            return Judged(step, Verdict(Key(*key), "split", text))
        mine = self._place(key, truth, got)
        noise = [spread(pieces, other) for pieces, other in zip(moved, self.nudged, strict=True)]
        verdict = judge(Key(*key), truth, mine, noise, bound)
        if verdict.good or self._hinted >= MOST_HINTS:
            return Judged(step, verdict)
        self._hinted += 1
        return Judged(step, verdict, [*hints(verdict, truth, mine), *_advice(verdict)])

    def _place(self, key: tuple[str, str], want: Spread, got: Sequence[Stored]) -> Spread:
        """With the place that was recorded, or else the one that fits the shapes, and the values
        if several do.
        """
        first = got[0].about
        if first.offset is not None or first.cut is not None:
            return spread(got, self.b)
        check, name = key
        owner = name if check == "forward" else name.split(" ")[-1]
        ways = cuts(got, want.shape, self.b)
        if len(ways) < 2:
            mine = spread(got, self.b, ways[0] if ways else {})
            return mine if ways else mine._replace(findings=[_no_way(got, want)])
        if (known := self._cuts.get(owner)) in ways:
            return spread(got, self.b, known)
        near = [way for way in ways if _are_near(want, spread(got, self.b, way))]
        if len(near) == 1:
            self._cuts[owner] = near[0]
        if near:
            return spread(got, self.b, near[0])
        mine = spread(got, self.b, ways[0])
        return mine._replace(findings=[_ambiguous(owner, ways)], is_whole=False)


def _moved(
    other: Recorded, step: int, want: Mapping[tuple[str, str], object]
) -> Mapping[tuple[str, str], Sequence[Stored]]:
    """The step of a nudged recording, which has what the baseline has."""
    pieces = other.pieces(step) if step in other.steps else {}
    if pieces.keys() != want.keys():
        raise UsageError(
            f"--nudged {other.folder}: it does not have what the baseline has of step {step}; "
            "expected recordings of one and the same program; record it anew"
        )
    return pieces


def _kind(key: tuple[str, str]) -> str:
    """Tensors of one kind are of sizes that can be compared: squared gradients are not."""
    check, name = key
    return f"{check} {name.rpartition(' of ')[0] if check == 'state' else ''}"


def _shape(pieces: Sequence[Stored]) -> str:
    about = pieces[0].about
    return str(tuple(about.shape if about.shape is not None else about.size))


def _are_near(want: Spread, got: Spread) -> bool:
    """Whether all copies are the baseline, but for what rounding could explain in any dtype."""
    if got.findings or got.shape != want.shape:
        return False
    for copy in range(max(len(copies) for copies in got.boxes)):
        one = got._replace(boxes=[[copies[min(copy, len(copies) - 1)]] for copies in got.boxes])
        products = Products()
        for region in regions(want.shape):
            products = products.add(assemble(one, region).double(), assemble(want, region).double())
        if products.left(1.0) ** 2 > FITS * products.yy:
            return False
    return True


def _no_way(got: Sequence[Stored], want: Spread) -> Finding:
    said = ", ".join(f"rank {p.rank} {tuple(p.about.size)}" for p in got[:4])
    more = ", ..." if len(got) > 4 else ""
    text = (
        f"along no axis do its pieces add up to the baseline's {want.shape}: {said}{more}; if it "
        "is packed in another way, give `layout` what parity.held finds"
    )
    return Finding("shape", text)


def _ambiguous(owner: str, ways: Sequence[Cut]) -> Finding:
    said = [
        "{" + ", ".join(f"{dim}: {_axes(axes)}" for dim, axes in way.items()) + "}" for way in ways
    ]
    text = (
        f"how it is cut is not known, shapes allow {' or '.join(said)}, and by none of these is it "
        f'the baseline: add to parity.record layout={{"{owner}": {said[0]}}}, or what is true'
    )
    return Finding("place", text)


def _axes(axes: Sequence[str]) -> str:
    quoted = [f'"{axis}"' for axis in axes]
    return quoted[0] if len(quoted) == 1 else f"({', '.join(quoted)})"


def _advice(verdict: Verdict) -> Iterator[str]:
    if verdict.status == "split" and verdict.key.check == "loss":
        yield (
            'if each rank has the loss of its own part of the batch: recorder.loss(loss, mean="dp")'
        )
