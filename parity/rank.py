"""The inside of one rank: take its seat in the group, call the function, report, leave.

A rank reports bytes, never tensors: those would travel as file descriptors of a process that is
about to end. And it leaves by os._exit: a rank that has failed would wait for the others in the
teardown of a collective.
"""

from __future__ import annotations

import faulthandler
import fcntl
import io
import multiprocessing as mp
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import torch

    from parity.backend import Settings

STACK_SIGNAL = signal.SIGUSR1
STACK, LOG = "stack.txt", "log.txt"


class Seat(NamedTuple):
    """Which rank this is, and of what."""

    rank: int
    world: int
    backend: str
    device: str
    deadline: float
    folder: str
    settings: Settings
    environment: dict[str, str]  # which GPUs it sees, and that it has its slots
    place: int  # among all ranks of the launch, where there are several groups
    is_script: bool = False  # it joins the group itself, and prints where its parent does


class Outcome(NamedTuple):
    """How a rank ended: `returned` (with its value pickled), `raised`, `lost` (it raised because
    others went away), `died`, or, at the deadline, `waits` (in a collective) or `is` (elsewhere).
    """

    kind: str
    summary: str
    detail: str
    when: float
    value: bytes = b""


def main(pipe: Connection, seat: Seat, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _settle(seat)
    try:
        value = _call(seat, function, args)
        outcome = Outcome("returned", "returned", "", time.time(), pickle.dumps(value))
    except BaseException as error:  # whatever it is, the parent is told
        outcome = _outcome_of(error)
    pipe.send_bytes(pickle.dumps(tuple(outcome)))
    _leave(0 if outcome.kind == "returned" else 1)


def _settle(seat: Seat) -> None:
    """Signals, output and scheduling, before any of the user's code runs."""
    os.environ.update(seat.environment)  # the fork server's own is that of an earlier time
    mp.set_start_method(None, force=True)  # that of a fork server's child is not the user's choice
    os.setpgid(0, 0)  # a group of its own, to be ended with all that it starts
    _die_with_the_parent()
    own = Path(seat.folder) / f"rank{seat.rank}"
    if not seat.is_script:
        log = os.open(own / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
    _keep_lines_whole()
    faulthandler.enable(file=sys.stderr)
    faulthandler.register(STACK_SIGNAL, file=(own / STACK).open("w"), all_threads=True)
    # One rank per core at most: ranks share the machine, and threads of theirs would fight for it.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if seat.device == "cpu" and hasattr(os, "SCHED_BATCH"):
        # No preemption on wake-up: gloo's many small messages are four times as fast with it.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _keep_lines_whole() -> None:
    """A line goes out at once and in one piece, whether PYTHONUNBUFFERED is set (a line and its end
    are two writes then, and another rank's may come between) or not (a rank that is ended would
    take what it printed with it).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def _die_with_the_parent() -> None:
    """Let the kernel kill this process when the parent is gone, however it went.

    A rank's own parent is the fork server, and that one lives as long as any rank does: so the
    signal comes from the pipe whose other end only the real parent holds.
    """
    parent = mp.parent_process()
    assert parent is not None
    pipe: int = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():  # it may have gone before the signal was asked for
        os._exit(1)


def _call(seat: Seat, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    from parity.backend import configure

    device = None
    if seat.device == "cuda":
        device = _gpu(seat.place)
        # Atomic additions make copies of one gradient differ in their last bits.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    else:
        torch.set_num_threads(1)
    watch = configure(seat.settings) or nullcontext()
    if seat.is_script:
        with watch:
            return function(seat.rank, *args)
    store = dist.FileStore(  # type: ignore[attr-defined]
        str(Path(seat.folder) / "store"), seat.world
    )
    dist.init_process_group(
        seat.backend,
        store=store,
        rank=seat.rank,
        world_size=seat.world,
        timeout=timedelta(seconds=seat.deadline + 60),  # ours comes first, and says more
        device_id=device,
    )
    with watch:
        value = function(*args)
    if dist.is_initialized():  # the function may have ended it itself
        dist.destroy_process_group()
    return value


def _gpu(place: int) -> torch.device:
    """Over shared memory several ranks may have one GPU; NCCL wants one each."""
    import torch

    if torch.cuda.is_initialized():
        raise RuntimeError(
            "CUDA was used while the function was imported, before this rank was told which GPUs "
            "it may use: use CUDA in functions only"
        )
    device = torch.device("cuda", place % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _outcome_of(error: BaseException) -> Outcome:
    import torch.distributed as dist

    from parity.errors import Lost, ProtocolError

    said = str(error).strip().partition("\n")[0]
    lost = isinstance(error, dist.DistError | Lost) or any(
        sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer")
    )
    summary = f"{'lost the others' if lost else 'raised'}: {type(error).__name__}: {said}"
    # What ranks did to each other is said in full, with everybody's place: a stack adds nothing.
    whole = isinstance(error, ProtocolError)
    detail = "\n".join(str(error).splitlines()[1:]) if whole else _stack(error)
    return Outcome("lost" if lost else "raised", summary, detail, time.time())


def _stack(error: BaseException) -> str:
    """Where it was raised, without the frames that are ours; empty if there are no others, and
    parity has said what is wrong.
    """
    from parity.errors import ParityError

    told = traceback.TracebackException.from_exception(error)
    frames = [frame for frame in told.stack if Path(frame.filename).parent not in _OWN]
    if not frames and isinstance(error, ParityError):
        return ""
    told.stack = traceback.StackSummary.from_list(frames or told.stack)
    return "".join(told.format())


_OWN = (Path(__file__).parent, Path(__file__).parent / "subject")


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
