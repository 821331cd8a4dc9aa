"""A target called on fresh ranks, run after run; what each rank traced comes back as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from parity import ledger
from parity.backend import take_ledger
from parity.case import Run
from parity.errors import TraceError
from parity.launcher import Backend, launch_groups
from parity.plan import Target, resolve
from parity.scratch import Scratch
from parity.trace import Recording, Trace, load_masks


@contextmanager
def record(
    target: Target, runs: Sequence[Run], backend: Backend, lanes: int = 1
) -> Iterator[list[Recording]]:
    """One launch for all `runs` of a case: a recording per run, readable inside the context.

    With several lanes the runs are spread over as many groups of ranks, side by side.
    """
    world = runs[0].case.world
    numbered = list(enumerate(runs))
    with Scratch() as path:
        folder = str(path)
        groups = [(target, numbered[i::lanes], folder, backend.device) for i in range(lanes)]
        launch_groups(trace_on_rank, world, groups, backend=backend)
        yield [recording(folder, i, world) for i in range(len(runs))]


def recording(folder: str, run: int, world: int) -> Recording:
    files = [_file(folder, run, rank) for rank in range(world)]
    kept = [file.with_suffix(".ledger") for file in files]
    return Recording(files, [ledger.load(path) for path in kept if path.exists()])


def trace_on_rank(
    target: Target, runs: Sequence[tuple[int, Run]], folder: str, device: str = "cpu"
) -> None:
    """Runs on every rank: call the target once per run, and leave its traces in `folder`."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    function = resolve(target)
    for i, run in runs:
        Trace.masks = load_masks(Path(run.masks)) if run.masks else {}
        trace = function(replace(run, rank=rank, device=device))
        if not isinstance(trace, Trace):
            name = target if isinstance(target, str) else target.name
            raise TraceError(f"{name} returned {type(trace).__name__}, not a parity.Trace")
        trace.save(_file(folder, i, rank))
        if entries := take_ledger():
            ledger.save(entries, _file(folder, i, rank).with_suffix(".ledger"))


def _file(folder: str, run: int, rank: int) -> Path:
    return Path(folder) / f"run{run}-rank{rank}.safetensors"
