"""Run a function on n fresh ranks of this host, and say what became of each.

One fork server with torch loaded starts them (parity.forkserver), so a rank costs milliseconds,
shares nothing with the rank before it, and a crash stays its own. A launch waits until there are
cores, or GPUs, for it (parity.slots). The parent supervises: any rank's exception with the rank's
name, the signal that ended one, and on the deadline each rank's Python stack. Whatever happens, no
rank outlives the call; and should the parent itself be killed, the kernel ends the ranks.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing import current_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

from parity import forkserver, slots
from parity import rank as rank_side
from parity.backend.settings import Settings
from parity.errors import RanksFailed
from parity.scratch import Scratch

# Seconds that the others get to fail by themselves, or to end, once one rank has failed: what they
# say about it (a closed connection, a wrong size) belongs into the report.
GRACE = 3.0


@dataclass(frozen=True)
class Backend:
    """Where ranks run and how they talk: `parity`, the checking backend over shared memory, or
    gloo between processes, or NCCL between GPUs.
    """

    name: str = "parity"
    device: str = "cpu"
    deadline: float = 300.0  # seconds for one launch
    settings: Settings = field(default_factory=Settings)  # of the checking backend alone


@dataclass
class _Rank:
    number: int
    process: ForkServerProcess
    pipe: Connection
    folder: Path
    outcome: rank_side.Outcome | None = None

    @property
    def is_over(self) -> bool:
        return self.outcome is not None


def launch(
    function: Callable[..., Any], world: int, *args: Any, backend: Backend | None = None
) -> list[Any]:
    """Call `function(*args)` on every rank of a new group, and return what each rank returned.

    The function must be importable, its result picklable. Inside it torch.distributed is
    initialised, also for one rank. Raises RanksFailed unless every rank returned.
    """
    return launch_groups(function, world, [args], backend=backend)[0]


def launch_groups(
    function: Callable[..., Any],
    world: int,
    groups: Sequence[tuple[Any, ...]],
    *,
    backend: Backend | None = None,
    is_script: bool = False,
) -> list[list[Any]]:
    """As `launch`, for several groups side by side that know nothing of each other: one for each
    element of `groups`, which holds its arguments. One that fails ends them all. A script is
    called with its rank, joins the group by itself, and prints where this process does.
    """
    _check_not_repeated(function)
    backend = backend or Backend()
    needs = slots.hold(backend.device, world, len(groups), alone=backend.name == "nccl")
    # Waiting for slots is none of the deadline's time, and leaves nothing behind if it is ended.
    with needs as environment, Scratch() as folder:
        ranks: list[_Rank] = []
        try:
            for place in range(len(groups) * world):
                group, number = divmod(place, world)
                seat = rank_side.Seat(
                    number,
                    world,
                    backend.name,
                    backend.device,
                    backend.deadline,
                    str(folder / f"group{group}"),
                    backend.settings,
                    environment,
                    place,
                    is_script,
                )
                ranks.append(_start(seat, function, groups[group]))
            _supervise(ranks, time.monotonic() + backend.deadline)
            outcomes = [r.outcome for r in ranks if r.outcome is not None]
            if any(outcome.kind != "returned" for outcome in outcomes):
                raise _failure(ranks, backend)
            values = [pickle.loads(outcome.value) for outcome in outcomes]  # noqa: S301
            return [values[i * world : (i + 1) * world] for i in range(len(groups))]
        finally:
            _end(ranks)


def _start(seat: rank_side.Seat, function: Callable[..., Any], args: tuple[Any, ...]) -> _Rank:
    context = forkserver.context()
    own = Path(seat.folder) / f"rank{seat.rank}"
    own.mkdir(parents=True)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=rank_side.main, args=(theirs, seat, function, args), name=f"parity rank {seat.rank}"
    )
    is_ours = str(getattr(function, "__module__", "")).startswith("parity.")
    with _no_main() if is_ours else nullcontext():
        process.start()
    theirs.close()
    return _Rank(seat.rank, process, ours, own)


def _check_not_repeated(function: Callable[..., Any]) -> None:
    """A new process runs the main program again to find its functions there: without a guard it
    would start ranks of its own, and those again.
    """
    if getattr(current_process(), "_inheriting", False):
        name = getattr(function, "__qualname__", repr(function))
        sys.stderr.write(
            f"parity: the rank that is to run {name} loads your script first, and came to the call "
            'that starts ranks there: put that call under `if __name__ == "__main__":`\n'
        )
        raise SystemExit(1)


_MAIN = threading.Lock()  # two threads may launch ranks


@contextmanager
def _no_main() -> Iterator[None]:
    """Meanwhile the main program is not to be run again in new processes, which multiprocessing
    does so that they find its functions: ours bring theirs along. A script needs no guard then.
    """
    with _MAIN:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _supervise(ranks: list[_Rank], deadline: float) -> None:
    """Wait until all ranks are over, or one has failed and the grace is up, or the deadline."""
    while any(not r.is_over for r in ranks):
        left = deadline - time.monotonic()
        if left <= 0:
            _interrupt(ranks)
            return
        waiting = {r.pipe: r for r in ranks if not r.is_over}
        for pipe in wait(list(waiting), timeout=left):
            current = waiting[pipe]  # type: ignore[index]
            current.outcome = _receive(current)
            if current.outcome.kind != "returned":
                deadline = min(deadline, time.monotonic() + GRACE)


def _receive(r: _Rank) -> rank_side.Outcome:
    with suppress(EOFError, ConnectionError):
        return rank_side.Outcome(*pickle.loads(r.pipe.recv_bytes()))  # noqa: S301
    r.process.join(GRACE)
    code = r.process.exitcode
    if code is not None and code < 0:
        known = {s.value: s.name for s in signal.Signals}
        how = f"was killed by {known.get(-code, f'signal {-code}')}"
    else:
        how = f"ended with exit code {code} and without a result"
    return rank_side.Outcome("died", how, "", time.time())


def _interrupt(ranks: list[_Rank]) -> None:
    """Ask every rank that still runs for its Python stack."""
    for r in ranks:
        if not r.is_over and r.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(r.process.pid, rank_side.STACK_SIGNAL)
    patience = time.monotonic() + 1.0
    for r in ranks:
        if not r.is_over:
            stack = _read_stack(r.folder / rank_side.STACK, patience)
            kind, where = _where(stack)
            r.outcome = rank_side.Outcome(kind, where, stack, time.time())


def _read_stack(path: Path, patience: float) -> str:
    """The dump is written by a signal handler of the rank, line by line: it comes at once, or not
    at all, and what no longer grows is whole.
    """
    text, before = "", None
    while time.monotonic() < patience and not (text and text == before):
        before = text
        time.sleep(0.05 if text else 0.01)
        text = path.read_text() if path.exists() else ""
    return text


# Whose frames are not the user's: Python's, the installed packages', and ours.
_LIBRARY = (
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
    f'"{Path(__file__).parent}{os.sep}',
    '"<',
)
_ENGINE = f'"{Path(__file__).parent / "backend" / "engine.py"}"'
_COLLECTIVES = f'"{Path(dist.__file__).parent / "distributed_c10d.py"}"'


def _where(stack: str) -> tuple[str, str]:
    """Where a rank stands, in words, and whether it waits for others: ("waits" or "is", text)."""
    frames = [line.strip()[5:] for line in stack.splitlines() if line.strip().startswith("File ")]
    own = next((f for f in frames if not any(part in f for part in _LIBRARY)), None)
    calls = [f.rsplit(" ", 1)[1] for f in frames if f.startswith(_COLLECTIVES)]
    calls += ["a call to others" for f in frames if f.startswith(_ENGINE)]
    place = own or "a place outside of the program's own code"
    return (
        ("waits", f"waits in {calls[0]}, called at {place}") if calls else ("is", f"is at {place}")
    )


def _failure(ranks: list[_Rank], backend: Backend) -> RanksFailed:
    """Causes before consequences: a rank that raised of its own accord or died, by time; then what
    only followed (a broken connection, a wait that never ended). Of ranks that hang, the ones that
    wait for nobody come first. One traceback is enough: that of the first in this order.
    """
    order = ("raised", "died", "is", "lost", "waits", "returned")
    found = [(r, r.outcome) for r in ranks if r.outcome is not None]
    found.sort(key=lambda item: (order.index(item[1].kind), item[1].when, item[0].number))
    first = found[0][1].kind
    late = first in ("is", "waits")
    head = f"not done after {backend.deadline:g} s, the deadline; " if late else ""
    who = _who(found)
    spoken = [(who.pop(r.number), o) for r, o in found if r.number in who]
    lines = [f"{'' if i else head}{name} {o.summary}" for i, (name, o) in enumerate(spoken)]
    if found[0][1].detail and not late:
        lines[1:1] = [f"    {line}" for line in found[0][1].detail.rstrip().splitlines()]
    for r, outcome in found:
        if outcome.kind in ("raised", "died"):
            lines += _tail_of_log(r)
    return RanksFailed("\n".join(lines), tuple(r.number for r, o in found if o.kind == first))


def _who(found: Sequence[tuple[_Rank, rank_side.Outcome]]) -> dict[int, str]:
    """By the first rank of those who say the same of each other: their names together."""
    said: dict[tuple[str, str], list[int]] = {}
    for r, outcome in found:
        alone = "" if outcome.kind == "raised" else str(r.number)
        said.setdefault((outcome.summary + alone, outcome.detail), []).append(r.number)
    return {
        ranks[0]: f"rank {ranks[0]}"
        if len(set(ranks)) == 1
        else f"ranks {', '.join(map(str, sorted(set(ranks))))}"
        for ranks in said.values()
    }


def _tail_of_log(r: _Rank, count: int = 10) -> list[str]:
    log = r.folder / rank_side.LOG
    lines = log.read_text(errors="replace").splitlines()[-count:] if log.exists() else []
    return [f"rank {r.number} had printed:", *(f"    {line}" for line in lines)] if lines else []


def _end(ranks: list[_Rank]) -> None:
    for r in ranks:
        # The group holds what the rank itself had started; an empty group is no longer there.
        if r.process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(r.process.pid, signal.SIGKILL)
        if r.process.is_alive():
            r.process.kill()
    for r in ranks:
        r.process.join()
        r.pipe.close()
        r.process.close()
