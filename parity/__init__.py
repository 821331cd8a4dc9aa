"""Is the parallel program the same function as the one-device program? PASS or FAIL, and where.

Names are loaded when they are first used: asking for help, or loading a plugin, needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity import strategies as strategies
    from parity.bounds import nudge
    from parity.case import Case, Run
    from parity.cases import matrix
    from parity.errors import ParityError, RanksFailed, TraceError, UsageError
    from parity.launcher import Backend, launch
    from parity.modules import record_modules
    from parity.offline.recorder import record
    from parity.ranks import world
    from parity.subject.alignment import held
    from parity.subject.check import Differs, TestCase
    from parity.subject.layout import Layout, layout
    from parity.subject.program import Program
    from parity.trace import Trace

__all__ = [
    "Backend",
    "Case",
    "Differs",
    "Layout",
    "ParityError",
    "Program",
    "RanksFailed",
    "Run",
    "TestCase",
    "Trace",
    "TraceError",
    "UsageError",
    "held",
    "launch",
    "layout",
    "matrix",
    "nudge",
    "record",
    "record_modules",
    "world",
]
__version__ = "0.1.0"

_HOME = {
    "Backend": "launcher",
    "Case": "case",
    "Differs": "subject.check",
    "ParityError": "errors",
    "RanksFailed": "errors",
    "Run": "case",
    "Program": "subject.program",
    "TestCase": "subject.check",
    "held": "subject.alignment",
    "launch": "launcher",
    "Layout": "subject.layout",
    "layout": "subject.layout",
    "matrix": "cases",
    "Trace": "trace",
    "TraceError": "errors",
    "UsageError": "errors",
    "nudge": "bounds",
    "record": "offline.recorder",
    "record_modules": "modules",
    "world": "ranks",
}


def __getattr__(name: str) -> Any:
    if name == "strategies":  # not in __all__: it needs hypothesis, which is optional
        return import_module("parity.strategies")
    if name in _HOME:
        return getattr(import_module(f"parity.{_HOME[name]}"), name)
    raise AttributeError(f"module 'parity' has no attribute '{name}'")
