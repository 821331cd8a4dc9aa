"""What GitHub Actions shows: a summary in Markdown, and a few annotations at the tests' lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from parity.plugin import summary
from parity.plugin.row import BAD, Row

BUDGET = 200_000  # bytes; past 1 MiB for a step GitHub drops all of it
ANNOTATIONS = 5  # GitHub shows ten for a step, and ours may not be the only ones


class Place(NamedTuple):
    """Where the test is: a file from the top of the repository, and a line from 1 on."""

    file: str
    line: int


def markdown(rows: Mapping[str, Row], budget: int = BUDGET) -> str:
    """The failures first; what does not fit is counted."""
    ordered = sorted(rows.items(), key=lambda pair: pair[1].status not in BAD)
    head = [
        "## parity",
        "",
        summary.counts(rows),
        "",
        "| test | status | largest error in float64 | largest rho | |",
        "|---|---|---|---|---|",
    ]
    found, left = "\n".join(head) + "\n", len(ordered)
    for name, row in ordered:
        line = _line(name, row)
        if len((found + line).encode()) > budget - 100:
            break
        found, left = found + line, left - 1
    return found + (f"\n{left} more rows are left out.\n" if left else "")


def _line(name: str, row: Row) -> str:
    cells = [
        name,
        row.status,
        f"{row.error[0]:.1e} {row.error[1]}" if row.error else "",
        f"{row.rho[0]:.2g} {row.rho[1]}" if row.rho else "",
        row.said,
    ]
    return f"| {' | '.join(map(_cell, cells))} |\n"


def _cell(text: str) -> str:
    """As it is: nothing in it is Markdown, or HTML."""
    for old, new in (("&", "&amp;"), ("<", "&lt;"), ("\n", " "), ("\r", " ")):
        text = text.replace(old, new)
    for character in "\\|`*_[]":
        text = text.replace(character, f"\\{character}")
    return text


def commands(rows: Mapping[str, Row], places: Mapping[str, Place]) -> list[str]:
    """Commands for the log, the worst first; the last line says how many were withheld."""
    bad = [(name, row) for name, row in rows.items() if row.status in BAD]
    bad.sort(key=lambda pair: (BAD.index(pair[1].status), -pair[1].size))
    said = [_annotation(name, row, places.get(name)) for name, row in bad[:ANNOTATIONS]]
    more = len(bad) - len(said)
    return [*said, *([f"parity: {more} more annotations are withheld"] if more else [])]


def _annotation(name: str, row: Row, place: Place | None) -> str:
    where = [] if place is None else [f"file={_property(place.file)}", f"line={place.line}"]
    properties = ",".join([*where, f"title={_property(f'{row.status}: {name}')}"])
    text = f"{row.said}\nagain: {row.again}"
    return f"::error {properties}::{_data(text)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
