"""A target with sums: one that is needed, one that is redundant, one that nobody looks at, and one
of which only matters that ranks agree on it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from parity import Run, Trace, nudge


def whole(run: Run) -> torch.Tensor:
    x = torch.linspace(1, 2, 24).to(getattr(torch, run.dtype))
    nudge(x, "x", run.nudge)
    return x


def baseline(run: Run, factor: float = 1.0) -> Trace:
    trace = Trace()
    trace.add("forward", "sum", whole(run).sum() * factor)
    trace.add("forward", "logsumexp", whole(run).logsumexp(0))
    trace.add("forward", "copy", whole(run).sum())
    trace.add("forward", "doubled", whole(run) * 2)
    return trace


def candidate(run: Run) -> Trace:
    parts = whole(run).tensor_split(run.case.world)
    total = parts[run.rank].sum()
    needed(total)
    redundant(copy := total.clone())
    unseen(torch.full((3,), 1.0 + run.rank))
    trace = Trace()
    trace.add("forward", "sum", total)
    trace.add("forward", "logsumexp", logsumexp(parts[run.rank]))
    trace.add("forward", "copy", copy)
    trace.add("forward", "doubled", whole(run) * 2)
    return trace


def needed(x: torch.Tensor) -> None:
    dist.all_reduce(x)


def redundant(x: torch.Tensor) -> None:
    """All ranks hold the same already."""
    dist.all_reduce(x, dist.ReduceOp.MAX)


def logsumexp(x: torch.Tensor) -> torch.Tensor:
    shared(peak := x.max())
    added(total := (x - peak).exp().sum())
    return total.log() + peak


def shared(x: torch.Tensor) -> None:
    """Any number will do, if it is the same on all ranks."""
    dist.all_reduce(x, dist.ReduceOp.MAX)


def added(x: torch.Tensor) -> None:
    dist.all_reduce(x)


def unseen(x: torch.Tensor) -> None:
    dist.all_reduce(x)


def wrong(run: Run) -> Trace:
    return baseline(run, factor=2.0)


def silent(run: Run) -> Trace:
    return baseline(run)


def hasty(run: Run) -> Trace:
    """Dies of a sum that is not the one it expects."""
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == run.case.world
    return baseline(run)


def moody(run: Run) -> Trace:
    """Gives something else whenever rules are in force: nobody can judge a change of it."""
    from parity.backend.member import Place

    total = torch.zeros(())
    dist.all_reduce(total)
    return wrong(run) if Place.settings.rules else baseline(run)
