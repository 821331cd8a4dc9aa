"""The command line: a thin door. It builds a Plan, runs it, prints."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from parity.arguments import parser
from parity.errors import (
    COULD_NOT_RUN,
    PARITY_FAILURE,
    PASSED,
    USAGE,
    ParityError,
    UsageError,
)

if TYPE_CHECKING:
    from parity.case import Case
    from parity.matrix_file import Skip
    from parity.plan import Plan, Wish
    from parity.report import Report
    from parity.subject.collect import Test

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT and SIGPIPE, as shells report them


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _terminate)
    try:
        return _COMMANDS[args.command](args)
    except ParityError as error:
        for line in str(error).splitlines():
            print(f"parity: {line}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception:  # not 1, Python's own status, which says that a case differs
        traceback.print_exc()
        print("parity: this is a mistake of parity itself; nothing was decided", file=sys.stderr)
        return COULD_NOT_RUN
    except KeyboardInterrupt:
        print("parity: interrupted; all ranks are ended", file=sys.stderr)
        return INTERRUPTED


def _terminate(*_: object) -> None:
    """SIGTERM and SIGHUP as Ctrl-C, so that ranks are ended and folders removed on the way out."""
    raise KeyboardInterrupt


def _wish(args: argparse.Namespace) -> Wish:
    from parity.plan import Wish

    given = vars(args)
    return Wish(
        cases=args.case,
        max_world=args.max_world,
        device=args.device,
        backend=given.get("backend", "parity"),
        ledger=bool(given.get("ledger")),
        settings=given.get("set") or (),
        dtypes=given.get("dtype") or (),
        steps=given.get("steps"),
        seed=given.get("seed"),
        thresh=given.get("thresh"),
        deadline=given.get("deadline"),
    )


def _list(args: argparse.Namespace) -> int:
    from parity.prepare import prepare

    plan, skipped = prepare(args.matrix, _wish(args))
    cases = plan.cases
    for case in cases:
        print(f"{case.id:<16} {case.world} ranks" if case.world > 1 else f"{case.id:<16} 1 rank")
    for skip in skipped:
        print(f"{skip.case.id:<16} skipped: {skip.reason}")
    print(f"{len(cases)} cases, {len(skipped)} skipped")
    return PASSED if cases else USAGE


def _check(args: argparse.Namespace) -> int:
    """Every case of the tests; those that differ are told in full at once."""
    from parity.report import one_line, tensors
    from parity.subject import check as checks

    code, compared, kept = PASSED, 0, checks.Kept()
    coarse: dict[str, None] = {}
    how, room = checks.how(_wish(args))
    for test, case in _cases(args, room):
        name = f"{args.test.partition(':')[0]}:{test.name}"
        again = shlex.join(["parity", "check", name, "--case", case.id])
        tested = checks.TestCase(case, replace(how, again=again), kept)
        found = checks.run(test.function, tested)
        for result in tested.results:
            print(f"{one_line(result)}  {test.name}")
            if args.verbose:
                print("\n".join(tensors(result)))
        if found is not None:
            print(f"\n{found}\n", flush=True)
            code = min(filter(None, (code, found.code)), default=PASSED)
        compared += sum(r.compared[0] for r in tested.results)
        coarse |= dict.fromkeys(f"{r.coarse}: {test.name}" for r in tested.results if r.coarse)
    print(f"compared: {compared:,} tensors")
    for text in coarse:
        print(text)
    return code or (PASSED if compared else USAGE)


def _layout(args: argparse.Namespace) -> int:
    from parity.subject import check as checks

    how, room = checks.how(_wish(args))
    for test, case in _cases(args, room):
        tested = checks.LayoutCase(case, how)
        checks.run(test.function, tested)
        for layout in tested.layouts:
            print(f"{test.name}[{case.id}]\n{layout.text()}\n")
    return PASSED


def _cases(args: argparse.Namespace, room: int) -> list[tuple[Test, Case]]:
    """The cases that are asked for, and said on the way: those for which there is no room."""
    from parity.subject.collect import collect

    tests = collect(args.test)
    every = [(test, case) for test in tests for case in test.combinations.cases]
    wanted = args.case or ["*"]
    chosen = [(t, c) for t, c in every if any(fnmatchcase(c.id, pattern) for pattern in wanted)]
    if not chosen:
        known = ", ".join(dict.fromkeys(case.id for _, case in every))
        raise UsageError(f"--case {', '.join(args.case)}: no such case (there are: {known})")
    for test, case in chosen:
        if reason := test.combinations.why_not(case, room):
            print(f"SKIP  {case.id}  {test.name}: {reason}")
    fits = [(t, c) for t, c in chosen if not t.combinations.why_not(c, room)]
    if not fits:
        raise UsageError("nothing to run: every case is skipped")
    return fits


def _exec(args: argparse.Namespace) -> int:
    if not args.script.is_file():
        raise UsageError(f"{args.script}: no such file; give the path of a Python script")
    from parity.backend import Settings
    from parity.script import run_script

    settings = Settings(watch=args.watch)
    run_script(args.script, args.arguments, args.ranks, settings, args.deadline)
    return PASSED


def _explain(args: argparse.Namespace) -> int:
    from parity.document import as_json
    from parity.explain import lines, neighbourhood

    report, finished = _report(args)
    if args.json:
        args.json.write_text(json.dumps(as_json(report), indent=1) + "\n")
    for result in report.results:
        print("\n".join(["", f"{result.case.id}: {result.status}", *result.error.splitlines()]))
        for culprit in result.culprits or ():
            print("\n".join(["", *lines([culprit]), "", neighbourhood(culprit)]))
    if not finished:
        raise KeyboardInterrupt
    return report.exit_code


def _run(args: argparse.Namespace) -> int:
    from parity.document import as_json
    from parity.report import text

    done, finished = _report(args)
    print(f"\n{text(done, verbose=args.verbose)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(as_json(done), indent=1) + "\n")
    if not finished:
        raise KeyboardInterrupt
    return done.exit_code


def _report(args: argparse.Namespace) -> tuple[Report, bool]:
    """Everything that is wrong with the command is said before anything runs."""
    from parity.prepare import prepare

    if problem := _wrong_json(args.json):
        raise UsageError(problem)
    plan, skipped = prepare(args.matrix, _wish(args))
    if not plan.cases:
        raise UsageError(
            "nothing to run: every case is skipped",
            *(f"{skip.case.id}: {skip.reason}" for skip in skipped),
        )
    return _execute(plan, args, skipped)


def _wrong_json(path: Path | None) -> str:
    if path and (not path.resolve().parent.is_dir() or path.is_dir()):
        return f"--json {path}: it must be a file in a folder that exists"
    return ""


def _mutate(args: argparse.Namespace) -> int:
    from parity import mutate, mutation_report

    choice = mutate.Choice(args.only, args.kind)
    objections = [*choice.objections, *filter(None, [_wrong_json(args.json)])]
    plan = mutate.plan_for(args.matrix, _wish(args), objections)
    command = f"parity mutate {args.matrix} --case {plan.cases[0].id} --steps {plan.steps}"
    progress = Progress(0)

    def tell(done: int, total: int, fate: mutate.Fate | None) -> None:
        progress.total = total
        if fate is not None and (args.verbose or fate.verdict in ("survived", "error")):
            progress.line(mutation_report.one_line(fate))
        progress.done = done
        progress.show("mutants")

    progress.show("the baseline, and the case as it is")
    report, finished = mutate.run(plan, choice, command, tell)
    print(f"\n{mutation_report.text(report, verbose=args.verbose)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(mutation_report.as_json(report), indent=1) + "\n")
    if not finished:
        raise KeyboardInterrupt
    return report.exit_code


def _diff(args: argparse.Namespace) -> int:
    from parity.offline import diff
    from parity.offline import report as reports

    if problem := _wrong_json(args.json):
        raise UsageError(problem)
    done = diff.diff(args.baseline, args.candidate, args.nudged)
    print(reports.text(done, verbose=args.verbose), flush=True)
    if args.json:
        args.json.write_text(json.dumps(reports.as_json(done), indent=1) + "\n")
    return done.exit_code


def _execute(plan: Plan, args: argparse.Namespace, skipped: Sequence[Skip]) -> tuple[Report, bool]:
    """Run the cases. On Ctrl-C what is finished is reported all the same: (report, False)."""
    from parity.investigate import Investigator
    from parity.report import Report, one_line
    from parity.run import Result, Session

    start, finished = time.perf_counter(), True
    session, results, closer = Session(plan), list[Result](), Investigator(plan)
    progress, baseline_seconds = Progress(len(plan.cases)), 0.0
    try:
        for case in plan.cases:
            progress.show(case.id if session.baselines.is_ready(case) else "the baselines")
            before = time.perf_counter()
            try:
                session.baselines.prepare(case)
            except ParityError as error:
                if not results:
                    raise  # the baselines of all: nothing can be judged
                results.append(Result(case, "error", [], 0.0, error=str(error)))
            else:
                baseline_seconds += time.perf_counter() - before
                progress.show(case.id)
                results.append(closer.investigate(session.result(case)))
            progress.line(one_line(results[-1]))
            if args.fail_fast and results[-1].status != "pass":
                break
    except KeyboardInterrupt:
        if not results:
            raise
        finished = False
    seconds = time.perf_counter() - start
    command = f"parity run {args.matrix}"
    report = Report(plan, command, results, skipped, seconds, baseline_seconds)
    return report, finished


def _soak(args: argparse.Namespace) -> int:
    from parity.prepare import prepare_soak
    from parity.soak import Soaked, soak, text

    plan, space = prepare_soak(args.matrix, _wish(args))
    progress = Progress(args.count)

    def tell(seen: Soaked) -> None:
        progress.done = min(seen.total, args.count)
        progress.show("shrinking the failure" if seen.alarm else f"{seen.draws} models and data")

    seen = soak(plan, space, args.count, args.seed or 0, tell)
    print(("\r\033[K" if progress.live else "") + text(seen))
    if seen.alarm is None:
        return PASSED if seen.total else USAGE
    draw, result = seen.alarm.draw, seen.alarm.result
    first = result.first_divergence
    said = str(first[1].key) if first is not None else result.error
    print(f"{result.status.upper()}  {result.case.id}  {said}")
    print(f"  again: {draw.command(args.matrix)}")
    return PARITY_FAILURE if result.status == "fail" else COULD_NOT_RUN


_COMMANDS = {
    "run": _run,
    "explain": _explain,
    "soak": _soak,
    "mutate": _mutate,
    "list": _list,
    "exec": _exec,
    "check": _check,
    "layout": _layout,
    "diff": _diff,
}


class Progress:
    """On a terminal a line that is written over; elsewhere only a line per finished case."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.live = sys.stdout.isatty()

    def show(self, what: str) -> None:
        if self.live:
            print(f"\r\033[K[{self.done}/{self.total}] {what} ...", end="", flush=True)

    def line(self, text: str) -> None:
        self.done += 1
        print(f"\r\033[K{text}" if self.live else text, flush=True)
