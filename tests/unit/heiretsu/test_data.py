"""Batches are functions of (seed, step); files that are not what they say are refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heiretsu import data
from heiretsu.train import Batch


def token_file(folder: Path, tokens: list[int], **header: int) -> Path:
    """A FineWeb shard, with parts of its header wrong on demand."""
    head = [0] * 256
    head[:3] = [
        header.get("magic", data.MAGIC),
        header.get("version", data.VERSION),
        header.get("count", len(tokens)),
    ]
    path = folder / "shard.bin"
    path.write_bytes(struct.pack("<256i", *head) + struct.pack(f"<{len(tokens)}H", *tokens))
    return path


def test_the_default_text_is_prose_of_this_python() -> None:
    corpus = data.load("topics")
    corpus.check(vocab=257, sequence=16)
    text = bytes(corpus.tokens[:-1].tolist()).decode()
    assert "assert" in text
    assert len(text) > 300_000
    assert corpus.tokens[-1] == data.END_OF_TEXT


def test_a_text_file_is_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("héllo")
    assert data.load(str(path)).tokens.tolist() == [*"héllo".encode(), data.END_OF_TEXT]


def test_a_token_file_is_read_to_the_token(tmp_path: Path) -> None:
    tokens = [0, 1, 50256, 40000, 7] * 20
    corpus = data.load(str(token_file(tmp_path, tokens)))
    corpus.check(vocab=50257, sequence=16)
    batch = corpus.batch(seed=3, step=0, batch=4, sequence=16)
    assert corpus.tokens.to(torch.int64).tolist() == tokens
    assert batch.tokens.dtype == torch.int64
    assert set(batch.tokens.flatten().tolist()) <= set(tokens)


@given(st.integers(0, 5), st.integers(0, 5))
def test_a_batch_is_a_function_of_seed_and_step(seed: int, step: int) -> None:
    corpus = data.load("topics")
    a, b = (corpus.batch(seed, step, batch=3, sequence=8) for _ in range(2))
    other = corpus.batch(seed, step + 1, batch=3, sequence=8)
    assert torch.equal(a.tokens, b.tokens)
    assert not torch.equal(a.tokens, other.tokens)
    assert torch.equal(a.tokens[:, 1:], a.targets[:, :-1])


def test_the_last_window_of_a_short_text_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcd")
    corpus = data.load(str(path))
    corpus.check(vocab=257, sequence=4)
    batch = corpus.batch(seed=0, step=0, batch=5, sequence=4)
    assert batch.targets[0].tolist() == [*b"bcd", data.END_OF_TEXT]


@given(st.integers(1, 40), st.integers(1, 9))
def test_the_parts_of_a_batch_are_the_batch(size: int, parts: int) -> None:
    batch = Batch(torch.arange(size).view(-1, 1), torch.arange(size).view(-1, 1) + 1)
    pieces = [batch.part(parts, i) for i in range(parts)]
    assert torch.equal(torch.cat([p.tokens for p in pieces]), batch.tokens)
    assert torch.equal(torch.cat([p.targets for p in pieces]), batch.targets)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        data.DataError, match=r"no such file \(give a text file, a .bin of tokens, o"
    ):
        data.load(str(tmp_path / "nothing.txt"))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"magic": 1}, "magic 1, version 1 is no token file; expected 20240520, 1"),
        ({"version": 2}, "magic 20240520, version 2 is no token file"),
        ({"count": 0}, "its header promises 0 tokens; there is nothing to read"),
        ({"count": 5}, "its header promises 5 tokens, 1034 bytes; it has 1030: it is cut short"),
        ({"count": 2}, "its header promises 2 tokens, 1028 bytes; it has 1030"),
    ],
)
def test_a_wrong_header(tmp_path: Path, header: dict[str, int], said: str) -> None:
    with pytest.raises(data.DataError, match=said):
        data.load(str(token_file(tmp_path, [1, 2, 3], **header)))


def test_a_file_shorter_than_its_header(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"abc")
    with pytest.raises(
        data.DataError, match="3 bytes are no token file; its header alone has 1024"
    ):
        data.load(str(path))


def test_tokens_outside_of_the_vocabulary(tmp_path: Path) -> None:
    corpus = data.load(str(token_file(tmp_path, [1, 50256] * 20)))
    with pytest.raises(data.DataError, match="token 50256 is outside of a vocabulary of 257"):
        corpus.check(vocab=257, sequence=8)


def test_a_text_shorter_than_a_sequence(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("")
    with pytest.raises(data.DataError, match="1 tokens are too few for sequences of 8"):
        data.load(str(path)).check(vocab=257, sequence=8)
