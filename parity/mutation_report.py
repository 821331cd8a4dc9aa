"""What became of mutants, in words and as JSON: pure functions of a report of theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from parity.mutants import KINDS, labels
from parity.mutate import LETTERS, Fate, Report

SCHEMA = 1  # of the JSON report


def one_line(fate: Fate) -> str:
    word = fate.verdict.upper() if fate.verdict in ("survived", "error") else fate.verdict
    return f"{word:<10} {fate.mutant!s:<22} {fate.seconds:5.1f} s  {fate.reason}"


def text(report: Report, *, verbose: bool = False) -> str:
    names = labels(report.sites)
    parts = [_table(report, names)]
    if verbose:
        parts += [_listed(report, names, ("killed", "equivalent", "invariant"))]
    for verdict in ("error", "survived"):
        if report.count(verdict):
            head = f"{verdict.upper()} ({report.count(verdict)}):"
            parts.append(f"{head}\n{_listed(report, names, (verdict,))}")
    return "\n\n".join([*parts, _counts(report, names)])


def _table(report: Report, names: dict[str, str]) -> str:
    found: dict[str, dict[str, str]] = {}
    for fate in report.fates:
        row = found.setdefault(fate.mutant.site.name, {})
        row[fate.mutant.kind] = row.get(fate.mutant.kind, "") + LETTERS[fate.verdict]
    kinds = [kind for kind in KINDS if any(kind in row for row in found.values())]
    rows = [[names[name], *(row.get(kind, ".") for kind in kinds)] for name, row in found.items()]
    table = tabulate(rows, ["site", *kinds], disable_numparse=True)
    legend = (
        "k killed, = no bit changed, ~ any value that ranks share will do, S SURVIVED, ! not "
        "decided; one letter a mutant"
    )
    return f"{table}\n{legend}"


def _listed(report: Report, names: dict[str, str], verdicts: Sequence[str]) -> str:
    lines = []
    for site in report.sites:
        own = [f for f in report.fates if f.mutant.site is site and f.verdict in verdicts]
        lines += [f"  {names[site.name]}"] * bool(own)
        lines += [f"    {one_line(fate)}" for fate in own]
        if verdicts == ("survived",) and own:
            lines.append(f"    at {' < '.join(site.trail)}")
            lines.append(f"    again: {report.command} --only '{names[site.name]}' -v")
    return "\n".join(lines)


def _counts(report: Report, names: dict[str, str]) -> str:
    lines = [f"not changed: {names[s.name]} ({s.why_not})" for s in report.sites if s.why_not]
    by = Counter(fate.by for fate in report.fates if fate.verdict == "killed")
    lines += ["killed by: " + ", ".join(f"{what} {n}" for what, n in by.most_common())] * bool(by)
    counts = ", ".join(
        f"{report.count(verdict)} {word}"
        for verdict, word in zip(
            LETTERS, ("killed", "equivalent", "invariant", "survived", "not decided"), strict=True
        )
        if report.count(verdict) or verdict not in ("invariant", "error")
    )
    r = report.run
    lines.append(
        f"{r.case.id}, {r.label}, {r.steps} steps: {len(report.fates)} mutants: {counts}; score "
        f"{report.score:.1%}; {report.seconds:.0f} s ({report.clean_seconds:.1f} s the clean run)"
    )
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    """The versioned document of docs/mutation.md."""
    names = labels(report.sites)
    return {
        "schema": SCHEMA,
        "command": report.command,
        "case": report.run.case.id,
        "run": report.run.label,
        "steps": report.run.steps,
        "sites": [
            {
                "site": names[site.name],
                "op": site.first.op,
                "group": site.first.group,
                "phase": site.first.phase,
                "trail": site.trail,
                "calls": {str(rank): len(calls) for rank, calls in site.calls.items()},
                "not_changed": site.why_not,
            }
            for site in report.sites
        ],
        "mutants": [_mutant_json(fate, names) for fate in report.fates],
        **{verdict: report.count(verdict) for verdict in LETTERS},
        "score": report.score,
        "seconds": report.seconds,
        "exit_code": report.exit_code,
    }


def _mutant_json(fate: Fate, names: dict[str, str]) -> dict[str, Any]:
    calls, changed, largest = fate.tally
    return {
        "site": names[fate.mutant.site.name],
        "kind": fate.mutant.kind,
        "detail": fate.mutant.detail,
        "verdict": fate.verdict,
        "by": fate.by,
        "reason": fate.reason,
        "calls": calls,
        "changed": changed,
        "largest": largest if largest < float("inf") else None,
        "seconds": fate.seconds,
    }
