"""All planted bugs, one after the other: was each caught, where, and was it told what it is?

    python -m tests.bugs [NAME ...] [--json FILE] [--docs] [-v]

Writes the kill table; `--docs` writes docs/bugs-we-catch.md from the catalogue, without running.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from parity.baseline import Baselines
from parity.case import Case, parse_axes
from parity.culprit import Culprit
from parity.explain import lines
from parity.investigate import Investigator
from parity.run import Result, Session
from tests.bugs.catalogue import BUGS, Bug
from tests.bugs.plans import plan

DOCS = Path(__file__).parents[2] / "docs" / "bugs-we-catch.md"


@dataclass(frozen=True)
class Kill:
    """What became of one bug. `separation`: the largest error over its bound; `at_first`: red first
    at the right tensor; `told`: the right diagnosis is among those printed for the first culprit.
    """

    name: str
    caught: bool
    status: str
    first: str
    at_first: bool
    checks: str
    diagnosis: str
    told: bool
    separation: float
    silent: bool | None


class Hunt:
    """Baselines are made once per dtype and number of steps, for all bugs."""

    def __init__(self) -> None:
        self._baselines: dict[tuple[str, int], Baselines] = {}
        self._closer: dict[tuple[str, int], Investigator] = {}

    def run(self, bug: Bug, case: Case) -> Result:
        planned, key = plan(bug.target, bug.dtype, bug.steps, case), (bug.dtype, bug.steps)
        kept = self._baselines.setdefault(key, Baselines(planned))
        return Session(planned, kept).result(case)

    def culprits(self, bug: Bug, result: Result) -> list[Culprit]:
        planned, key = plan(bug.target, bug.dtype, bug.steps, result.case), (bug.dtype, bug.steps)
        closer = self._closer.setdefault(key, Investigator(planned))
        return closer.of(planned).culprits(result.case, result)

    def kill(self, bug: Bug, *, with_silent: bool) -> tuple[Kill, list[Culprit]]:
        result = self.run(bug, Case(parse_axes(bug.case)))
        first = result.first_divergence
        bad = [v for j in result.judged for v in j.verdicts if not v.good]
        culprits = self.culprits(bug, result) if first is not None else []
        kinds = [fit.kind for culprit in culprits[:1] for fit in culprit.fits]
        silent = None
        if bug.silent and with_silent:
            silent = self.run(bug, Case(parse_axes(bug.silent))).status == "pass"
        key = str(first[1].key) if first is not None else ""
        kill = Kill(
            bug.name,
            result.status == "fail",
            first[1].status if first is not None else result.status,
            key,
            bool(key) and key.startswith(bug.first),
            " ".join(dict.fromkeys(v.key.check for v in bad)),
            ", ".join(dict.fromkeys(kinds)),
            bug.diagnosis in kinds,
            max((v.excess for v in bad), default=0.0),
            silent,
        )
        return kill, culprits


def table(kills: Iterable[Kill]) -> str:
    rows = [
        [
            kill.name,
            kill.status if kill.caught else "MISSED",
            kill.first + "" if kill.at_first else f"{kill.first} (wrong place)",
            kill.checks,
            kill.diagnosis if kill.told else f"{kill.diagnosis or '-'} (not as expected)",
            f"{kill.separation:.1e}",
            {None: "-", True: "silent", False: "RED"}[kill.silent],
        ]
        for kill in kills
    ]
    head = ["bug", "", "first red", "checks", "diagnosis", "error / bound", "elsewhere"]
    return str(tabulate(rows, head, disable_numparse=True, tablefmt="simple"))


def summary(kills: list[Kill]) -> str:
    n = len(kills)
    silent = [kill for kill in kills if kill.silent is not None]
    return (
        f"{n} bugs: {sum(k.caught for k in kills)} caught, {sum(k.at_first for k in kills)} at the "
        f"right first tensor, {sum(k.told for k in kills)} with the right diagnosis; "
        f"{sum(bool(k.silent) for k in silent)} of {len(silent)} silent where they change nothing"
    )


def document() -> str:
    """docs/bugs-we-catch.md."""
    rows = [
        [
            f"`{bug.name}`",
            bug.source,
            bug.case + (f" ({bug.dtype})" if bug.dtype != "float64" else ""),
            bug.status,
            bug.first.strip(),
            bug.seen,
            bug.diagnosis or "-",
            bug.silent or "-",
        ]
        for bug in BUGS
    ]
    head = ["bug", "source", "smallest case", "seen as", "first red", "checks", "diagnosis",
            "silent in"]  # fmt: skip
    topics = len({bug.module for bug in BUGS})
    return "\n".join(
        [
            "# Bugs we catch",
            "",
            f"{len(BUGS)} mistakes in {topics} topics, planted in heiretsu by small patches "
            "(`tests/bugs/`), each modelled on a public report or on a stated mechanism. Tests "
            "hold every line: the case is red, first at that record and in those checks, and it "
            "is green where the mistake changes nothing. `python -m tests.bugs` runs them all, "
            "with the diagnoses (of which the tests hold a part), and prints how far each was "
            "beyond its bound. This file is written by `python -m tests.bugs --docs`.",
            "",
            tabulate(rows, head, tablefmt="github", disable_numparse=True),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--no-silent", action="store_true", help="leave the silent cases out")
    parser.add_argument("-v", "--verbose", action="store_true", help="every culprit, in words")
    args = parser.parse_args()
    if args.docs:
        DOCS.write_text(document())
        return 0
    chosen = [bug for bug in BUGS if not args.names or bug.name in args.names]
    if unknown := set(args.names) - {bug.name for bug in chosen}:
        parser.error(f"no such bug: {', '.join(sorted(unknown))}")
    hunt, kills = Hunt(), []
    for bug in chosen:
        kill, culprits = hunt.kill(bug, with_silent=not args.no_silent)
        kills.append(kill)
        if args.verbose:
            print(f"\n{bug.name} ({bug.case}): {kill.status}, first {kill.first}", flush=True)
            print("\n".join(f"  {line}" for line in lines(culprits)), flush=True)
        else:
            print(f"{'caught' if kill.caught else 'MISSED'}  {bug.name}", flush=True)
    print(f"\n{table(kills)}\n\n{summary(kills)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(kill) for kill in kills], indent=1) + "\n")
    return 0 if all(kill.caught for kill in kills) else 1


if __name__ == "__main__":
    sys.exit(main())
