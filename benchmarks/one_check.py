"""One check of one combination as it is done today: a torchrun of its own, compared on rank 0.

    torchrun --standalone --nproc_per_node=2 -m benchmarks.one_check dp2-tp1-pp1 gradient

The same task and the same program as in matrix.yaml; what differs is how it is run and compared.
Pieces come to rank 0 by gather_object, the baseline runs there, and assert_close decides.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from parity import Case, Run, Trace
from parity.case import parse_axes
from tests import bridge

STEPS = {"forward": 1, "gradient": 1, "norm": 1, "state": 10, "loss": 10}


def wholes(traces: list[Trace]) -> dict[tuple[str, str], torch.Tensor]:
    """Pieces pasted over each other, as comparing scripts do it."""
    made: dict[tuple[str, str], torch.Tensor] = {}
    for trace in traces:
        for box, tensor in zip(trace.boxes, trace.tensors, strict=True):
            whole = made.setdefault(box.key, torch.zeros(box.shape, dtype=tensor.dtype))
            window = tuple(slice(o, o + n) for o, n in zip(box.offset, tensor.shape, strict=True))
            whole[window] = tensor
    return made


def main(name: str, check: str) -> None:
    dist.init_process_group("gloo")
    case = Case(parse_axes(name))
    run = Run(case, "float64", STEPS[check], rank=dist.get_rank(), variant={"schedule": "1f1b"})
    mine = bridge.candidate(run)
    gathered = [None] * dist.get_world_size() if run.rank == 0 else None
    dist.gather_object(mine, gathered)
    if gathered is not None:
        ours, theirs = wholes(gathered), wholes([bridge.plain(run)])  # type: ignore[arg-type]
        keys = [key for key in theirs if key[0] == check]
        for key in keys:
            torch.testing.assert_close(ours[key], theirs[key])
        print(f"{name} {check}: {len(keys)} tensors agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
