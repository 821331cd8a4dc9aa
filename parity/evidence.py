"""What is known of a record that differs, and what an explanation of it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from parity.bounds import norm
from parity.trace import Key, Piece

FITS = 1e-3  # the residual up to which a difference counts as explained
CLOSE = 1e-6  # of two factors that are meant to be one

_Box = tuple[tuple[int, ...], tuple[int, ...]]


class Evidence(NamedTuple):
    """All that is known of a record that differs. Tensors are float64."""

    key: Key
    got: Tensor
    want: Tensor
    noise: float = 0.0  # the norm of an error that would have been allowed
    pieces: Sequence[Piece] = ()
    at: Sequence[Mapping[str, int]] = ()  # the coordinates of every rank
    axes: Mapping[str, int] = {}  # their sizes
    numbers: Mapping[str, int] = {}  # other whole numbers of the run, by name
    parameters: Mapping[str, Tensor] = {}  # the baseline's, before the first step
    gradients: Sequence[tuple[Tensor, Sequence[Piece]]] = ()  # the baseline's, and who holds what
    others: Mapping[str, Tensor] = {}  # what the baseline has for other records of the same check

    slope: Tensor | None = None  # of a module's parameter: the gradient of what the module puts out
    given: Tensor | None = None  # and what the module takes in

    def residual(self, explained: Tensor, of: Tensor | None = None) -> float:
        """How much of the difference is left unexplained; what is noise counts as explained."""
        left = norm((self.got if of is None else of) - explained)
        return 0.0 if left <= self.noise else left / norm(self.got - self.want)

    @property
    def before(self) -> Tensor | None:
        """Of a parameter after a step (`sgd w`, and not `adamw exp_avg of w`): what it was."""
        return self.own if " of " not in self.key.name else None

    @property
    def own(self) -> Tensor | None:
        """Of a state: the parameter that it belongs to, before the first step."""
        name = self.key.name.split(" ")[-1]
        found = self.parameters.get(name) if self.key.check == "state" else None
        return found if found is not None and found.shape == self.got.shape else None


class Fit(NamedTuple):
    """`kind` is for programs, `text` for readers; `axis`: over which a reduction is missing; `by`:
    the explanation that found it; `of`: the other record that the difference is made of.
    """

    kind: str
    text: str
    residual: float = 0.0
    axis: str = ""
    by: str = ""
    of: str = ""


def ratio(a: Tensor, b: Tensor) -> float:
    """The k for which k * b is closest to a; 0 if b is nothing."""
    size = (b * b).sum().item()
    return (a * b).sum().item() / size if size else 0.0


def is_close(a: Tensor, b: Tensor) -> bool:
    return norm(a - b) <= CLOSE * norm(b)


def rows_of(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


def box_of(whole: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    return whole[tuple(slice(i, i + n) for i, n in zip(offset, shape, strict=True))]


def part_of(whole: Tensor, piece: Piece) -> Tensor:
    return box_of(whole, piece.offset, piece.tensor.shape)


def nearest(ordered: Tensor, values: Tensor) -> Tensor:
    """For each value the index of the closest of `ordered`, ascending and not empty."""
    above = torch.searchsorted(ordered, values).clamp(max=len(ordered) - 1)
    below = (above - 1).clamp(min=0)
    is_below = (ordered[below] - values).abs() < (ordered[above] - values).abs()
    return torch.where(is_below, below, above)


def norms_added(e: Evidence, axis: str, once: bool) -> Tensor:
    """The sum of the norms at all places along `axis`; what several places hold, at the first."""
    places = sorted({at[axis] for at in e.at})
    total, seen = torch.zeros((), dtype=torch.float64), set[int]()
    for place in places:
        group = {rank for rank, at in enumerate(e.at) if at[axis] == place}
        square = norm_on(e, group | seen).square() - norm_on(e, seen).square()
        total += square.sqrt() if once else norm_on(e, group)
        seen |= group
    return total


def held_twice(e: Evidence) -> dict[tuple[int, _Box], list[Tensor]]:
    """What a rank holds more than one of, by rank and box."""
    held: dict[tuple[int, _Box], list[Tensor]] = {}
    for rank, offset, tensor in e.pieces:
        held.setdefault((rank, (offset, tuple(tensor.shape))), []).append(tensor.double())
    return {key: copies for key, copies in held.items() if len(copies) > 1}


def sum_over(e: Evidence, axes: Sequence[str]) -> tuple[Tensor | None, int]:
    """The pieces of the ranks that differ in these coordinates alone, added; and how many."""
    groups: dict[_Box, dict[tuple[int, ...], list[Tensor]]] = {}
    if held_twice(e):
        return None, 0
    for rank, offset, tensor in e.pieces:
        rest = tuple(v for k, v in e.at[rank].items() if k not in axes) if e.at else ()
        box = (offset, tuple(tensor.shape))
        groups.setdefault(box, {}).setdefault(rest, []).append(tensor.double())
    counts = {len(terms) for lines in groups.values() for terms in lines.values()}
    if len(counts) != 1 or (count := counts.pop()) < 2 or not e.at:
        return None, 0
    total = torch.zeros_like(e.want)
    for (offset, shape), lines in groups.items():
        part = torch.stack(next(iter(lines.values()))).sum(0)
        box_of(total, offset, shape).add_(part)
    return total, count


def contributions(e: Evidence) -> Tensor | None:
    """What each row of the batch adds to a gradient, [batch, *shape], as a linear layer or a bias
    has it; None if the whole is not the sum of that.
    """
    if e.slope is None or e.slope.ndim < 2:
        return None
    slope = e.slope.flatten(1, -2) if e.slope.ndim > 2 else e.slope.unsqueeze(1)  # [B, T, O]
    if e.want.ndim == 1:
        terms = slope.sum(1)
    elif e.given is not None and e.given.shape[:-1] == e.slope.shape[:-1]:
        terms = torch.einsum("bto,bti->boi", slope, e.given.reshape(*slope.shape[:2], -1))
    else:
        return None
    whole = terms.sum(0)
    return terms if whole.shape == e.want.shape and is_close(whole, e.want) else None


def batch_cuts(e: Evidence) -> list[tuple[int, str]]:
    """Into how many parts the batch may have been cut, each by its name."""
    sizes = [(n, name) for name, n in [*e.numbers.items(), *e.axes.items()] if n > 1]
    pairs = [(m * n, f"{a} x {b}") for (m, a), (n, b) in combinations(sizes, 2)]
    source = e.want if e.slope is None else e.slope
    batch = source.shape[0] if source.ndim else 0
    fitting = {n: name for n, name in reversed([*sizes, *pairs]) if n <= batch and batch % n == 0}
    return sorted(fitting.items())


def same_in_rows(difference: Tensor, e: Evidence) -> str:
    """`blocks.0.proj.bias`, if that is what every row of it is, perhaps times a number; or ''."""
    if difference.ndim < 2 or difference.shape[-1] < 2:
        return ""
    vector = difference.reshape(-1, difference.shape[-1]).mean(0)
    if norm(vector) <= e.noise or not is_close(difference, vector.expand_as(difference)):
        return ""
    c, name = known_vector(vector, e)
    return name if abs(c - 1) < CLOSE else f"{c:.6g} times {name}" if name else "a vector"


def known_vector(vector: Tensor, e: Evidence) -> tuple[float, str]:
    """Which parameter it is, and how many times; (0, '') for none."""
    for name, parameter in e.parameters.items():
        c = ratio(vector, parameter) if parameter.shape == vector.shape else 0.0
        if c and norm(vector - c * parameter) <= FITS * norm(vector):
            return c, name
    return 0.0, ""


def norm_with_copies(e: Evidence, axis: str) -> Tensor:
    """The norm if every rank along `axis` counted all that it holds."""
    total = torch.zeros((), dtype=torch.float64)
    for want, pieces in e.gradients:
        copies: dict[_Box, set[int]] = {}
        for piece in pieces:
            box = piece.offset, tuple(piece.tensor.shape)
            copies.setdefault(box, set()).add(e.at[piece.rank][axis])
        for (offset, shape), places in copies.items():
            total += len(places) * box_of(want, offset, shape).square().sum()
    return total.sqrt()


def norm_on(e: Evidence, some: set[int]) -> Tensor:
    """The norm of what these ranks hold, each element once."""
    total = torch.zeros((), dtype=torch.float64)
    for want, pieces in e.gradients:
        boxes = {(p.offset, tuple(p.tensor.shape)) for p in pieces if p.rank in some}
        for offset, shape in boxes:
            total += box_of(want, offset, shape).square().sum()
    return total.sqrt()


def source_rows(got: Tensor, want: Tensor) -> Tensor:
    """For each row of `got` the row of `want` that is like it; its own, if that one is."""
    generator = torch.Generator().manual_seed(0)
    ray = torch.randn(want.shape[1], generator=generator, dtype=torch.float64)
    a, b = got @ ray, want @ ray
    ordered, places = b.sort()
    source = places[nearest(ordered, a)]
    own = torch.arange(len(a))
    is_own = (a - b).abs() <= (a - b[source]).abs() * (1 + 1e-12) + 1e-12 * b.abs().max()
    return torch.where(is_own, own, source)
