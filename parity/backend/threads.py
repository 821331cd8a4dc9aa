"""Which threads of this process can go on only if another one of them does: the kernel's view.

A thread that sits in C++ until a future is kept, or in Python until another thread ends, has made
no call of ours and looks as free as one that computes. The kernel tells them apart: such a thread
sleeps on a private futex, without a time to wake up. Where it does not say (no Linux, another
processor), every thread counts as free: rather no word of a deadlock than a false one.
"""

from __future__ import annotations

import os
import platform
import sysconfig
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_FUTEX = {"x86_64": "202", "aarch64": "98"}.get(platform.machine())
_PRIVATE = 128  # FUTEX_PRIVATE_FLAG: only this process can wake the sleeper
_WAITS = (0, 9)  # FUTEX_WAIT, FUTEX_WAIT_BITSET
_COMMAND = 127
_TASKS = Path("/proc/self/task")
# Python's own code, what is installed, and ours: a monitor that a library runs calls nothing.
_INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(__file__).parents[1]),
    "<frozen",
)


class Stand(NamedTuple):
    """Of one thread, at one time."""

    switches: str  # how often it has slept and been interrupted: a number for each
    is_asleep: bool
    is_parked: bool  # until another thread of this process wakes it


def look() -> dict[int, Stand]:
    """By the kernel's number of the thread; empty where it cannot be told."""
    try:
        return {int(task): _stand(_TASKS / task) for task in os.listdir(_TASKS)}
    except (OSError, KeyError, ValueError):  # no such folder here, or a thread ends meanwhile
        return {}


def _stand(task: Path) -> Stand:
    status = dict(
        line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line
    )
    call, *rest = (task / "syscall").read_text().split()
    return Stand(
        f"{status['voluntary_ctxt_switches']} {status['nonvoluntary_ctxt_switches']}",
        status["State"].startswith("S"),
        call == _FUTEX and _is_for_ever(*(int(word, 16) for word in rest[1:4])),
    )


def _is_for_ever(operation: int, value: int, until: int) -> bool:
    return bool(operation & _PRIVATE) and operation & _COMMAND in _WAITS and not until


def parked(
    before: dict[int, Stand], now: dict[int, Stand], waiting: Collection[int]
) -> set[int | None]:
    """The Python threads (`threading.get_ident()`) that only those of `waiting` (by the kernel's
    number) could wake.

    None if any other may act: one that has run between the looks, or sleeps for a time or for a
    word from outside. But of threads that run no Python (servers of a store, pools at rest), sleep
    is enough.
    """
    python = {thread.native_id: thread.ident for thread in threading.enumerate()}
    found: set[int | None] = set()
    for task, stand in now.items():
        if task in waiting:
            continue
        if not stand.is_asleep or before.get(task) != stand:
            return set()
        if task in python:
            if not stand.is_parked:
                return set()
            found.add(python[task])
    return found


def may_call(
    running: Mapping[int, FrameType], alive: Mapping[int | None, threading.Thread]
) -> Iterator[int]:
    """Of the threads that run Python, those that may make a call though they never did: all that
    are no daemons, and daemons of which a function of the user's own is on the stack. A thread that
    `threading` does not know is nobody's daemon.
    """
    for ident, frame in running.items():
        thread = alive.get(ident)
        if thread is None or not thread.daemon or _is_the_users(frame):
            yield ident


def _is_the_users(frame: FrameType | None) -> bool:
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_INSTALLED):
            return True
        frame = frame.f_back
    return False
