"""Is the parallel program the same function as the one-device program? PASS or FAIL, and where.

Names are loaded when they are first used: asking for help, or loading a plugin, needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.bounds import nudge
    from parity.case import Case, Run
    from parity.errors import ParityError, RanksFailed, TraceError, UsageError
    from parity.launcher import Backend, launch
    from parity.modules import record_modules
    from parity.offline.recorder import record
    from parity.ranks import world
    from parity.trace import Trace

__all__ = [
    "Backend",
    "Case",
    "ParityError",
    "RanksFailed",
    "Run",
    "Trace",
    "TraceError",
    "UsageError",
    "launch",
    "nudge",
    "record",
    "record_modules",
    "world",
]
__version__ = "0.1.0"

_HOME = {
    "Backend": "launcher",
    "Case": "case",
    "ParityError": "errors",
    "RanksFailed": "errors",
    "Run": "case",
    "launch": "launcher",
    "Trace": "trace",
    "TraceError": "errors",
    "UsageError": "errors",
    "nudge": "bounds",
    "record": "offline.recorder",
    "record_modules": "modules",
    "world": "ranks",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"parity.{_HOME[name]}"), name)
    raise AttributeError(f"module 'parity' has no attribute '{name}'")
