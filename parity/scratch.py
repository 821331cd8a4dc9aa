"""Folders for the time that something runs; what a killed process left goes when the next begins.

A folder is locked by the process that made it (flock: the kernel lets go of it however the process
ends), so one that nobody has locked is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PREFIX, LOCK = "parity-run-", ".parity-lock"


class Scratch:
    """A new folder at `path`, removed with this object, at `close`, or behind a `with`."""

    def __init__(self) -> None:
        sweep()
        # Under another name until it is locked: a sweep must not find it before.
        draft = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
        lock = os.open(draft / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: nobody is to take it for abandoned
            (draft / LOCK).unlink()
        self.path = draft.rename(draft.with_name(draft.name[1:]))
        self._end = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        self._end()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a fork of it has the object too
        _empty(path)
        os.close(lock)


def _empty(path: Path) -> None:
    """The lock at last: what is left when this is cut short can be found again."""
    inside = [] if path.is_symlink() else [e for e in path.glob("*") if e.name != LOCK]
    for entry in inside:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()
    shutil.rmtree(path, ignore_errors=True)


@functools.cache
def sweep() -> None:
    """Once per process: remove this user's folders that nobody has locked."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # somebody else's, or being removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _empty(path)
        except OSError:  # in use
            pass
        finally:
            os.close(lock)
