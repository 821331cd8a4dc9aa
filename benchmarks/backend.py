"""The checking backend beside gloo, in one run: seconds of a call, and how many times faster.

    python -m benchmarks.backend [--quick]

Each cell is the time of one call in a row of equal ones, on the slowest rank; the best of three
rows, taken in turn from all backends. gloo is timed as it comes, and with the scheduling policy
(SCHED_BATCH) that parity gives to its ranks.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from itertools import product

import torch
import torch.distributed as dist
from tabulate import tabulate

from parity import Backend, launch

SIZES = {"1 KB": 1 << 10, "64 KB": 1 << 16, "1 MB": 1 << 20, "16 MB": 1 << 24}
WAYS = {"parity": ("parity", True), "gloo": ("gloo", False), "gloo batch": ("gloo", True)}
ROUNDS = 3
SECONDS = 0.25  # that one row of calls is meant to take


def operations(size: int) -> dict[str, Callable[[], object]]:
    """Calls that move tensors of `size` bytes in all (of a gather: the output)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    count = size // 4 // world
    whole, part = torch.zeros(count * world), torch.zeros(count)
    other = torch.zeros(count * world)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

    def send() -> None:
        if rank == 0:
            dist.send(whole, 1)
        elif rank == 1:
            dist.recv(whole, 0)

    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: gather(whole, part),
        "reduce_scatter": lambda: scatter(part, whole),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "send/recv": send,
    }


def times(is_batch: bool, size: int) -> dict[str, float]:
    """On every rank: seconds per call."""
    if not is_batch:
        for thread in os.listdir("/proc/self/task"):  # gloo's own ones too
            os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))
    return {name: _row(call) for name, call in operations(size).items()}


def _row(call: Callable[[], object]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(3):
        call()
    guess = torch.tensor([(time.perf_counter() - begin) / 3])
    dist.all_reduce(guess, dist.ReduceOp.MAX)
    count = max(3, min(1000, int(SECONDS / float(guess))))
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    seconds = (time.perf_counter() - begin) / count
    dist.barrier()  # who has no part in the call is not to end meanwhile: that takes the processor
    return seconds


def measure(world: int, size: int) -> dict[str, dict[str, float]]:
    """By operation and way."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for way, (name, is_batch) in WAYS.items():
            ranks = launch(times, world, is_batch, size, backend=Backend(name))
            for op in ranks[0]:
                slowest = max(own[op] for own in ranks)
                row = best.setdefault(op, {})
                row[way] = min(slowest, row.get(way, slowest))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 ranks, 1 KB and 1 MB only")
    quick = parser.parse_args().quick
    rows = []
    for world, size in product((8,) if quick else (2, 4, 8), SIZES):
        if quick and size not in ("1 KB", "1 MB"):
            continue
        for op, row in measure(world, SIZES[size]).items():
            ours, *theirs = (row[way] for way in WAYS)
            cells = [f"{1e3 * seconds:.3f}" for seconds in row.values()]
            rows.append([world, size, op, *cells, *(f"{t / ours:.1f}x" for t in theirs)])
    head = ["ranks", "size", "operation", *(f"{way} ms" for way in WAYS), "faster", "than batch"]
    print(tabulate(rows, head, tablefmt="simple", disable_numparse=True))


if __name__ == "__main__":
    main()
