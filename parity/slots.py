"""GPUs and CPU cores as slots behind locks, so that launches on one machine do not share them.

A slot is a FIFO in a folder of the user's. Who has locked it has it, until the file is closed: by
the holder, or by the kernel when the holder dies, so that no lock is ever stale. A FIFO also tells
when that happens. Its only writer is its holder, and whoever waits is a reader: the end of the last
writer wakes all readers, after its lock is gone. So one can wait for any of several slots, and
nobody has to look again and again.

All or nothing: a launch that wants several slots first locks the queue in front of them, and only
then takes slot by slot what is free, and what becomes free. Who has a slot never waits for another
one, and who waits for slots is the only one who does, for these: so no two wait for each other. And
small launches stand behind a large one that came before them. All cores have one queue. Each GPU
has its own, as different jobs may see different ones, and they are locked in the order of their
names.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from io import FileIO
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from parity.errors import ParityError, UsageError

# In the environment of ranks, and of what they start: who started them has the slots.
INSIDE = "PARITY_HOLDS_SLOTS"
PATIENCE = 2.0  # seconds of waiting until something is said about it
WIDTH = 512  # bytes for a holder's name


class UnsafeFolder(ParityError):
    """Others could change the locks, or follow them to files that they must not write.

    Remedy: remove the folder that the text names, or set XDG_RUNTIME_DIR to one of your own.
    """


class Slot(NamedTuple):
    """`entry` is what the variable that chooses GPUs calls it; the others are names of files."""

    name: str
    queue: str
    entry: str = ""


@contextmanager
def hold(
    device: str, world: int, groups: int = 1, *, alone: bool = False
) -> Iterator[dict[str, str]]:
    """Have slots for so many groups of ranks, `world` in each, as long as the context lasts; wait
    for them first. Gives what is to be set in the environment of the ranks.

    A rank takes a core, if there are as many. On "cuda" it takes a GPU, if there are as many, and
    if it needs one `alone`, there must be for each group. Raises UsageError where there are not.
    """
    variable, slots = _gpus_of_this_process() if device == "cuda" else ("", cores())
    if device == "cuda":
        _check(world if alone else 1, len(slots))
    # What started this process has the slots for it: it must not wait for that.
    is_inside = INSIDE in os.environ
    count = min(world * groups, len(slots))
    with nullcontext(slots) if is_inside else take(slots, count) as mine:
        told = {INSIDE: os.environ.get(INSIDE, str(os.getpid()))}
        # Said even if all are chosen: the fork server may have started with another list.
        yield {**told, variable: ",".join(slot.entry for slot in mine)} if variable else told


def cores() -> list[Slot]:
    """The cores that this process may use."""
    return [Slot(f"core-{core}", "cores") for core in sorted(os.sched_getaffinity(0))]


def gpus(environ: Mapping[str, str], count: int, is_rocm: bool = False) -> tuple[str, list[Slot]]:
    """The variable that chooses GPUs, and those that it has chosen: the first `count` of its list,
    or of the machine if it is not set.

    An entry is an index or the name of a GPU or of a part of one (GPU-..., MIG-...). Names are not
    looked into: who calls a GPU by its index does not exclude who calls it by its name.
    """
    known = (
        ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if is_rocm else ("CUDA_VISIBLE_DEVICES",)
    )
    variable = next((name for name in known if name in environ), known[0])
    every = ",".join(map(str, range(count)))
    entries = [entry.strip() for entry in environ.get(variable, every).split(",")]
    # ROCm has a list below that list: the indices of the one are places in the other.
    below = environ.get("ROCR_VISIBLE_DEVICES", "") if is_rocm else ""
    places = {str(i): name.strip() for i, name in enumerate(below.split(",")) if name}
    slots = {}
    for entry in takewhile(lambda e: e and not e.startswith("-"), entries[:count]):
        name = f"gpu-{quote(places.get(entry, entry), safe='')}"
        slots[name] = Slot(name, f"{name}.queue", entry)
    return variable, list(slots.values())


def _gpus_of_this_process() -> tuple[str, list[Slot]]:
    import torch

    return gpus(os.environ, torch.cuda.device_count(), torch.version.hip is not None)


def _check(needed: int, visible: int) -> None:
    if not visible:
        raise UsageError("no GPU is visible; use the device cpu")
    if needed > visible:
        raise UsageError(
            f"{needed} ranks need a GPU each, and {visible} are visible; use fewer ranks, or the "
            "backend parity, where ranks share them"
        )


@contextmanager
def take(slots: Sequence[Slot], count: int, patience: float = PATIENCE) -> Iterator[list[Slot]]:
    """Have `count` of the slots, whichever are free first, as long as the context lasts."""
    with ExitStack() as held:
        with _folder() as folder, _Notice(folder, slots, count, patience) as notice:
            taking = _Taking(folder, slots, count, held, notice)
            taking.take_all()
        yield [slot for slot in slots if slot in taking.taken]


class _Taking:
    """On the way to `count` slots; `held` has the locks of those that are `taken`."""

    def __init__(
        self, folder: int, slots: Sequence[Slot], count: int, held: ExitStack, notice: _Notice
    ) -> None:
        self.folder, self.slots, self.count = folder, slots, count
        self.held, self.notice = held, notice
        self.taken: set[Slot] = set()

    def take_all(self) -> None:
        with ExitStack() as queues:
            for name in sorted({slot.queue for slot in self.slots}):
                queue = queues.enter_context(_open(self.folder, name, os.O_RDWR | os.O_CREAT))
                if not _lock(queue):
                    self.notice.start()
                    fcntl.flock(queue, fcntl.LOCK_EX)
            if not self._take(self.slots):
                self.notice.start()
                self._wait()

    def _take(self, slots: Sequence[Slot]) -> bool:
        """Take what is free of these, and tell whether that is all that was wanted."""
        for slot in slots:
            if len(self.taken) < self.count and slot not in self.taken:
                with ExitStack() as unless_free:
                    file = unless_free.enter_context(_fifo(self.folder, slot.name, os.O_RDWR))
                    if _lock(file):
                        self.held.push(unless_free.pop_all())
                        self.taken.add(slot)
                        _sign(self.folder, slot)
        return len(self.taken) == self.count

    def _wait(self) -> None:
        bells = select.poll()
        with ExitStack() as readers:
            by_reader: dict[int, Slot] = {}
            for slot in self.slots:
                flags = os.O_RDONLY | os.O_NONBLOCK
                reader = readers.enter_context(_fifo(self.folder, slot.name, flags))
                bells.register(reader, 0)  # that the last writer went is told in any case
                by_reader[reader.fileno()] = slot
            # Once more, now that there are bells: who went before has rung none.
            ready = self.slots
            while not self._take(ready):
                ready = [by_reader[fd] for fd, _ in bells.poll()]


class _Notice:
    """Says once, after a while, what is waited for and who has it."""

    def __init__(self, folder: int, slots: Sequence[Slot], count: int, patience: float) -> None:
        self.folder, self.slots, self.count = folder, slots, count
        self.timer = threading.Timer(patience, self._say)
        self.timer.daemon = True

    def start(self) -> None:
        if self.timer.ident is None:
            self.timer.start()

    def __enter__(self) -> _Notice:
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        if self.timer.ident is not None:
            self.timer.join()

    def _say(self) -> None:
        holders = list(dict.fromkeys(filter(None, map(self._holder, self.slots))))
        kind = "CPU cores" if self.slots[0].queue == "cores" else "GPUs"
        text = f"parity: waits for {self.count} of {len(self.slots)} {kind}"
        by = f", held by {'; '.join(holders)}" if holders else ""
        print(text + by, file=sys.stderr, flush=True)

    def _holder(self, slot: Slot) -> str:
        """Nobody, if it is free, or this process's own already."""
        with suppress(FileNotFoundError, ValueError):
            with _open(self.folder, slot.name, os.O_RDONLY | os.O_NONBLOCK) as fifo:
                if _lock(fifo):
                    return ""
            with _open(self.folder, f"{slot.name}.holder", os.O_RDONLY) as file:
                pid, _, command = file.read().decode(errors="replace").strip().partition(" ")
            if int(pid) != os.getpid():
                return f"pid {pid} ({command})"
        return ""


def _lock(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(folder: int, slot: Slot) -> None:
    """Leave word of who has it. Of a worker of pytest the test says more than the command."""
    command = os.environ.get("PYTEST_CURRENT_TEST") or " ".join(sys.orig_argv)
    text = f"{os.getpid()} {' '.join(command.split())[:100]}"
    with _open(folder, f"{slot.name}.holder", os.O_WRONLY | os.O_CREAT) as file:
        # Of one length, so that it need not be truncated: file systems write that out at once.
        file.write(text.encode(errors="replace").ljust(WIDTH))


def _fifo(folder: int, name: str, flags: int) -> FileIO:
    with suppress(FileNotFoundError):
        return _open(folder, name, flags)
    with suppress(FileExistsError):
        os.mkfifo(name, 0o600, dir_fd=folder)
    return _open(folder, name, flags)


def _open(folder: int, name: str, flags: int) -> FileIO:
    """A file that no process inherits, and that is closed even if nobody came to close it."""

    def opener(path: str, _: int) -> int:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)

    mode = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "r+"}[flags & os.O_ACCMODE]
    return FileIO(name, mode, opener=opener)


@contextmanager
def _folder() -> Iterator[int]:
    """The user's own folder, as a descriptor: what was checked is what is used."""
    path = folder_path()
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise UnsafeFolder(f"{path}: no folder for locks: {error.strerror}; remove it") from error
    try:
        state = os.fstat(folder)
        if state.st_uid != os.geteuid():
            raise UnsafeFolder(f"{path}: belongs to somebody else (user {state.st_uid})")
        if stat.S_IMODE(state.st_mode) & 0o077:
            raise UnsafeFolder(f"{path}: others may write or read it; remove it, or chmod 700 it")
        yield folder
    finally:
        os.close(folder)


def folder_path() -> Path:
    """Where all processes of this user meet."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = runtime if os.path.isdir(runtime) else tempfile.gettempdir()
    return Path(base) / f"parity-slots-{os.geteuid()}"
