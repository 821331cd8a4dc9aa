"""Text to tokens to batches: a batch is a function of (seed, step), the same on every topology.

Text is read as bytes, one token each, and token 256 ends it. A `.bin` file holds tokens already, in
the format of the GPT-2 shards of FineWeb: 256 int32 (magic 20240520, version 1, how many tokens
follow), then uint16 tokens; it is mapped, not read.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import torch
from torch import Tensor

from heiretsu.rng import stream
from heiretsu.train import Batch

END_OF_TEXT = 256
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


class DataError(ValueError):
    """A file that cannot be used as data: the message names it, and says what was expected."""


class Corpus:
    """One long row of tokens: (n,) uint8, int16 or uint16 as stored."""

    def __init__(self, tokens: Tensor, source: str) -> None:
        self.tokens, self.source = tokens, source

    def check(self, vocab: int, sequence: int) -> None:
        """Raise DataError unless batches can be drawn for a model with this vocabulary."""
        if len(self.tokens) < sequence + 1:
            raise DataError(
                f"{self.source}: {len(self.tokens)} tokens are too few for sequences of {sequence} "
                f"and the token after; at least {sequence + 1} are needed"
            )
        largest = max(int(part.int().max()) for part in self.tokens.split(1 << 24))
        if largest >= vocab:
            raise DataError(
                f"{self.source}: token {largest} is outside of a vocabulary of {vocab}; "
                "choose a preset with a larger one"
            )

    def batch(self, seed: int, step: int, batch: int, sequence: int) -> Batch:
        """`batch` windows of `sequence` tokens at random places; the targets are one further."""
        places = torch.randint(
            len(self.tokens) - sequence, (batch,), generator=stream(seed, "batch", step)
        )
        windows = [self.tokens[p : p + sequence + 1] for p in places.tolist()]
        whole = torch.stack([window.long() for window in windows])
        return Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous())


def load(source: str) -> Corpus:
    """`topics` (the help texts that ship with Python), a `.bin` of tokens, or any text file."""
    if source == "topics":
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        return Corpus(_bytes(text.encode()), "topics")
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: no such file (give a text file, a .bin of tokens, or 'topics')")
    return Corpus(_mapped(path) if path.suffix == ".bin" else _bytes(path.read_bytes()), source)


def _bytes(text: bytes) -> Tensor:
    tokens = torch.empty(len(text) + 1, dtype=torch.int16)
    tokens[:-1] = torch.frombuffer(bytearray(text or b"\0"), dtype=torch.uint8)[: len(text)]
    tokens[-1] = END_OF_TEXT
    return tokens


def _mapped(path: Path) -> Tensor:
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise DataError(
            f"{path}: {size} bytes are no token file; its header alone has {HEADER_BYTES} bytes"
        )
    with path.open("rb") as file:
        magic, version, count = struct.unpack("<3i", file.read(12))
        if (magic, version) != (MAGIC, VERSION):
            raise DataError(
                f"{path}: magic {magic}, version {version} is no token file; "
                f"expected {MAGIC}, {VERSION} (GPT-2 shards of FineWeb)"
            )
        if count < 1:
            raise DataError(f"{path}: its header promises {count} tokens; there is nothing to read")
        if size != HEADER_BYTES + 2 * count:
            raise DataError(
                f"{path}: its header promises {count} tokens, {HEADER_BYTES + 2 * count} bytes; "
                f"it has {size}: it is cut short or damaged, fetch it again"
            )
        # A private copy-on-write map: torch wants memory that may be written to.
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=torch.uint16, offset=HEADER_BYTES)
