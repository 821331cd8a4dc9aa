"""What a diff found, as text and as JSON: pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from tabulate import tabulate

from parity.judge import Verdict
from parity.offline.compare import multiple
from parity.offline.diff import Judged, Report
from parity.offline.read import Recorded

SCHEMA = 1  # of the JSON document
CHECKS = ("parameter", "forward", "loss", "gradient", "state")
PIECES = ("split", "hole", "overlap")


def text(report: Report, *, verbose: bool = False) -> str:
    parts = [_table(report)]
    if report.wrong:
        parts.append(_failure(report, verbose))
    parts.append("\n".join([*_counts(report), *notes(report)]))
    bad, total = len(report.wrong), len(report.judged)
    names = f"{report.candidate.folder} against {report.baseline.folder}"
    end = f"FAIL  {names}: {bad} of {total} tensors differ" if bad else f"PASS  {names}"
    if report.is_undecided and not bad:
        end = f"UNDECIDED  {names}: of most gradients nothing can be said in this precision"
    return "\n\n".join([*parts, end])


def _table(report: Report) -> str:
    checks = [c for c in CHECKS if any(j.verdict.key.check == c for j in report.judged)]
    rows = []
    for step in report.steps:
        of_step = [j.verdict for j in report.judged if j.step == step]
        word = "PASS" if all(v.good for v in of_step) else "FAIL"
        cells = [_cell([v for v in of_step if v.key.check == check]) for check in checks]
        rows.append([f"step {step}", word, *cells, _replicas(of_step), _closest(of_step)])
    headers = ["", "", *checks, "replicas", "closest to its bound"]
    legend = "cells: the largest relative error; ! = beyond the bound"
    return f"{tabulate(rows, headers, disable_numparse=True)}\n{legend}"


def _cell(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "-"
    bad = any(not v.good for v in verdicts)
    return "! " * bad + f"{max(v.error for v in verdicts):.1e}"


def _replicas(verdicts: Sequence[Verdict]) -> str:
    split = sum(v.status in PIECES for v in verdicts)
    copies = sum(v.copies for v in verdicts)
    return f"! {split} differ" if split else f"{copies} equal" if copies else "-"


def _closest(verdicts: Sequence[Verdict]) -> str:
    worst = max(verdicts, key=lambda v: (not v.good, v.excess))
    return f"{worst.key} {worst.excess:.2g}x"


def _failure(report: Report, verbose: bool) -> str:
    first, *others = report.wrong
    place = report.judged.index(first)
    rest = len(report.judged) - place - 1
    before = f"the {place} tensors before it agree" if place else "it is the first tensor"
    lines = [
        f"FAIL   first divergence: {first.name}",
        f"  {what_is_wrong(first.verdict)}",
        *(f"  {hint}" for hint in first.hints),
        f"  {before}; of the {rest} after it, {len(others)} do not",
    ]
    for j in others if verbose else others[:3]:
        lines.append(f"    {j.name}: {'; '.join([what_is_wrong(j.verdict), *j.hints])}")
    if not verbose and len(others) > 3:
        lines.append(f"    and {len(others) - 3} more: add -v")
    return "\n".join([*lines, f"  again: {command(report)} -v"])


def command(report: Report) -> str:
    moved = [f"--nudged {other.folder}" for other in report.nudged]
    return " ".join(
        ["parity diff", str(report.baseline.folder), str(report.candidate.folder), *moved]
    )


def what_is_wrong(v: Verdict) -> str:
    if v.status not in ("bug", "differs"):
        size = f"; relative error {v.error:.1e}, allowed {v.allowed:.1e}" if v.elements else ""
        return f"{v.status}: {v.text}{size}"
    values = f"got {v.got:.6g}, want {v.want:.6g} at {list(v.place)}; " if v.place else ""
    return (
        f"{v.status}: {values}relative error {v.error:.1e}, allowed {v.allowed:.1e}; "
        f"{v.excess:.2g} times its bound in the worst row"
    )


def _counts(report: Report) -> Iterator[str]:
    seen = [j.verdict for j in report.judged if j.verdict.elements]
    copies = sum(j.verdict.copies for j in report.judged)
    yield (
        f"compared: {len(seen):,} tensors, {sum(v.elements for v in seen):,} elements, "
        f"{len(report.steps)} steps, {copies:,} copies bit by bit, in {report.seconds:.1f} s"
    )
    largest = [
        f"{check} {max(allowed):.1e}"
        for check in CHECKS
        if (allowed := [v.allowed for v in seen if v.key.check == check])
    ]
    yield f"any relative error above these would have been flagged: {', '.join(largest)}"


def notes(report: Report) -> Iterator[str]:
    """How it was judged, and what a green diff does not say."""
    yield from _bounds(report)
    a, b = report.baseline.headers[0], report.candidate.headers[0]
    if a.dtypes != b.dtypes:
        yield (
            f"the baseline is in {', '.join(a.dtypes)}, the candidate in {', '.join(b.dtypes)}: "
            "the baseline is the truth, and a rounding is that of the coarser dtype of each tensor"
        )
    if report.baseline.is_sketch or report.candidate.is_sketch:
        yield "sketches: errors are estimates (give or take 9 percent), of whole tensors, not rows"
    for recorded, other in (
        (report.baseline, report.candidate),
        (report.candidate, report.baseline),
    ):
        yield from _unseen(recorded, other)
    if loose := report.hardly_judged:
        worst = max(loose, key=lambda j: j.verdict.allowed)
        yield (
            f"hardly judged, since rounding alone may move them that far: {len(loose)} tensors, "
            f"such as {worst.name} (a relative error of {worst.verdict.allowed:.1e} would pass)"
        )


def _bounds(report: Report) -> Iterator[str]:
    if n := len(report.nudged):
        yield f"bounds: {multiple(n):,.0f} times the noise that {n} nudged recordings show"
        return
    yield (
        "bounds: half of the digits, which is a guess; measured ones are sharper: record the "
        "baseline 8 times more, with PARITY_NUDGE=1 to 8, and give each by --nudged FOLDER"
    )


def _unseen(recorded: Recorded, other: Recorded) -> Iterator[str]:
    for step, ranks in recorded.unfinished.items():
        yield (
            f"not compared: step {step} of {recorded.folder}, which ranks "
            f"{', '.join(map(str, ranks))} did not record"
        )
    alone = [step for step in recorded.steps if step not in other.steps]
    if alone:
        steps = ", ".join(map(str, alone[:5])) + (", ..." if len(alone) > 5 else "")
        yield f"not compared: steps {steps}, which only {recorded.folder} has"


def as_json(report: Report) -> dict[str, Any]:
    """One object: what was compared, what is wrong, and the notes."""
    seen = [j.verdict for j in report.judged if j.verdict.elements]
    return {
        "schema": SCHEMA,
        "command": command(report),
        "baseline": str(report.baseline.folder),
        "candidate": str(report.candidate.folder),
        "nudged": [str(other.folder) for other in report.nudged],
        "steps": report.steps,
        "compared": {
            "tensors": len(seen),
            "elements": sum(v.elements for v in seen),
            "copies": sum(j.verdict.copies for j in report.judged),
        },
        "checks": {
            check: _check_json([j.verdict for j in report.judged if j.verdict.key.check == check])
            for check in CHECKS
        },
        "wrong": [_wrong_json(j) for j in report.wrong],
        "notes": list(notes(report)),
        "seconds": report.seconds,
        "exit_code": report.exit_code,
    }


def _check_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "tensors": len(verdicts),
        "elements": sum(v.elements for v in verdicts),
        "wrong": sum(not v.good for v in verdicts),
        "error": _number(max((v.error for v in verdicts), default=None)),
        "allowed": _number(max((v.allowed for v in verdicts), default=None)),
    }


def _wrong_json(j: Judged) -> dict[str, Any]:
    v = j.verdict
    return {
        "step": j.step,
        "check": v.key.check,
        "tensor": v.key.name,
        "status": v.status,
        "text": what_is_wrong(v),
        "hints": list(j.hints),
        "error": _number(v.error),
        "allowed": _number(v.allowed),
        "excess": _number(v.excess),
        "place": list(v.place),
    }


def _number(value: float | None) -> float | None:
    """JSON has no infinity and no NaN: null."""
    return value if value is not None and isfinite(value) else None
