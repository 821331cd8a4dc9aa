"""python -m heiretsu train: the same losses on every topology, and one message for each mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from heiretsu.__main__ import main

ROOT = Path(__file__).parents[3]
TOPOLOGIES = ["dp2", "tp2", "pp2", "dp2-tp2-pp2"]


def train(topology: str, *args: str) -> list[str]:
    """The printed losses and norms, by step."""
    sizes = dict(re.findall(r"([a-z]+)(\d+)", topology))
    axes = [word for axis, size in sizes.items() for word in (f"--{axis}", size)]
    world = 1
    for size in sizes.values():
        world *= int(size)
    launcher = [] if world == 1 else ["torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={world}"] if world > 1 else []
    done = subprocess.run(
        [
            *(sys.executable, "-m", *launcher),
            *(["-m"] if world > 1 else []),
            *("heiretsu", "train", "--steps", "4", *axes, *args),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    return [line.rsplit("  ", 1)[0] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def alone() -> list[str]:
    return train("dp1")


def test_the_loss_falls_and_a_line_says_loss_norm_and_speed(alone: list[str]) -> None:
    losses = [float(re.search(r"loss (\d+\.\d{4})  grad norm \d+\.\d{4}$", x)[1]) for x in alone]  # type: ignore[index]
    assert len(losses) == 4
    assert losses[3] < losses[0] - 0.1


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_topology_prints_the_same(topology: str, alone: list[str]) -> None:
    assert train(topology) == alone


def test_gpipe_and_untied_embeddings_train_too() -> None:
    args = ("--schedule", "gpipe", "--untied", "--optimizer", "sgd")
    assert train("pp2", *args) == train("dp1", *args)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tp", "5"], "24 heads cannot be cut over tp=5"),
        (["--dp", "2"], "dp2-tp1-pp1 has 2 ranks and 1 were started; run it with torchrun --stand"),
        (["--steps", "0"], "--steps 0 must be 1 or more"),
        (["--lr", "nan"], "lr=nan must be a number above 0"),
        (["--clip", "-1"], "max_norm=-1.0 must be a number above 0"),
        (["--weight-decay", "-1"], "weight_decay=-1.0 must be 0 or a number above it"),
        (["--dp", "0"], "--dp 0 must be 1 or more"),
        (["--data", "/nothing"], "/nothing: no such file"),
        (["--sequence", "21"], "sequence=21 is longer than context=20"),
        (["--device", "cuda"], "--device cuda: no CUDA device is visible"),
        (["--tp", "5", "--data", "/nothing"], "/nothing: no such file"),
    ],
)
def test_a_mistake_is_2_with_one_message(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *args]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""
