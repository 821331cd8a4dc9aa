"""How long the matrix takes, by phase; and a sample of it the way it is done today, in one run.

    python -m benchmarks.suite [--sample | --matrix]

Today: one torchrun per combination and check (benchmarks/one_check.py). The sample is run both ways
with the same task, dtype and schedule; both sides include starting their processes and running
their baselines. Ratios carry over to other machines, seconds do not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from parity import launch
from parity.case import Case, Run, parse_axes
from parity.plan import Plan, Wish, resolve
from parity.prepare import prepare
from parity.run import Session
from parity.trace import CHECKS

ROOT = Path(__file__).parents[1]
SAMPLE = ("dp2-tp1-pp1", "dp1-tp2-pp1", "dp1-tp1-pp2", "dp2-tp2-pp2")


def whole_matrix(plan: Plan) -> None:
    start = time.perf_counter()
    session = Session(plan)
    for case in plan.cases:
        session.baselines.prepare(case)
    baselines = time.perf_counter() - start
    results = []
    for case in plan.cases:
        results.append(session.result(case))
        print(f"  {case.id:<14} {results[-1].status} {results[-1].seconds:6.1f} s", flush=True)
    total = time.perf_counter() - start
    floor = len(results) * one_process(plan) / (os.cpu_count() or 1)
    judging = sum(result.judging for result in results)
    ranks = sum(result.seconds for result in results) - judging
    rows = [
        ("baselines, disturbed ones too", baselines),
        ("ranks, from their start to their end", ranks),
        ("  floor: the same runs on one process, over the cores", floor),
        ("judging", judging),
        ("rest", total - baselines - ranks - judging),
        ("whole matrix", total),
    ]
    print(f"{len(results)} cases, {sum(r.status == 'pass' for r in results)} pass")
    print(
        tabulate([(name, f"{s:.1f}", f"{s / total:.0%}") for name, s in rows], ["phase", "s", ""])
    )
    print(f"the ranks take {ranks / floor:.1f} times their floor")


def one_process(plan: Plan) -> float:
    """Seconds of the processor that all runs of a case take where there is one rank."""
    case = next(case for case in plan.cases if case.world == 1)
    runs = [replace(run, rank=0, device="cpu") for run in plan.runs(case)]
    (seconds,) = launch(cpu_time, 1, plan.target, runs, backend=plan.backend)
    return float(seconds)


def cpu_time(target: str, runs: Sequence[Run]) -> float:
    """On the rank."""
    function = resolve(target)
    begin = time.process_time()
    for run in runs:
        function(run)
    return time.process_time() - begin


def today(case: str) -> float:
    start = time.perf_counter()
    for check in CHECKS:
        world = Case(parse_axes(case)).world
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={world}", "-m", "benchmarks.one_check", case, check]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def sample(plan: Plan) -> None:
    plan = replace(plan, dtypes=["float64"], variants={"schedule": ["1f1b"]})
    start = time.perf_counter()
    session = Session(plan)
    session.baselines.prepare(plan.cases[0])
    baselines = time.perf_counter() - start
    rows, ours, theirs = [], baselines, 0.0
    for case in SAMPLE:
        result = session.result(Case(parse_axes(case)))
        assert result.status == "pass", result
        slow = today(case)
        ours, theirs = ours + result.seconds, theirs + slow
        rows.append((case, f"{result.seconds:.1f}", f"{slow:.1f}", f"{slow / result.seconds:.0f}"))
        print(f"  {case}: done", flush=True)
    rows.append(("baselines", f"{baselines:.1f}", "(in each)", ""))
    rows.append(("together", f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.1f}"))
    print(f"one dtype, one schedule, {len(CHECKS)} checks:")
    print(tabulate(rows, ["case", "parity, s", "torchruns, s", "ratio"], disable_numparse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sample", action="store_true", help="only the comparison")
    which.add_argument("--matrix", action="store_true", help="only the whole matrix")
    args = parser.parse_args()
    plan, _ = prepare(ROOT / "matrix.yaml", Wish(device="cpu"))
    if not args.sample:
        whole_matrix(plan)
    if not args.matrix:
        sample(plan)


if __name__ == "__main__":
    main()
