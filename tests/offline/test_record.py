"""What parity.record writes, when, and what it refuses before it has written anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import parity
from parity import UsageError
from parity.offline.names import plain
from parity.subject.alignment import Box, Held, Part
from tests.offline.ranks import Model, compare, recorder, write


def records(folder: Path, step: int, rank: int = 0) -> list[tuple[str, str]]:
    with safe_open(folder / f"step{step}-rank{rank}.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["parity"])
    return [(r["check"], r["name"]) for r in said["records"]]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def test_one_line_records_the_steps_of_an_optimizer(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters())
    parity.record(model, tmp_path, optimizer=optimizer)
    train(model, optimizer, steps=5)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    kinds = ["exp_avg of ", "exp_avg_sq of ", "step of "]
    assert records(tmp_path, 0) == [
        *(("parameter", name) for name in names),
        *(("gradient", name) for name in reversed(names)),
        *(("state", kind + name) for name in names for kind in ["", *kinds]),
    ]
    assert len(records(tmp_path, 1)) == 20  # parameters before the first step alone
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rank0.json",
        *(f"step{i}-rank0.safetensors" for i in range(3)),
    ]


def test_values_are_those_of_the_moment(tmp_path: Path) -> None:
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    parity.record(model, tmp_path, optimizer=optimizer)
    model.weight.grad = torch.ones(1, 3)
    optimizer.step()
    optimizer.zero_grad()
    with safe_open(tmp_path / "step0-rank0.safetensors", framework="pt") as file:
        values = [file.get_tensor(str(i)) for i in range(3)]
    assert torch.equal(torch.stack(values), torch.stack([before, torch.ones(1, 3), before - 1]))


@pytest.mark.parametrize(("steps", "seen"), [(1, [0]), ([1, 3], [1, 3]), (None, [0, 1, 2, 3])])
def test_which_steps(steps: Any, seen: list[int], tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters())
    with parity.record(model, tmp_path, optimizer=optimizer, steps=steps):
        train(model, optimizer, steps=4)
    train(model, optimizer)  # nobody listens any more
    names = [path.name for path in tmp_path.glob("step*")]
    assert sorted(names) == [f"step{i}-rank0.safetensors" for i in seen]


def test_without_an_optimizer_object(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters())
    with parity.record(model, tmp_path) as recording:
        for _ in range(2):
            model(torch.randn(4, 3)).square().sum().backward()
            recording.loss(1.5)
            recording.loss(torch.tensor(2.5))
            recording.gradients()
            optimizer.step()
            recording.state(optimizer)
        recording.loss(3.5)
    assert records(tmp_path, 1)[:3] == [
        ("loss", "loss"),
        ("loss", "loss (call 2)"),
        ("gradient", "1.bias"),
    ]
    assert ("state", "exp_avg of 0.bias") in records(tmp_path, 1)
    assert records(tmp_path, 2) == [("loss", "loss")]  # close() writes what is left


def test_gradients_alone_end_a_step_when_the_next_ones_come(tmp_path: Path) -> None:
    model = Model({"w": torch.ones(2)})
    model.get_parameter("w").grad = torch.ones(2)
    with parity.record(model, tmp_path) as recording:
        recording.gradients()
        recording.gradients()
    assert records(tmp_path, 0) == [("parameter", "w"), ("gradient", "w")]
    assert records(tmp_path, 1) == [("gradient", "w")]


def test_activations_are_what_modules_put_out(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters())
    wrapped = nn.Sequential()
    wrapped.add_module("module", model)  # as DDP does it: one model, not two
    parity.record(wrapped, tmp_path, optimizer=optimizer, activations=True)
    train(wrapped, optimizer)
    assert records(tmp_path, 0)[:3] == [
        ("forward", "output of 0"),
        ("forward", "output of 1"),
        ("forward", "output of the model"),
    ]


def test_wrappers_are_no_part_of_a_name() -> None:
    path = "module._orig_mod.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.up.weight"
    assert plain(path) == "blocks.0.up.weight"
    assert plain(path, {"blocks.": "layers.", "blocks.0.": "layers.7."}) == "layers.7.up.weight"
    assert plain(path, str.upper) == "BLOCKS.0.UP.WEIGHT"
    assert plain("other.module.w", {"x": "y"}) == "other.w"


def test_a_nudge_moves_every_parameter_by_one_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    for number in ("1", "1", "2", "0"):
        monkeypatch.setenv("PARITY_NUDGE", number)
        model = Model({"a.w": torch.ones(50)})
        parity.record(model, tmp_path / str(len(moved)))
        moved.append(model.get_parameter("a.w").detach() - 1)
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    assert moved[0].abs().unique().tolist() == [2**-23]
    assert not moved[3].any()


def test_no_step_is_written_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recorder(tmp_path, {"w": torch.ones(2)})
    recording.gradients()
    replaced: list[tuple[Path, Path]] = []
    monkeypatch.setattr(os, "replace", lambda a, b: replaced.append((a, b)))
    recording.state()
    assert not (tmp_path / "step0-rank0.safetensors").exists()
    assert [b.name for _, b in replaced] == ["step0-rank0.safetensors"]


def test_a_sketch_is_small(tmp_path: Path) -> None:
    value = {"w": torch.randn(300, 300)}
    write(tmp_path / "full", value, value)
    write(tmp_path / "sketch", value, value, sketch=True)
    sizes = [(tmp_path / k / "step0-rank0.safetensors").stat().st_size for k in ("full", "sketch")]
    assert sizes[0] > 3 * 360_000
    assert sizes[1] < 3 * 1_200


def test_a_second_recording_in_one_folder_is_refused_and_the_first_stays(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.ones(2)})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError) as error:
        write(tmp_path, {"w": torch.zeros(2)})
    assert str(error.value) == (
        f"{tmp_path}: it holds a recording of rank 0 already (step0-rank0.safetensors); expected a "
        "new folder; name another, or remove this one first. Nothing in it was changed"
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "rank0.json").unlink()  # what is left of one is not written over either
    with pytest.raises(UsageError, match="it holds a recording of rank 0 already"):
        write(tmp_path, {"w": torch.zeros(2)})
    write(tmp_path, {"w": torch.ones(2)}, rank=1, world=2)  # of another rank: that is how it is


class Wrapped:
    """An optimizer of some framework."""


W = {"up.w": torch.ones(4, 2)}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"layout": {"*.weight": {0: "tp"}}, "at": {"tp": 0}},
        "layout: no parameter is called '*.weight'; expected one of up.w, ... (* stands for any "
        "characters); correct the name or remove the line",
    ),
    (
        {"layout": {"up.w": {0: "tp"}}, "at": {"dp": 0}},
        "layout of 'up.w': no axis 'tp'; expected one of: dp; give the coordinates of this rank by "
        "mesh= or at=",
    ),
    (
        {"layout": {"up.w": {2: "tp"}}, "at": {"tp": 0}},
        "layout of 'up.w': 'up.w' has no dimension 2; expected 0 to 1; its shape here is (4, 2)",
    ),
    (
        {"layout": {"up.w": "tp"}, "at": {"tp": 0}},
        "layout of 'up.w': it is a str; expected {dimension: axis}, as in {0: \"tp\"}, or "
        "what parity.held has found",
    ),
    (
        {"at": {"tp": 2}, "sizes": {"tp": 2}},
        "at: tp is 2; expected a whole number, 0 to 1, since sizes has 2",
    ),
    ({"at": {"tp": -1}}, "at: tp is -1; expected a whole number, 0 or more"),
    (
        {"at": {"tp": 0}, "mesh": "a mesh"},
        "mesh= and at= both give coordinates; expected one of them; leave one out",
    ),
    (
        {"optimizer": Wrapped()},
        "optimizer: a Wrapped has no register_step_post_hook; expected a torch.optim.Optimizer; "
        "give the one inside of it, or leave it out and call .gradients() before each step and "
        ".state(optimizer) after it",
    ),
    (
        {"nudge": 3},
        "nudge: 3, on 2 ranks; expected a run of one process, since copies on several ranks would "
        "be moved apart; unset PARITY_NUDGE for this run",
    ),
    (
        {"nudge": -1},
        "nudge: -1; expected a whole number, 0 for none; correct it\n"
        "nudge: -1, on 2 ranks; expected a run of one process, since copies on several ranks "
        "would be moved apart; unset PARITY_NUDGE for this run",
    ),
    (
        {"sketch": True, "at": {"tp": 0}},
        "sketch: where parameter of up.w lies in the whole is not known; expected a DTensor or a "
        'layout; give layout={"up.w": {0: "<axis>"}}, or "up.w": {} if every rank holds all of it',
    ),
    (
        {"sketch": True, "at": {"tp": 0}, "layout": {"*": {0: "tp"}}},
        "sketch: the size of axis 'tp' is not known; expected one for every axis that cuts a "
        'parameter; give sizes={"tp": ...}',
    ),
    (
        {"sketch": True, "activations": True, "layout": {"*": {}}},
        "sketch: with activations=True; a sketch needs the place of a tensor, which is not known "
        "of activations; leave out one of the two",
    ),
    (
        {"rename": lambda name: "same", "model": two_layers()},
        "parameters '0.weight' and '0.bias' would both be recorded as 'same'; expected one name "
        "each; give `rename` a function that tells them apart",
    ),
    (
        {"model": nn.ReLU()},
        "model: it has no parameters; expected a model to record",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m[:50] for _, m in REFUSED])
def test_what_cannot_be_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        recorder(tmp_path / "new", W, 1, 2, **options)
    assert str(error.value) == message
    assert not (tmp_path / "new").exists()


def test_a_layout_made_for_another_piece(tmp_path: Path) -> None:
    whole = Part("up.w", (8, 2), [Box((0, 0), torch.arange(16).view(8, 2))])
    with pytest.raises(UsageError) as error:
        recorder(tmp_path, W, 0, 2, layout={"up.w": Held("up.w", (8, 2), [whole])})
    assert str(error.value) == (
        "layout of 'up.w': it is of a tensor of (8, 2), and 'up.w' has (4, 2) here; it was made "
        "for another piece: make it anew on this rank"
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "RANK=2 WORLD_SIZE=2: expected a rank from 0 to WORLD_SIZE - 1; set both, or neither, "
            "or call torch.distributed.init_process_group first",
        ),
        (
            {"PARITY_NUDGE": "x"},
            "PARITY_NUDGE=x: expected a whole number, 0 for none; correct it",
        ),
    ],
)
def test_a_wrong_environment(
    environment: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as error:
        parity.record(Model(W), tmp_path)
    assert str(error.value) == message


def test_a_loss_over_an_axis_that_there_is_not(tmp_path: Path) -> None:
    recording = recorder(tmp_path, W, 0, 2, at={"tp": 0})
    with pytest.raises(UsageError) as error:
        recording.loss(1.0, mean="dp")
    assert str(error.value) == (
        "loss: no axis 'dp'; expected one of: tp; give the coordinates of this rank to "
        "parity.record by mesh= or at="
    )


def test_on_one_process_a_layout_for_many_is_no_mistake(tmp_path: Path) -> None:
    layout = {"up.w": {0: "tp"}}
    for name in ("a", "b"):
        recording = recorder(tmp_path / name, W, layout=layout)
        recording.loss(1.0, mean="dp")
        recording.state()
    assert records(tmp_path / "a", 0) == [("loss", "loss"), ("state", "up.w")]
    assert not compare(tmp_path / "a", tmp_path / "b").wrong


def test_a_stage_of_a_pipeline_need_not_hold_all_that_the_layout_names(tmp_path: Path) -> None:
    layout = {"head.w": {0: "tp"}}
    at, sizes = {"tp": 0, "pp": 1}, {"tp": 1, "pp": 2}
    recorder(tmp_path / "a", W, 1, 2, at=at, sizes=sizes, layout=layout)
    recorder(tmp_path / "b", W, 1, 2, at={"tp": 0}, rename={"x": "y"}, layout=layout)


def test_gradients_alone_of_some_steps(tmp_path: Path) -> None:
    model = Model({"w": torch.ones(2)})
    model.get_parameter("w").grad = torch.ones(2)
    with parity.record(model, tmp_path, steps=[1]) as recording:
        for _ in range(4):
            recording.gradients()
    assert [path.name for path in tmp_path.glob("step*")] == ["step1-rank0.safetensors"]
