"""How a planted bug is run: as `parity run` would, in one dtype, on the smallest case."""

from __future__ import annotations

from parity import Backend
from parity.backend import Settings
from parity.case import Case
from parity.plan import Baseline, Plan
from tests.bridge import Task

ONE = Case({"dp": 1, "tp": 1, "pp": 1})


def schedules(case: Case) -> list[str]:
    """Without a pipeline a schedule is nothing but an order of microbatches: one will do."""
    return ["gpipe", "1f1b"] if case.axes["pp"] > 1 else ["1f1b"]


def plan(target: str, dtype: str, steps: int, case: Case = ONE) -> Plan:
    task = Task()
    return Plan(
        target=target,
        baselines=[Baseline("plain", "tests.bridge:plain", ONE)],
        cases=[],
        dtypes=[dtype],
        variants={"schedule": schedules(case)},
        # Spelled out, since a diagnosis names factors by them.
        options={"batch": task.batch, "micro_batches": task.micro_batches},
        steps=steps,
        backend=Backend(settings=Settings(order="place")),
    )
