"""What the kernel says of this process' threads, and what follows from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from parity.backend.threads import Stand, look, parked

ASLEEP = Stand("1 0", True, True)
NATIVE = 1  # a thread of no Python function: no process here has this number


@contextmanager
def running(function: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    yield thread


def comes(is_so: Callable[[Stand], bool], thread: threading.Thread) -> bool:
    """Within a while, the kernel says so."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        stand = look().get(thread.native_id or 0)
        if stand is not None and is_so(stand):
            return True
    return False


def test_who_waits_for_another_thread_is_parked() -> None:
    end = threading.Event()
    with running(end.wait) as thread, running(thread.join) as other:
        assert comes(lambda s: s.is_asleep and s.is_parked, thread)
        assert comes(lambda s: s.is_asleep and s.is_parked, other)
        end.set()
        other.join()


def test_who_waits_for_a_time_or_computes_is_not() -> None:
    end = threading.Event()
    with running(lambda: end.wait(600)) as thread:
        assert comes(lambda s: s.is_asleep and not s.is_parked, thread)
        end.set()
    stop: list[bool] = []

    def compute() -> None:
        while not stop:
            pass

    with running(compute) as thread:
        assert comes(lambda s: not s.is_asleep and not s.is_parked, thread)
        stop.append(True)


@pytest.mark.parametrize(
    ("before", "now", "native", "is_parked"),
    [
        (ASLEEP, ASLEEP, (), True),
        (ASLEEP, ASLEEP, (ASLEEP._replace(is_parked=False),) * 2, True),
        (ASLEEP, ASLEEP._replace(switches="2 0"), (), False),
        (ASLEEP, ASLEEP._replace(is_parked=False), (), False),
        (ASLEEP._replace(is_parked=False), ASLEEP, (), False),
        (ASLEEP, ASLEEP, (Stand("1 0", False, False),) * 2, False),
        (ASLEEP, ASLEEP, (ASLEEP, ASLEEP._replace(switches="1 1")), False),
        (None, ASLEEP, (), False),
    ],
    ids=[
        "same",
        "native-sleeps",
        "ran",
        "awake-now",
        "fell-asleep",
        "native-runs",
        "native-ran",
        "first-look",
    ],
)
def test_a_thread_is_parked_if_nothing_but_the_waiting_can_wake_it(
    before: Stand | None, now: Stand, native: tuple[Stand, ...], is_parked: bool
) -> None:
    end = threading.Event()
    me = threading.current_thread()
    with running(end.wait) as thread:
        looks: list[dict[int, Stand]] = []
        for i, stand in enumerate((before, now)):
            looks.append({me.native_id or 0: Stand(str(i), False, False)})
            if stand is not None:
                looks[i][thread.native_id or 0] = stand
            if native:
                looks[i][NATIVE] = native[i]
        assert parked(*looks, {me.native_id or 0}) == ({thread.ident} if is_parked else set())
        assert parked(*looks, set()) == set()  # this thread has run
        end.set()
