"""Whose tensor is it between the issue of a call and its wait? The call's, and a guard sees to it.

What will be written is poisoned at the issue: who reads it early reads NaN, every time, on every
machine, and not the right value by luck. What is being read must come to the wait unchanged. Both
must still be where they were. The data that really travels is a copy taken at the issue.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from parity.errors import Race

_POISON_BYTE = 0xA5  # of integers: no likely value, and -91 where there is a sign
_BLOCK = 1 << 16  # words


class _Held(NamedTuple):
    tensor: Tensor
    mark: int  # of the contents
    place: int
    size: int  # of the storage, in bytes


def _bytes(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    if flat.stride(0) != 1:  # of one element or none: contiguous by torch's word, all the same
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


@cache
def _weights() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (_BLOCK,), generator=generator) * 2 + 1


def _mark(x: Tensor) -> int:
    """A checksum, by torch alone: numpy's view of a tensor would forbid the user to resize it.

    The sum of words by odd weights sees any change of one word, and which of its block it is.
    """
    raw = _bytes(x).cpu()
    if raw.storage_offset() % 8:
        raw = raw.clone()
    cut = raw.numel() // 8 * 8
    words, rest = raw[:cut].view(torch.int64), raw[cut:].long()
    whole = words.numel() // _BLOCK * _BLOCK
    blocks, tail = (words[:whole].view(-1, _BLOCK) * _weights()).sum(1), words[whole:]
    parts = [(part * _weights()[: part.numel()]).sum() for part in (blocks, tail, rest)]
    return hash(tuple(int(part) for part in parts))


def poison(x: Tensor) -> None:
    if x.dtype.is_floating_point or x.dtype.is_complex:
        x.detach().fill_(float("nan"))
    elif x.dtype is not torch.bool:  # a boolean has no value that is none
        x.detach().fill_(_POISON_BYTE - 256 if x.dtype.is_signed else _POISON_BYTE)


def _hold(x: Tensor) -> _Held:
    storage = x.untyped_storage()
    return _Held(x, _mark(x), x.data_ptr(), storage.nbytes())


def _overlap(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


class Guard:
    """Watches over the tensors of one asynchronous call, from now on."""

    def __init__(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        for x in writes:
            poison(x)
        self._writes = [_hold(x) for x in writes]
        # What is both read and written was copied, and is watched as poison.
        alone = [x for x in reads if not any(_overlap(x, y) for y in writes)]
        self._reads = [_hold(x) for x in alone]
        self._is_rewritten = False

    def spare_outputs(self) -> None:
        """They may be written to meanwhile: torch's schedules receive two greetings in one place
        (2.11), and look at neither.
        """
        self._is_rewritten = True

    def check(self, phrase: str, place: str) -> None:
        """Raise Race unless everything is as it was."""
        for held, role in [
            *((h, "output") for h in self._writes),
            *((h, "input") for h in self._reads),
        ]:
            x = held.tensor
            if (x.data_ptr(), x.untyped_storage().nbytes()) != (held.place, held.size):
                how = "freed, resized or moved"
            elif _mark(x) != held.mark and not (self._is_rewritten and role == "output"):
                how = "written to"
            else:
                continue
            raise Race(
                f"{phrase}:\n  its {role} {list(x.shape)} was {how} before the wait at {place}; "
                "until then it belongs to the call: wait first, or pass a copy"
            )
