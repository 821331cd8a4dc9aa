"""What ranks hold of a baseline's parameters: in words, and as DTensor placements where it is."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from parity.case import Case, Run
from parity.launcher import Backend, launch
from parity.subject.alignment import Held, Part
from parity.subject.packing import pack
from parity.subject.placing import share
from parity.subject.program import Subject
from parity.subject.target import Candidate

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Cuts = tuple[int | None, ...]  # by axis of the mesh: the dim that it cuts


@dataclass(frozen=True)
class Layout:
    """Of a candidate on a mesh: what each rank holds, the ranks in the order of the mesh."""

    axes: Mapping[str, int]
    ranks: Sequence[Sequence[Held]]

    @property
    def wholes(self) -> dict[str, tuple[int, ...]]:
        """The baseline's parameters that anybody holds, and their shapes."""
        return {
            part.whole: part.shape for rank in self.ranks for held in rank for part in held.parts
        }

    def placements(self, whole: str) -> tuple[Placement, ...] | None:
        """As DTensor has it, one per axis of the mesh; None for what is no DTensor."""
        from torch.distributed.tensor import Replicate, Shard

        cuts = self._cuts(whole, even=False)
        if cuts is None:
            return None
        return tuple(Replicate() if dim is None else Shard(dim) for dim in cuts)

    def _cuts(self, whole: str, *, even: bool) -> Cuts | None:
        """The dim that each axis of the mesh cuts, if that is all that there is to say."""
        found = [_only(rank, whole) for rank in self.ranks]
        if any(one is None for one in found):
            return None
        boxes = [part.boxes[0] for _, part in found if part is not None]  # type: ignore[misc]
        shape, places = self.wholes[whole], list(self._coordinates())
        for cuts in product([None, *range(len(shape))], repeat=len(self.axes)):
            expected = [_slice(shape, cuts, self.axes, at, even) for at in places]
            if expected == [(b.offset, tuple(b.positions.shape)) for b in boxes]:
                return cuts
        return None

    def _coordinates(self) -> list[tuple[int, ...]]:
        return list(product(*(range(n) for n in self.axes.values())))

    def text(self) -> str:
        """A row per parameter of the baseline and way in which ranks hold it."""
        rows = [row for whole, shape in self.wholes.items() for row in self._rows(whole, shape)]
        strange = [
            f"{held.name}: {held.strange} elements on rank {r} are of no parameter of the baseline"
            for r, rank in enumerate(self.ranks)
            for held in rank
            if held.strange
        ]
        head = ["baseline", "shape", "candidate", "ranks", "holds"]
        return "\n".join([tabulate(rows, head, disable_numparse=True), *strange])

    def _rows(self, whole: str, shape: tuple[int, ...]) -> list[list[str]]:
        cuts = self._cuts(whole, even=False) or self._cuts(whole, even=True)
        ways: dict[tuple[str, str], list[int]] = {}
        for r, rank in enumerate(self.ranks):
            for held in rank:
                for part in held.parts:
                    if part.whole == whole:
                        said = "" if cuts else _in_words(held, part)
                        ways.setdefault((held.name, said), []).append(r)
        rows = []
        for (name, said), ranks in ways.items():
            how = said if cuts is None else self._named(cuts)
            rows.append([whole, _times(shape), name, _ranks(ranks, len(self.ranks)), how])
        return rows

    def _named(self, cuts: Cuts) -> str:
        said = [
            f"dim {dim} cut over {axis}"
            for axis, dim in zip(self.axes, cuts, strict=True)
            if dim is not None and self.axes[axis] > 1
        ]
        return ", ".join(said) or "all of it"


def layout(
    baseline: Callable[[], nn.Module],
    candidate: Callable[[Mapping[str, Tensor], Any], Any],
    backend: Backend | None = None,
    **axes: int,
) -> Layout:
    """Where each rank's parameters lie in the baseline's, found by their values (alignment.py).

    `candidate(full, mesh)` is called on as many fresh ranks as the sizes of the `axes` ask for.
    """
    subject = Subject(baseline, candidate, [])
    return layout_of(pack(Candidate(subject, ""), baseline, candidate), axes, backend)


def layout_of(candidate: bytes, axes: Mapping[str, int], backend: Backend | None = None) -> Layout:
    """Of a packed Candidate."""
    case = Case(axes)
    device = (backend or Backend()).device
    ranks = launch(_held, case.world, candidate, case, device, backend=backend)
    return Layout(dict(axes), [pickle.loads(rank) for rank in ranks])  # noqa: S301 (our own)


def _held(candidate: bytes, case: Case, device: str) -> bytes:
    """On every rank. As bytes: tensors that travel otherwise leave files open."""
    side: Candidate = pickle.loads(candidate)  # noqa: S301 (the parent's own)
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    return pickle.dumps(side.held(Run(case, "float64", 1, device=device)))


def _only(rank: Sequence[Held], whole: str) -> tuple[Held, Part] | None:
    """What holds it, if that is one tensor, of one slice as it is, and of nothing else."""
    found = [(h, p) for h in rank for p in h.parts if p.whole == whole]
    if len(found) != 1:
        return None
    held, part = found[0]
    plain = len(held.parts) == 1 and len(part.boxes) == 1 and len(held.shape) == len(part.shape)
    if not plain or part.boxes[0].positions.shape != held.shape:
        return None
    is_as_it_is = part.boxes[0].positions.reshape(-1).equal(torch.arange(prod(held.shape)))
    return (held, part) if is_as_it_is else None


def _slice(
    shape: Sequence[int],
    cuts: Cuts,
    axes: Mapping[str, int],
    at: Sequence[int],
    even: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offset, size) of a shard, the dims cut by the first axis first (see `share`)."""
    offset, size = [0] * len(shape), list(shape)
    for n, dim, index in zip(axes.values(), cuts, at, strict=True):
        if dim is not None:
            start, size[dim] = share(size[dim], n, index, even=even)
            offset[dim] += start
    return tuple(offset), tuple(size)


def _in_words(held: Held, part: Part) -> str:
    boxes = [
        f"[{', '.join(f'{i}:{i + n}' for i, n in zip(o, p.shape, strict=True))}]"
        for o, p in part.boxes
    ]
    most = 4
    shown = " ".join(boxes[:most]) + f" and {len(boxes) - most} more" * (len(boxes) > most)
    notes = [
        *(["flat"] if len(held.shape) == 1 < len(part.shape) else []),
        *(["transposed"] if _is_transposed(part) else []),
        *([f"beside {len(held.parts) - 1} others"] if len(held.parts) > 1 else []),
        *([f"{held.padding} zeros of padding"] if held.padding else []),
    ]
    return ", ".join([shown, *notes])


def _is_transposed(part: Part) -> bool:
    first = part.boxes[0].positions
    if first.ndim < 2 or min(first.shape[-2:]) < 2:
        return False
    down, right = first[..., 1, 0] - first[..., 0, 0], first[..., 0, 1] - first[..., 0, 0]
    return bool((down < right).all())


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _ranks(ranks: Sequence[int], world: int) -> str:
    unique = sorted(set(ranks))
    return "all" if len(unique) == world else ", ".join(map(str, unique))
