"""An item while it runs: its seed, its deadline, what it compared, and what is said of it.

Torch is loaded by `begin`, so in sessions that run no case it is never loaded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from parity.case import Case
from parity.errors import ParityError
from parity.plugin import row as rows
from parity.plugin import shared as sharing
from parity.plugin import timeouts
from parity.plugin.row import Row

if TYPE_CHECKING:
    from torch import Tensor

    from parity.run import Result
    from parity.subject.check import TestCase

MARK = "parity"


class ComparedNothing(ParityError):
    """A test that holds nothing against anything must not look like success."""


@dataclass
class Running:
    """`results` is what `case.check` appends to, as the test goes on."""

    began: float
    generator: Tensor  # the state of torch's before
    results: list[Result] = field(default_factory=list)
    has_case: bool = False


RUNNING = pytest.StashKey[Running]()


def case_of(item: pytest.Item) -> Case | None:
    """Of a case of a test, or of a matrix file; None for any other item."""
    found = [mark.kwargs["case"] for mark in item.iter_markers(MARK) if "case" in mark.kwargs]
    return found[0] if found else None


def begin(item: pytest.Item) -> None:
    began = time.monotonic()
    import torch

    item.user_properties[:] = [p for p in item.user_properties if p[0] != rows.KEY]  # of a rerun
    item.stash[RUNNING] = Running(began, torch.get_rng_state())
    seed(item)


def seed(item: pytest.Item) -> None:
    """So that a test draws the same numbers in all its cases, in whichever process they run."""
    import torch

    torch.manual_seed(sharing.of(item).options.seed or 0)


def end(item: pytest.Item) -> None:
    if RUNNING in item.stash:
        import torch

        torch.set_rng_state(item.stash[RUNNING].generator)


def deadline(item: pytest.Item, usual: float) -> float:
    """For one launch; pytest-timeout's limit is for all that the item does."""
    return min(usual, timeouts.left(item, time.monotonic() - item.stash[RUNNING].began))


def test_case(item: pytest.Item, case: Case) -> TestCase:
    from parity.subject.check import TestCase, how

    shared, running = sharing.of(item), item.stash[RUNNING]
    usual, _ = how(shared.wish)
    backend = replace(usual.backend, deadline=deadline(item, usual.backend.deadline))
    made = TestCase(case, replace(usual, backend=backend, again=sharing.typed(item)), shared.kept)
    running.results, running.has_case = made.results, True
    return made


def check_compared(item: pytest.Item) -> None:
    results = item.stash[RUNNING].results
    if not results and not item.stash[RUNNING].has_case:
        raise ComparedNothing(
            "it compared nothing: its fixture `case` is another one: rename yours"
        )
    if not results:
        raise ComparedNothing("it compared nothing: call case.check(...)")
    if not sum(result.compared[0] for result in results):
        raise ComparedNothing("it compared nothing: there is no element in any of its tensors")


def make_report(item: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport) -> None:
    """Of our own errors the text is all; and once an item is decided, it gets its row."""
    if case_of(item) is None:
        return
    error = call.excinfo.value if call.excinfo is not None else None
    text = _text(error, sharing.typed(item))
    if report.failed and text:
        report.longrepr = text
    if report.when == "call" or (report.when == "setup" and not report.passed):
        row = _row(item, report, _status(report, error), text)
        item.user_properties.append(row.as_property())
        report.user_properties = list(item.user_properties)


def _text(error: BaseException | None, again: str) -> str:
    """What is said of an error of ours; empty for others, which pytest shows with their frames."""
    if not (isinstance(error, ParityError) or _differs(error)):
        return ""
    text = str(error)
    last = f"again: {again}"
    return text if text.endswith(last) else f"{text}\n  {last}"


def _differs(error: BaseException | None) -> bool:
    import sys

    module = sys.modules.get("parity.subject.check")  # who has not loaded it has raised none
    return module is not None and isinstance(error, module.Differs)


def _status(report: pytest.TestReport, error: BaseException | None) -> str:
    if hasattr(report, "wasxfail"):
        return rows.EXPECTED if report.skipped else rows.PASSED
    if report.skipped:
        return rows.SKIPPED
    if report.passed:
        return rows.PASSED
    if _differs(error):
        return rows.DIFFERS
    is_ours = isinstance(error, ParityError) and not isinstance(error, ComparedNothing)
    return rows.COULD_NOT if is_ours else rows.FAILED


def _row(item: pytest.Item, report: pytest.TestReport, status: str, text: str) -> Row:
    case = case_of(item)
    assert case is not None
    results = item.stash[RUNNING].results if RUNNING in item.stash else []
    made = Row(
        case.id,
        status,
        report.duration,
        said=_said(report, text) if status != rows.PASSED else "",
        again=sharing.typed(item) if status in rows.BAD else "",
        document=_document(results) if sharing.of(item).options.json else None,
    )
    return _with_numbers(made, results) if results else made


def _said(report: pytest.TestReport, text: str) -> str:
    """One line."""
    if isinstance(report.longrepr, tuple):  # a skip: path, line, and why
        return report.longrepr[2].removeprefix("Skipped: ")
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    lines = text.splitlines()
    if lines and lines[0].startswith("ERROR "):  # the line below it says why
        lines = lines[1:]
    if not lines:
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = str(report.longrepr if crash is None else crash.message).splitlines()
    return lines[0].strip() if lines else ""


def _with_numbers(row: Row, results: Sequence[Result]) -> Row:
    from parity.judge import LOGIC
    from parity.report import cell
    from parity.trace import CHECKS

    judged = [j for result in results for j in result.judged]
    logic = [(v.error, str(v.key)) for j in judged if j.run.dtype == LOGIC for v in j.verdicts]
    working = [(v.rho, str(v.key)) for j in judged if j.run.dtype != LOGIC for v in j.verdicts]
    bounds = {check: cell(judged, check).allowed for check in CHECKS}
    first = next((r.first_divergence for r in results if r.first_divergence is not None), None)
    said, size = row.said, 0.0
    if first is not None and row.status == rows.DIFFERS:
        said, size = f"first divergence: {first[1].key}", first[1].error
    return replace(
        row,
        tensors=sum(result.compared[0] for result in results),
        elements=sum(result.compared[1] for result in results),
        error=max(logic, default=None),
        rho=max(working, default=None),
        coarse=next((result.coarse for result in results if result.coarse), ""),
        allowed={check: bound for check, bound in bounds.items() if bound is not None},
        said=said,
        size=size,
    )


def _document(results: Sequence[Result]) -> dict[str, Any]:
    from parity.document import case_json

    return {"comparisons": [case_json(result) for result in results]}
