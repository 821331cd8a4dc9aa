"""Small programs for the launcher and the command line: right ones, wrong ones, and bad ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping

import torch
import torch.distributed as dist

from parity import Case, Run, Trace, nudge


def add_up(x: int) -> tuple[int, int, int]:
    total = torch.tensor(x + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(total)


def environment() -> tuple[int, str, int, float]:
    scheduling = os.sched_getscheduler(0)
    return os.getpid(), os.environ["OMP_NUM_THREADS"], scheduling, float(torch.get_num_threads())


def raise_on_1() -> None:
    print("the last words of rank", dist.get_rank())
    if dist.get_rank() == 1:
        raise ZeroDivisionError("nothing to divide by")
    dist.barrier()


def die_on_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_on_0() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def hang_on_1() -> None:
    if dist.get_rank() == 1:
        wait_for_ever()
    dist.all_reduce(torch.zeros(1))


def wait_for_ever() -> None:
    threading.Event().wait()


def write_pid_and_hang(folder: str) -> None:
    # Written aside and renamed: whoever sees the file sees all of it.
    path = os.path.join(folder, str(dist.get_rank()))
    with open(path + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".new", path)
    wait_for_ever()


def leave_a_child(folder: str, fail: bool) -> None:
    child = subprocess.Popen(["sleep", "600"])
    with open(os.path.join(folder, "child"), "w") as file:
        file.write(str(child.pid))
    if fail:
        raise RuntimeError("and the child goes on")


def unpicklable() -> object:
    return lambda: None


# A matrix of one axis, n: a vector is cut over the ranks, doubled, and summed.


def objections(case: Case, options: Mapping[str, object]) -> list[str]:
    if set(options) - {"wrong", "size"}:
        raise ValueError("options: known are wrong, size")
    if options.get("size") == 0:
        return ["nothing has no size"]
    return ["7 is an unlucky number"] if case.axes["n"] == 7 else []


def whole(run: Run) -> torch.Tensor:
    x = torch.linspace(1, 2, 24).to(getattr(torch, run.dtype))
    nudge(x, "x", run.nudge)
    return x


def baseline(run: Run) -> Trace:
    x = whole(run)
    trace = Trace()
    trace.add("forward", "doubled", x * 2)
    trace.add("loss", "sum", x.sum())
    return trace


def infinite_baseline(run: Run) -> Trace:
    trace = Trace()
    trace.add("forward", "x", whole(run) / 0)
    return trace


def wider_baseline(run: Run) -> Trace:
    """Broadcasts against the others' (24,), and must not."""
    trace = Trace()
    trace.add("forward", "doubled", whole(run).view(24, 1) * 2)
    trace.add("loss", "sum", whole(run).sum())
    return trace


def chaotic_baseline(run: Run) -> Trace:
    """Takes a rounding to the size of the whole."""
    x = whole(run)
    for _ in range(60):
        x = 4 * (x - x.floor()) * (1 - (x - x.floor()))
    trace = Trace()
    trace.add("forward", "doubled", x)
    trace.add("loss", "sum", x.sum())
    return trace


def deaf_baseline(run: Run) -> Trace:
    trace = Trace()
    trace.add("forward", "ones", torch.ones(3, dtype=getattr(torch, run.dtype)))
    return trace


def empty(run: Run) -> Trace:
    return Trace()


def no_trace(run: Run) -> None:
    return None


def candidate(run: Run) -> Trace:
    wrong = run.options.get("wrong", "")
    n, rank = run.case.world, run.rank
    if wrong == "raise" and n == 2 and rank == 1:
        raise RuntimeError("rank 1 does not like n=2")
    if wrong == "kill" and n == 2 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if wrong == "hang" and n == 2 and rank == 1:
        wait_for_ever()
    if wrong == "shy" and run.detail:
        raise RuntimeError("not while somebody looks")
    if wrong == "print":
        print("hello from a rank", file=sys.stderr)
    parts = whole(run).tensor_split(n)
    start = sum(len(part) for part in parts[:rank])
    total = parts[rank].sum()
    if not (wrong == "sum" and n == 3):
        dist.all_reduce(total)
    is_wrong = wrong in ("double", "shy") and n == 3
    is_wrong |= wrong == "large" and n > 1 and int(run.options["size"]) > 4
    doubled = parts[rank] * (2.001 if is_wrong else 2)
    trace = Trace()
    trace.add("forward", "doubled", doubled, shape=(24,), offset=(start,))
    trace.add("loss", "sum", total)
    return trace
