"""The section `parity` at the end of a session: rows to lines, each of which a test can pin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from parity.plugin.row import BAD, COULD_NOT, DIFFERS, EXPECTED, FAILED, PASSED, SKIPPED, Row

MOST = 20  # failures that are listed, and reasons why cases were skipped


def lines(rows: Mapping[str, Row]) -> list[str]:
    """By the id of its test, in the order in which they ended."""
    good = {name: row for name, row in rows.items() if row.status == PASSED}
    found = [counts(rows)]
    if all(row.status == SKIPPED for row in rows.values()):
        return [*found, *skips(rows)]
    tensors, elements = (sum(getattr(r, x) for r in rows.values()) for x in ("tensors", "elements"))
    found.append(f"compared: {tensors:,} tensors, {elements:,} elements")
    found += [text for text in (_worst(good, "error"), _worst(good, "rho")) if text]
    if allowed := _allowed(good):
        found.append(f"any relative error above these would have been flagged: {allowed}")
    found += [
        f"{text}: {name}, and so on" if n > 1 else f"{text}: {name}"
        for text, name, n in _coarse(rows)
    ]
    return [*found, *failures(rows)]


def counts(rows: Mapping[str, Row]) -> str:
    """`4 cases: 2 passed, 1 differs, 1 could not be run`."""
    number = Counter(row.status for row in rows.values())
    cases = "1 case" if len(rows) == 1 else f"{len(rows)} cases"
    if number[SKIPPED] == len(rows):
        return f"{cases}, and nothing was compared: every one is skipped"
    words = {DIFFERS: "differs" if number[DIFFERS] == 1 else "differ", FAILED: "failed otherwise"}
    order = (PASSED, DIFFERS, COULD_NOT, FAILED, EXPECTED, SKIPPED)
    said = [f"{number[status]} {words.get(status, status)}" for status in order if number[status]]
    return f"{cases}: {', '.join(said)}"


def skips(rows: Mapping[str, Row]) -> list[str]:
    reasons = Counter(row.said for row in rows.values()).most_common()
    said = [f"  {reason} ({n} of them)" if n > 1 else f"  {reason}" for reason, n in reasons]
    return [*said[:MOST], *_more(said)]


def failures(rows: Mapping[str, Row]) -> list[str]:
    bad = [(name, row) for name, row in rows.items() if row.status in BAD]
    bad.sort(key=lambda pair: BAD.index(pair[1].status))
    found = []
    for name, row in bad[:MOST]:
        found += [f"{row.status.upper()} {name}   {row.said}", f"  again: {row.again}"]
    return [*found, *_more(bad)]


def _more(everything: list[object] | list[str] | list[tuple[str, Row]]) -> list[str]:
    return [f"and {len(everything) - MOST} more"] * (len(everything) > MOST)


_WORDS = {
    "error": "largest relative error in float64",
    "rho": "largest rho (1 = the baseline's own rounding)",
}


def _worst(rows: Mapping[str, Row], which: str) -> str:
    """Of the cases that passed: what the others show is no rounding."""
    found = [(pair, name) for name, row in rows.items() if (pair := getattr(row, which))]
    if not found:
        return ""
    (size, tensor), name = max(found, key=lambda item: item[0][0])
    number = f"{size:.1e}" if which == "error" else f"{size:.2g}"
    return f"{_WORDS[which]}: {number}, {tensor} in {name}"


def _coarse(rows: Mapping[str, Row]) -> list[tuple[str, str, int]]:
    """What is said, of which case first, and of how many."""
    texts = Counter(row.coarse for row in rows.values() if row.coarse)
    first = {row.coarse: name for name, row in reversed(list(rows.items()))}
    return [(text, first[text], n) for text, n in texts.items()]


def _allowed(rows: Mapping[str, Row]) -> str:
    largest: dict[str, float] = {}
    for row in rows.values():
        for check, bound in row.allowed.items():
            largest[check] = max(bound, largest.get(check, 0.0))
    return ", ".join(f"{check} {bound:.1e}" for check, bound in largest.items())
