"""Ranks on this host for those who want nothing else: in a test, a script, a notebook.

with parity.world(8) as w:
    losses = w.run(train, "gpt2")     # train("gpt2") on 8 ranks; what each returned
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from parity.backend import Entry, Rule, Settings, take_ledger
from parity.launcher import Backend, launch


class World:
    """So many ranks, fresh ones for every run. `ledger` is each rank's calls in the last run.

    Raises RanksFailed when a rank does not return: the text says which, why, and where the others
    stood. Functions need not be importable; what they use and return must be picklable.
    """

    def __init__(self, ranks: int, backend: Backend) -> None:
        self.ranks, self.backend = ranks, backend
        self.ledger: list[list[Entry]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        packed = cloudpickle.dumps((function, args))
        results = launch(_run, self.ranks, packed, backend=self.backend)
        self.ledger = [ledger for _, ledger in results]
        return [value for value, _ in results]

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None: ...


def world(
    ranks: int,
    *,
    ledger: int = 0,
    rules: Sequence[Rule] = (),
    watch: bool = False,
    backend: str = "parity",
    device: str = "cpu",
    deadline: float = 300.0,
) -> World:
    """`ranks` processes of this host. `ledger` is how many calls each remembers; `rules` change
    calls on purpose; `watch` sees early reads and writes where they happen (slower); `deadline` is
    in seconds, for each run.
    """
    if ranks < 1:
        raise ValueError(f"a world has at least one rank, not {ranks}")
    settings = Settings(ledger, tuple(rules), watch)
    return World(ranks, Backend(backend, device, deadline, settings))


def _run(packed: bytes) -> tuple[Any, list[Entry]]:
    function, args = pickle.loads(packed)  # noqa: S301 (the parent's own bytes)
    return function(*args), take_ledger()
