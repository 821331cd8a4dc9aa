"""What becomes of one item, in a few numbers and words: what a worker tells the controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, DIFFERS, COULD_NOT, FAILED = "passed", "differs", "could not be run", "failed"
SKIPPED, EXPECTED = "skipped", "failed as expected"
BAD = (DIFFERS, COULD_NOT, FAILED)  # the worst first

KEY = "parity"  # of the one property that holds a row on its way


@dataclass(frozen=True)
class Row:
    """Of JSON's types only, since it travels among the properties of a test's report."""

    case: str
    status: str
    seconds: float = 0.0
    tensors: int = 0
    elements: int = 0
    error: tuple[float, str] | None = None  # the largest in float64, and of what
    rho: tuple[float, str] | None = None  # the largest in a working dtype
    allowed: Mapping[str, float] = field(default_factory=dict)  # by check: the largest bound
    coarse: str = ""  # in which dtypes the baseline rounds more coarsely than they do
    said: str = ""  # a line: where it first differs, why it could not be run, why it was skipped
    size: float = 0.0  # how far off it is there
    again: str = ""
    document: Mapping[str, Any] | None = None  # for --parity-json

    def as_property(self) -> tuple[str, object]:
        return KEY, asdict(self)

    def for_junit(self) -> list[tuple[str, object]]:
        """Few and short: strict readers count them."""
        found: list[tuple[str, object]] = [("parity_case", self.case), (_STATUS, self.status)]
        if self.tensors:
            found += [("parity_tensors", self.tensors), ("parity_elements", self.elements)]
        if self.error is not None:
            found.append(("parity_error", f"{self.error[0]:.1e}"))
        if self.rho is not None:
            found.append(("parity_rho", f"{self.rho[0]:.2g}"))
        if self.status in BAD:
            found += [("parity_first", self.said), ("parity_again", self.again)]
        return found


_STATUS = "parity_status"


def take(properties: list[tuple[str, Any]]) -> Row | None:
    """The row among the properties, which is removed from them."""
    rows = [value for name, value in properties if name == KEY]
    properties[:] = [pair for pair in properties if pair[0] != KEY]
    return Row(**rows[-1]) if rows else None
