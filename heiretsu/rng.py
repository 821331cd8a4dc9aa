"""A random stream is a function of (seed, what it is for): the same numbers on every topology.

No global generator is ever touched, so what one stage draws cannot shift what another draws.
"""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose, as in stream(seed, "init", "blocks.0.attn.qkv.weight").

    CPU also for models on a GPU: the two devices' generators yield different numbers.
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
