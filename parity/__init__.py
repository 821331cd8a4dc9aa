"""Is the parallel program the same function as the one-device program? PASS or FAIL, and where."""

from parity.bounds import nudge
from parity.case import Case, Run
from parity.errors import ParityError, RanksFailed, TraceError, UsageError
from parity.launch import Backend, launch
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
]
__version__ = "0.1.0"
