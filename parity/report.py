"""Results to text and JSON: pure functions, so that every word of them can be pinned by a test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tabulate import tabulate

from parity import explain, ledger
from parity.bounds import LOOSE
from parity.errors import COULD_NOT_RUN, PARITY_FAILURE, PASSED, USAGE
from parity.judge import LOGIC, Verdict
from parity.plan import Plan
from parity.run import Judged, Result
from parity.trace import CHECKS

if TYPE_CHECKING:
    from parity.matrix_file import Skip

PIECES = ("split", "hole", "overlap")


class Cell(NamedTuple):
    """One check of one case: the worst over its tensors, variants and baselines."""

    error: float | None  # float64: relative; None where the check was not made
    allowed: float | None  # the largest bound in force: any larger error would have been flagged
    rho: float | None  # working dtype: in units of the baseline's own rounding
    worst: Verdict | None
    bad: int
    tensors: int
    elements: int


@dataclass(frozen=True)
class Report:
    """Everything that a run of a matrix found."""

    plan: Plan
    command: str  # what to type to run the matrix again, without --case
    results: Sequence[Result]
    skipped: Sequence[Skip]
    seconds: float
    baseline_seconds: float

    @property
    def explain(self) -> str:
        return self.command.replace("parity run", "parity explain", 1)

    @property
    def compared(self) -> tuple[int, int]:
        """(tensors, elements), of all cases."""
        counts = [result.compared for result in self.results]
        return sum(tensors for tensors, _ in counts), sum(elements for _, elements in counts)

    @property
    def exit_code(self) -> int:
        """A wrong result outranks one that could not be had; and nothing compared is no success."""
        statuses = {result.status for result in self.results}
        if "fail" in statuses:
            return PARITY_FAILURE
        if "error" in statuses:
            return COULD_NOT_RUN
        return PASSED if self.compared[0] else USAGE


def cell(judged: Iterable[Judged], check: str) -> Cell:
    rows = [(j, v) for j in judged for v in j.verdicts if v.key.check == check]
    logic = [v for j, v in rows if j.run.dtype == LOGIC]
    working = [v for j, v in rows if j.run.dtype != LOGIC]
    return Cell(
        error=max((v.error for v in logic), default=None),
        allowed=max((v.allowed for v in logic), default=None),
        rho=max((v.rho for v in working), default=None),
        worst=max((v for _, v in rows), key=lambda v: (not v.good, v.excess), default=None),
        bad=sum(not v.good for _, v in rows),
        tensors=len(rows),
        elements=sum(v.elements for _, v in rows),
    )


def one_line(result: Result) -> str:
    """A finished case, as it is printed while the matrix runs."""
    tail = ""
    if result.status == "error":
        tail = "  " + result.error.splitlines()[0]
    elif (first := result.first_divergence) is not None:
        tail = f"  first divergence: {first[1].key}"
    return f"{_WORD[result.status]}  {result.case.id:<14} {result.seconds:6.1f} s{tail}"


_WORD = {"pass": "PASS", "fail": "FAIL", "error": "ERROR"}


def text(report: Report, *, verbose: bool = False) -> str:
    """The whole report as it stands at the end of a run."""
    parts = [_table(report.results)] if report.results else []
    parts += [_failed(report, result, verbose) for result in report.results if _is_bad(result)]
    parts += [_ledger(result) for result in report.results if result.ledger]
    parts += [_overrides(report.plan)] if report.plan.overrides else []
    parts += [_counts(report), _summary(report)]
    return "\n\n".join(parts)


def _ledger(result: Result) -> str:
    run = result.judged[0].run.label if result.judged else "its first run"
    return f"{result.case.id}: what all ranks said, {run}\n{ledger.table(result.ledger)}"


def _is_bad(result: Result) -> bool:
    return result.status != "pass"


def _table(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        cells = {check: cell(result.judged, check) for check in CHECKS}
        rows.append(
            [
                result.case.id,
                _WORD[result.status],
                *(_cell_text(cells[check]) for check in CHECKS),
                _replicas(result),
                _worst(result),
                f"{result.seconds:.1f}",
            ]
        )
    headers = ["case", "", *CHECKS, "replicas", "closest to its bound", "s"]
    legend = (
        "cells: relative error in float64, and rho in the working dtype "
        "(1 = the baseline's own rounding); ! = beyond the bound"
    )
    table = tabulate(rows, headers, disable_numparse=True, colalign=("left",) * 9 + ("right",))
    return f"{table}\n{legend}"


def _cell_text(c: Cell) -> str:
    numbers = [
        *([f"{c.error:.1e}"] if c.error is not None else []),
        *([f"{c.rho:.1f}"] if c.rho is not None else []),
    ]
    return "-" if not c.tensors else ("! " * bool(c.bad)) + " ".join(numbers)


def _replicas(result: Result) -> str:
    """How many copies were compared bit by bit. Every baseline sees the same ones: count once."""
    first = result.judged[0].baseline if result.judged else ""
    verdicts = [v for j in result.judged if j.baseline == first for v in j.verdicts]
    split = sum(v.status in PIECES for v in verdicts)
    copies = sum(v.copies for v in verdicts)
    return f"! {split} differ" if split else f"{copies} equal" if copies else "-"


def _worst(result: Result) -> str:
    verdicts = [v for j in result.judged for v in j.verdicts]
    worst = max(verdicts, key=lambda v: (not v.good, v.excess), default=None)
    return "-" if worst is None else f"{worst.key} {worst.excess:.2g}x"


def _failed(report: Report, result: Result, verbose: bool) -> str:
    case = f"--case {result.case.id}"
    return failure(
        result, f"{report.command} {case} -v", f"{report.explain} {case}", verbose=verbose
    )


def failure(result: Result, again: str, closer: str = "", *, verbose: bool = False) -> str:
    """A case that did not pass, in words. `again` and `closer` are commands to type."""
    todo = [f"  again: {again}"] * bool(again)
    if result.status == "error":
        said = [f"  {line}" for line in result.error.splitlines()]
        return "\n".join([f"ERROR {result.case.id}   could not be run", *said, *todo])
    first = result.first_divergence
    assert first is not None
    judged, verdict = first
    lines = [
        f"FAIL {result.case.id}   first divergence: {verdict.key}",
        f"  {what_is_wrong(verdict)}",
        f"  in {judged.run.label}, against the baseline '{judged.baseline}'",
        f"  {_neighbours(judged, verdict)}",
    ]
    if result.unexplained:
        lines.append(f"  a closer look at it failed: {result.unexplained}")
    if result.culprits is not None:
        lines += [f"  {line}" for line in explain.lines(result.culprits)]
    if verbose:
        bad = [(j, v) for j in result.judged for v in j.verdicts if not v.good]
        lines += [f"    {j.run.label} / {j.baseline}: {v.key}: {what_is_wrong(v)}" for j, v in bad]
    return "\n".join([*lines, *todo, *([f"  look closer: {closer}"] if closer else [])])


def tensors(result: Result) -> list[str]:
    """A line for every tensor of every run that was compared."""
    return [
        f"  {j.run.label}: {v.key}: {v.status}, {v.elements:,} elements, {v.copies} copies, "
        f"relative error {v.error:.1e}, allowed {v.allowed:.1e}"
        for j in result.judged
        for v in j.verdicts
    ]


def what_is_wrong(v: Verdict) -> str:
    """One verdict in words: what was got, what was wanted, how far beyond what was allowed."""
    if v.status not in ("bug", "drift"):
        size = f"; relative error {v.error:.1e}, allowed {v.allowed:.1e}" if v.elements else ""
        return f"{v.status}: {v.text}{size}"
    where = f" at {list(v.place)}" if v.place else ""
    rho = f" (rho {v.rho:.3g})" if v.status == "drift" else ""
    return (
        f"{v.status}: got {v.got:.6g}, want {v.want:.6g}{where}; relative error {v.error:.1e}"
        f"{rho}, allowed {v.allowed:.1e}; {v.excess:.2g} times its bound in the worst row"
    )


def _neighbours(judged: Judged, verdict: Verdict) -> str:
    place = judged.verdicts.index(verdict)
    after = sum(not v.good for v in judged.verdicts[place + 1 :])
    rest = len(judged.verdicts) - place - 1
    before = f"the {place} tensors before it agree" if place else "it is the first tensor"
    return f"{before}; of the {rest} after it, {after} do not"


def _overrides(plan: Plan) -> str:
    rows = [f"  {o.pattern}: relative error up to {o.bound:g} ({o.reason})" for o in plan.overrides]
    return "\n".join(["bounds set by hand:", *rows])


def _counts(report: Report) -> str:
    tensors, elements = report.compared
    ran = [r for r in report.results if r.judged]
    steps = sum(report.plan.steps for r in ran for _ in report.plan.runs(r.case))
    lines = [
        f"compared: {tensors:,} tensors, {elements:,} elements, {steps:,} steps of training, in "
        f"{report.seconds:.0f} s ({report.baseline_seconds:.0f} s of it for the baselines, "
        f"{sum(result.judging for result in ran):.0f} s for judging)"
    ]
    seen = [
        f"{check} {c.allowed:.1e}"
        for check in CHECKS
        if (c := cell((j for r in ran for j in r.judged), check)).allowed is not None
    ]
    if seen:
        lines.append(f"any relative error above these would have been flagged: {', '.join(seen)}")
    return "\n".join([*lines, *_caveats(report, [j for r in ran for j in r.judged])])


def _caveats(report: Report, judged: Sequence[Judged]) -> list[str]:
    """What a green run does not say."""
    idle = {r.case.id: ", ".join(r.idle) for r in report.results if r.idle}
    said = [
        f"nothing is cut over {axes}: {case}, and so on, tests no more than one rank of it"
        for case, axes in list(idle.items())[:1]
    ]
    said += list(dict.fromkeys(r.coarse for r in report.results if r.coarse))
    if LOGIC not in report.plan.dtypes:
        return [*said, f"logic was not judged: {LOGIC} is not among the dtypes"]
    loose = {
        v.key: v.allowed
        for j in judged
        for v in j.verdicts
        if j.run.dtype == LOGIC and v.allowed > LOOSE
    }
    if not loose:
        return said
    worst = max(loose, key=lambda key: loose[key])
    return [
        *said,
        f"hardly judged, since rounding alone moves them that far: {len(loose)} tensors, such as "
        f"{worst} (a relative error of {loose[worst]:.1e} would pass)",
    ]


def _summary(report: Report) -> str:
    lines = ["=== Summary ==="]
    for status, word in _WORD.items():
        chosen = [r for r in report.results if r.status == status]
        if chosen or status != "error":
            lines.append(f"{word} ({len(chosen)}):")
            lines += [f"  {r.case.title}{_tail(r)}" for r in chosen]
    if report.skipped:
        lines.append(f"SKIP ({len(report.skipped)}):")
        lines += [f"  {skip.case.title}  {skip.reason}" for skip in report.skipped]
    return "\n".join(lines)


def _tail(result: Result) -> str:
    if result.status == "error":
        return "  " + result.error.splitlines()[0]
    diff = "" if result.diff is None else f"  (diff={_diff(result.diff)})"
    first = result.first_divergence
    return diff if first is None else f"{diff}  first divergence: {first[1].key}"


def _diff(diff: float) -> str:
    return "0.0" if diff == 0 else f"{diff:.2e}"
