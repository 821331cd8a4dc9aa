"""How far a right answer may lie from the baseline's: measured on the baseline, not picked.

The baseline is run again with every initial parameter disturbed by one rounding. How far a tensor
moves then is what one rounding per product is worth to it, through all contractions and all steps;
a candidate that adds in another order errs by about as much. Measured so, the noise is right where
a tensor's own size says nothing (a gradient that is zero in exact arithmetic), and where a step
divides by almost nothing (Adam).

`k` disturbed runs give `k` draws of that noise. Were both normal, the candidate's error over their
root mean square would follow Student's t with `k` degrees of freedom, so the quantile of t is the
allowed multiple. The one number chosen here is the chance of a false alarm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from math import atan, cos, log2, sin, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

NUDGES = 8  # disturbed runs of the first baseline per dtype
SHORT = (3, 7, 10)  # bits after the first: of float8 (e4m3), of bfloat16, of float16 and TF32
HIDDEN = 256.0  # times the error that a dtype explains; bfloat16 has 65536 times that of float32
# Bits more seem to be kept: a disturbance moves by a whole unit, rounding by unit / sqrt(12) as a
# rule (1.8 bits), and seldom is every factor rounded.
SPARED = 2.6
_BITS = 16  # of a nudge's seed, above which it says how coarse it is
FALSE_ALARM = 1e-12  # the chance that one row of one right tensor is called wrong
LOOSE = 1e-6  # mistakes of logic begin about here: noise or bounds beyond it decide little


def t_quantile(chance: float, dof: int) -> float:
    """The multiple that |t| with an even number of degrees of freedom exceeds with this chance.

    The integral in closed form: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.4.
    """
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(middle, dof) > chance else (low, middle)
    return high


def _tail(t: float, dof: int) -> float:
    angle = atan(t / sqrt(dof))
    term = total = 1.0
    for i in range(1, dof // 2):
        term *= (2 * i - 1) / (2 * i) * cos(angle) ** 2
        total += term
    return 1 - sin(angle) * total


ALLOWED = t_quantile(FALSE_ALARM, NUDGES)  # 76: times the noise of a row


class Expected(NamedTuple):
    """What a record of the candidate is held against."""

    exact: Tensor  # the baseline's whole in the candidate's dtype, for "bit-equal"
    truth: Tensor  # the float64 baseline's whole, as float64
    noise: Tensor  # per row, float64: root mean square distance of the disturbed runs from truth
    total: float  # the same for the whole tensor
    scale: float  # what errors are relative to


def rows(tensor: Tensor) -> Tensor:
    """(rows, n): what noise is measured by. A vector's rows are its elements: neighbours in it
    (biases of q, k and v, the losses of the steps) need not be alike.
    """
    if tensor.numel() == 0:
        return tensor.reshape(0, 1)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def as_float64(tensor: Tensor) -> Tensor:
    """For comparing: complex numbers as pairs, in a dimension of their own."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def measure(exact: Tensor, truth: Tensor, disturbed: list[Tensor], largest: float) -> Expected:
    """`exact` and `disturbed` are in the working dtype, `truth` in float64; all of one shape.

    `largest` is the largest norm of any record of the same check.
    """
    truth = as_float64(truth)
    squares = [rows(as_float64(other) - truth).square().sum(1) for other in disturbed]
    noise = (torch.stack(squares).mean(0) + _floor(truth, rounding(exact.dtype)).square()).sqrt()
    total = norm(noise)
    return Expected(exact, truth, noise, total, _scale(norm(truth), total, exact.dtype, largest))


def _floor(truth: Tensor, unit: float) -> Tensor:
    """Per row, one rounding of the result itself: of a typical element of the row, and of the
    whole tensor, since small rows are summed from terms of that size. Medians, because one huge
    element (a masked logit) must not excuse the others.
    """
    cells = rows(truth).abs()
    if not cells.numel():
        return cells.sum(1)
    width = float(cells.shape[1])
    typical = cells.median(1).values.square() + cells.median().square()
    return torch.sqrt(typical * width) * unit


def _scale(size: float, noise: float, dtype: torch.dtype, largest: float) -> float:
    """The norm of the truth. Where that is nothing but rounding (a gradient that cancels to zero),
    the size of what was summed, which is noise per rounding, and at most that of its companions.
    """
    if size > ALLOWED * noise:
        return size
    summed = noise / (rounding(dtype) or 1.0)
    return max(size, min(summed, largest)) or 1.0


def norm(tensor: Tensor) -> float:
    """The 2-norm, without overflow of the squares."""
    peak = tensor.abs().max().item() if tensor.numel() else 0.0
    return peak * (tensor / peak).square().sum().sqrt().item() if peak else 0.0


def rounding(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number; 0 for integers and booleans, which do not round."""
    return float(torch.finfo(dtype).eps) if dtype.is_floating_point or dtype.is_complex else 0.0


@torch.no_grad()
def nudge(tensor: Tensor, name: str, seed: int) -> None:
    """Move every element of `tensor` by one rounding, up or down, in place; seed 0: not at all.

    To be called by a baseline for each of its initial parameters, with the run's `nudge`.
    """
    if seed == 0:
        return
    bits = seed >> _BITS
    unit = 2.0**-bits if bits else rounding(tensor.dtype)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    sign = torch.randint(0, 2, tensor.shape, generator=stream).to(tensor) * 2 - 1
    tensor.mul_(1 + sign * unit)


def coarser(seed: int, bits: int) -> int:
    """A `nudge` by one rounding of a number with so many bits after its first."""
    return bits << _BITS | seed


def hidden_bits(pairs: Iterable[tuple[Expected, Expected]], dtype: torch.dtype) -> int:
    """How many bits a program keeps that rounds far more coarsely in a dtype than the dtype does (a
    part of it under autocast): those of the nearest of `SHORT`; 0 if it does not.

    A pair is what float64 gave of a record, and what the dtype gave. One rounding of float64 moves
    a row by so much; one of the dtype by as many times more as its unit is larger. What is true of
    half of the rows of half of the records is true of the program: a few are ill-conditioned, or
    fell on the other side of a kink.
    """
    times = rounding(dtype) / rounding(torch.float64)
    found = []
    for exact, short in pairs:
        moved = exact.noise > 0
        if moved.any():
            found.append((short.noise[moved] / exact.noise[moved]).median() / times)
    typical = torch.stack(found).median().item() if found else 0.0
    if not typical > HIDDEN:
        return 0
    return min(SHORT, key=lambda bits: abs(bits + SPARED + log2(typical * rounding(dtype))))
