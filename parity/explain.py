"""Culprits in words: two lines each under a failed case, and the whole neighbourhood on demand."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from parity.culprit import Culprit

PLAIN = 1e-9  # residuals below explain everything


def lines(culprits: Sequence[Culprit]) -> list[str]:
    """What the report of a failed case says about where and what."""
    said = []
    for i, culprit in enumerate(culprits):
        name = "culprit" if i == 0 else "and, with that put right"
        said += [f"{name}: {culprit.verdict.key}", f"  {culprit.where}", *_why(culprit)]
    if not culprits:
        said = [
            "run again with everything recorded it agreed with the first baseline: it is not "
            "the same in every run (a step may count its calls), or another baseline alone differs"
        ]
    return said


def _why(culprit: Culprit) -> list[str]:
    said = [f"  {fit.text}{_left(fit.residual)}" for fit in culprit.fits]
    said = said or ["  no simple explanation fits"]
    if culprit.alike:
        count = len(culprit.alike)
        said.append(
            f"  so {'is' if count == 1 else 'are'} {count} more, such as {culprit.alike[0]}"
        )
    if culprit.hint:
        said.append(f"  {culprit.hint}")
    if culprit.backward:
        found = [f"{c.verdict.key}{_reason(c)}" for c in culprit.backward]
        said.append(f"  its backward differs with it: {', '.join(found)}")
    return said


def _reason(culprit: Culprit) -> str:
    return f" ({culprit.fits[0].text})" if culprit.fits else ""


def _left(residual: float) -> str:
    return f" (but for {residual:.0e} of the difference)" if residual > PLAIN else ""


def neighbourhood(culprit: Culprit) -> str:
    """The records before and after in program order, and what each rank holds of the culprit."""
    rows = [
        [
            ">" if v is culprit.verdict else "",
            v.key,
            v.status,
            f"{v.error:.1e}",
            f"{v.allowed:.1e}",
            _place(v.place, v.got, v.want) if not v.good else "",
        ]
        for v in culprit.nearby
    ]
    head = ["", "record", "verdict", "error", "allowed", "worst element"]
    table = tabulate(rows, head, disable_numparse=True, tablefmt="simple")
    return "\n\n".join([table, *([_pieces(culprit)] if culprit.pieces else [])])


def _place(place: Sequence[int], got: float, want: float) -> str:
    return f"{list(place)}: got {got:.6g}, want {want:.6g}" if place else ""


def _pieces(culprit: Culprit) -> str:
    rows = [
        [
            f"rank {p.rank}",
            " ".join(f"{axis}={place}" for axis, place in p.at.items()),
            _box(p.offset, p.shape),
            f"{p.error:.1e}",
        ]
        for p in culprit.pieces
    ]
    head = [f"{culprit.verdict.key}, by rank", "at", "holds", "relative error"]
    return tabulate(rows, head, disable_numparse=True, tablefmt="simple")


def _box(offset: Sequence[int], shape: Sequence[int]) -> str:
    return "[" + ", ".join(f"{i}:{i + n}" for i, n in zip(offset, shape, strict=True)) + "]"
