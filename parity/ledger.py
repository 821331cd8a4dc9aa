"""What ranks said to each other in a run, by axis: a file per rank, and one table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate

from parity.backend import Entry
from parity.backend.ledger import PHASES, by_axis

SIZE = 1 << 20  # calls that a rank remembers
Sums = Mapping[tuple[str, str, str], tuple[int, int, float]]


def save(entries: Sequence[Entry], path: Path) -> None:
    path.write_text("\n".join(json.dumps(asdict(entry)) for entry in entries))


def load(path: Path) -> list[Entry]:
    return [Entry(**json.loads(line)) for line in path.read_text().splitlines()]


def total(ranks: Iterable[Sequence[Entry]]) -> Sums:
    """(axis, operation, phase) to (calls, bytes given, seconds waited), of all ranks together."""
    return by_axis([entry for entries in ranks for entry in entries])


def short(site: str) -> str:
    """A place in the code, as seen from here: `model.py:12 in forward`."""
    file, _, rest = site.rpartition(":")
    path = Path(file)
    here = path.is_relative_to(Path.cwd())
    return f"{path.relative_to(Path.cwd()) if here else path.name}:{rest}"


def table(sums: Sums) -> str:
    order = sorted(sums, key=lambda key: (key[0], PHASES.index(key[2]), key[1]))
    rows = [
        [axis, op, phase, f"{sums[key][0]:,}", f"{sums[key][1]:,}", f"{sums[key][2]:.2f}"]
        for key in order
        for axis, op, phase in [key]
    ]
    head = ["axis", "operation", "phase", "calls", "bytes", "waited s"]
    align = ("left", "left", "left", "right", "right", "right")
    return str(tabulate(rows, head, tablefmt="simple", colalign=align, disable_numparse=True))
