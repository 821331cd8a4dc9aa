"""In words: factors by the numbers that make them, rows as ranges, and where rows have moved."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import sqrt

import torch
from torch import Tensor

from parity.evidence import CLOSE, Evidence


def factor_text(k: float, e: Evidence) -> str:
    """A factor by the numbers that make it, as in `2 (tp)` or `1/8 (1/micro_batches)`; or ''."""
    sizes = {name: n for name, n in [*e.axes.items(), *e.numbers.items()] if n > 1}
    pairs = list(combinations(sizes, 2))
    kinds: list[list[tuple[float, str]]] = [
        [(1.0, ""), *((float(n), name) for name, n in sizes.items())],
        [(float(sizes[a] * sizes[b]), f"{a} x {b}") for a, b in pairs],
        [(sqrt(n), f"the root of {name}") for name, n in sizes.items()],
        [(sizes[a] / sizes[b], f"{a} / {b}") for a, b in [*pairs, *(p[::-1] for p in pairs)]],
    ]
    for known in kinds:
        for value in (abs(k), 1 / abs(k) if k else 0.0):
            names = [name for factor, name in known if abs(value / factor - 1) < CLOSE]
            if names:
                number = f"{value:.6g}" if value == abs(k) else f"1/{value:.6g}"
                sign = "-" if k < 0 else ""
                return f"{sign}{number}" + (f" ({' or '.join(names)})" if names[0] else "")
    return ""


def why(k: float, e: Evidence) -> str:
    """What usually makes such a factor."""
    for axis, size in e.axes.items():
        if size > 1 and abs(k - size) < CLOSE:
            return f": summed over {axis} once too often, or not divided by it"
        if size > 1 and abs(k * size - 1) < CLOSE:
            return f": divided by {axis} once too often, or not summed over it"
    if abs(k + 1) < CLOSE:
        return ": its sign is wrong"
    for name, number in e.numbers.items():
        if number > 1 and abs(k - number) < CLOSE:
            return f": not divided by {name}"
        if number > 1 and abs(k * number - 1) < CLOSE:
            return f": divided by {name} once too often"
    return ""


def _times_text(c: float, e: Evidence) -> str:
    """How often something was added of which `c` is too much."""
    for axis, size in e.axes.items():
        if size > 1 and abs(c - (size - 1)) < CLOSE:
            return f"on each of the {size} ranks of {axis}, and summed"
    if abs(c + 1) < CLOSE:
        return "never"
    return f"{c + 1:.6g} times"


def coordinates_text(e: Evidence, bad: Sequence[int], holders: set[int]) -> str:
    for axis in e.axes:
        places = {e.at[rank].get(axis) for rank in bad} if e.at else set()
        same = {rank for rank in holders if e.at and e.at[rank].get(axis) in places}
        if places and same == set(bad):
            rest = {e.at[rank].get(axis) for rank in holders} - places
            few, but = (places, "") if len(places) <= len(rest) else (rest, "all but ")
            return f" ({but}{' or '.join(f'{axis}={i}' for i in sorted(map(str, few)))})"
    return ""


def move_text(source: Tensor, dim: int) -> tuple[str, str]:
    n = len(source)
    moved = (source != torch.arange(n)).nonzero().flatten()
    if len(source.unique()) < n:
        here, there = spans(moved.tolist()), spans(sorted(source[moved].unique().tolist()))
        return "other rows", f"along dim {dim}, {here} hold what belongs to {there}"
    shift = int(source[0])
    if torch.equal(source, (torch.arange(n) + shift) % n):
        by = shift if 2 * shift <= n else shift - n
        return "shifted", f"along dim {dim} it is shifted by {by}"
    if text := _interleaved(source, n):
        return "interleaved", f"along dim {dim} {text}"
    where = f"along dim {dim} {len(moved)} of {n} rows are in another order"
    return "reordered", f"{where} ({_first_moves(source, moved)})"


def _interleaved(source: Tensor, n: int) -> str:
    own = torch.arange(n)
    for blocks in range(2, 13):
        for pieces in range(2, 13):
            if n % (blocks * pieces) == 0:
                laid = own.view(blocks, pieces, -1).transpose(0, 1).reshape(-1)
                if torch.equal(source, laid):
                    return (
                        f"its {blocks} blocks of {n // blocks} are interleaved: piece 1 of "
                        f"{pieces} of each block first, then piece 2 (fused blocks cut as one, or "
                        "one cut as fused blocks)"
                    )
    return ""


def _first_moves(source: Tensor, moved: Tensor) -> str:
    first = [f"{int(i)} is the baseline's {int(source[i])}" for i in moved[:2]]
    return "row " + ", ".join(first)


def parts_text(weights: Tensor, count: int, name: str) -> str:
    """`parts 1 to 3 of 8 (micro_batches) are missing`; '' if every part is in it once, or if many
    parts have so many weights that they explain nothing.
    """
    said, used = [], 0
    for weight in weights.round(decimals=6).unique().tolist():
        some = ((weights - weight).abs() < 2 * CLOSE).nonzero().flatten().tolist()
        if weight != 1:
            are = "is" if len(some) == 1 else "are"
            how = {0.0: "missing", 2.0: "counted twice"}.get(weight, f"counted {weight:.6g} times")
            said.append(f"{spans(some).replace('row', 'part')} {are} {how}")
        used += 1
    if not said or (used > max(3, len(weights) // 2) and len(weights) > 8):
        return ""
    return f"of the {count} parts of the batch ({name}, from 0), {' and '.join(said)}"


def mix_text(weights: Tensor, columns: Sequence[int]) -> str:
    """`part 2 is 1 + 2`: of which parts each part is made; '' if each is itself, or by fractions
    that nobody would have meant.
    """
    said = []
    for i, row in enumerate(weights):
        near = row.round()
        if (row - near).abs().max() > CLOSE or near.min() < 0 or near.max() > 9:
            return ""
        terms = [columns[j] for j in near.nonzero().flatten().tolist() for _ in range(int(near[j]))]
        if terms != [i] and i in columns:
            said.append(f"part {i} is " + (" + ".join(map(str, terms)) or "zero"))
    more = f"; {len(said) - 3} more so" if len(said) > 3 else ""
    return "; ".join(said[:3]) + more


def added_text(c: float, name: str, row: str, e: Evidence) -> str:
    """That every row has `c` times that parameter too much."""
    factor = factor_text(abs(c), e) or f"{abs(c):.6g}"
    many = f"{factor} times {name}" if abs(abs(c) - 1) > CLOSE else name
    how = "too much" if c > 0 else "too little"
    return f"every {row} has {many} {how}: added {_times_text(c, e)}"


def spans(numbers: Sequence[int], most: int = 3) -> str:
    """`rows 0 to 7, 12`: ascending whole numbers in few words."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = [str(a) if a == b else f"{a} to {b}" for a, b in runs[:most]]
    rest = f" and {len(runs) - most} more ranges" if len(runs) > most else ""
    return ("row " if len(numbers) == 1 else "rows ") + ", ".join(said) + rest
