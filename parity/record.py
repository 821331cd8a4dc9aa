"""A target called on fresh ranks, run after run; what each rank traced comes back as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from parity.case import Run
from parity.errors import TraceError
from parity.launcher import Backend, launch_groups
from parity.plan import resolve
from parity.trace import Recording, Trace


@contextmanager
def record(
    target: str, runs: Sequence[Run], backend: Backend, lanes: int = 1
) -> Iterator[list[Recording]]:
    """One launch for all `runs` of a case: a recording per run, readable inside the context.

    With several lanes the runs are spread over as many groups of ranks, side by side.
    """
    world = runs[0].case.world
    numbered = list(enumerate(runs))
    with TemporaryDirectory(prefix="parity-") as folder:
        groups = [(target, numbered[lane::lanes], folder) for lane in range(lanes)]
        launch_groups(trace_on_rank, world, groups, backend=backend)
        yield [
            Recording([_file(folder, i, rank) for rank in range(world)]) for i in range(len(runs))
        ]


def trace_on_rank(target: str, runs: Sequence[tuple[int, Run]], folder: str) -> None:
    """Runs on every rank: call the target once per run, and leave its traces in `folder`."""
    import torch.distributed as dist

    rank = dist.get_rank()
    device = f"cuda:{rank}" if dist.get_backend() == "nccl" else "cpu"
    function = resolve(target)
    for i, run in runs:
        trace = function(replace(run, rank=rank, device=device))
        if not isinstance(trace, Trace):
            raise TraceError(f"{target} returned {type(trace).__name__}, not a parity.Trace")
        trace.save(_file(folder, i, rank))


def _file(folder: str, run: int, rank: int) -> Path:
    return Path(folder) / f"run{run}-rank{rank}.safetensors"
