"""A pipeline schedule is data: for every stage, the list of what it does, in order.

`F3` is the forward of microbatch 3, `B3` its backward. The executor (pipeline.py) adds nothing to
the list; what is printed is what runs.

>>> for stage in one_f_one_b(stages=3, microbatches=4): print(*stage)
F0 F1 F2 B0 F3 B1 B2 B3
F0 F1 B0 F2 B1 F3 B2 B3
F0 B0 F1 B1 F2 B2 F3 B3
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple


class Action(NamedTuple):
    op: Literal["F", "B"]
    mb: int

    def __str__(self) -> str:
        return f"{self.op}{self.mb}"


Schedule = list[list[Action]]


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965). Every activation is alive at once."""
    return [
        [Action("F", mb) for mb in range(microbatches)]
        + [Action("B", mb) for mb in range(microbatches)]
        for _ in range(stages)
    ]


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """PipeDream-Flush (arXiv 2006.09503): as many forwards as there are stages below, then one
    forward and one backward in turn. At most `stages` microbatches are alive on a stage.
    """
    schedule: Schedule = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, microbatches)
        actions = [Action("F", mb) for mb in range(ahead)]
        for mb in range(microbatches):
            if mb + ahead < microbatches:
                actions.append(Action("F", mb + ahead))
            actions.append(Action("B", mb))
        schedule.append(actions)
    return schedule


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def simulate(schedule: Schedule) -> list[list[Action | None]]:
    """Run the schedule without computing: per tick, what every stage does (None: it idles).

    Each action takes a tick. F needs the same F of the stage before, B the same B of the stage
    after and the stage's own F. Raises ValueError when no stage can go on; so a schedule for which
    this returns cannot deadlock, sends never blocking.
    """
    done: list[set[Action]] = [set() for _ in schedule]
    todo = [list(actions) for actions in schedule]
    ticks: list[list[Action | None]] = []
    while any(todo):
        tick = [
            actions[0] if actions and _is_ready(actions[0], stage, done) else None
            for stage, actions in enumerate(todo)
        ]
        if not any(tick):
            stuck = [f"stage {s} waits to run {a[0]}" for s, a in enumerate(todo) if a]
            raise ValueError(f"the schedule is stuck at tick {len(ticks)}: " + ", ".join(stuck))
        for stage, action in enumerate(tick):
            if action is not None:
                done[stage].add(todo[stage].pop(0))
        ticks.append(tick)
    return ticks


def _is_ready(action: Action, stage: int, done: list[set[Action]]) -> bool:
    if action.op == "F":
        return stage == 0 or action in done[stage - 1]
    below = stage == len(done) - 1 or action in done[stage + 1]
    return below and Action("F", action.mb) in done[stage]


def peak_alive(actions: list[Action]) -> int:
    """The most microbatches of which a stage holds activations at once."""
    alive = peak = 0
    for action in actions:
        alive += 1 if action.op == "F" else -1
        peak = max(peak, alive)
    return peak
