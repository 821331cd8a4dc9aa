"""DTensors say where they lie: shards, strided shards, sums that are still to be made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import parity
from parity import UsageError
from parity.offline.place import shard
from tests.offline.ranks import compare, write, wrong

WHOLE = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[list[Any], list[Any], float]] = {
    "rows and columns": ([Shard(0), Shard(1)], [Shard(0), Shard(1)], 1.0),
    "a sum over dp": ([Replicate(), Shard(0)], [Partial(), Shard(0)], 0.5),
    "a sum over both": ([Replicate(), Replicate()], [Partial(), Partial()], 0.25),
    "an average": ([Replicate(), Replicate()], [Partial("avg"), Replicate()], 1.0),
    "strided": ([_StridedShard(0, split_factor=2), Shard(0)], [Shard(0), Shard(0)], 1.0),
    "in runs": ([_StridedShard(1, split_factor=3), Replicate()], [Replicate(), Shard(1)], 1.0),
}


def dtensor(local: Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    return DTensor.from_local(
        local.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=WHOLE.shape,
        stride=WHOLE.stride(),
    )


def local_of(whole: Tensor, placements: list[Any], at: list[int]) -> Tensor:
    for place, i in zip(placements, at, strict=True):
        if (dim := getattr(place, "dim", None)) is not None:
            n, split = whole.shape[dim], getattr(place, "split_factor", 1)
            whole = whole.index_select(dim, shard(torch.arange(n), 2, i, split))
    return whole


def record_dtensors(folder: Path) -> str:
    """On a rank: every case, right and by one percent wrong; and what is refused, in words."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    at = list(mesh.get_coordinate() or [])
    model = nn.Linear(1, 1)
    for name, (placements, gradients, scale) in CASES.items():
        for kind, factor in (("right", 1.0), ("wrong", 1.01)):
            part = dtensor(local_of(WHOLE, placements, at), mesh, placements)
            model = nn.Module()
            model.register_parameter("w", nn.Parameter(part))
            with parity.record(model, folder / f"{name}, {kind}") as recording:
                slope = local_of(WHOLE, gradients, at) * scale * factor
                model.w.grad = dtensor(slope, mesh, gradients)
                recording.gradients()
                recording.state()
    uneven = WHOLE[:5] if at[1] == 0 else WHOLE[5:]  # torch would make it 4 and 3
    model = nn.Module()
    part = dtensor(uneven, mesh, [Replicate(), Shard(0)])
    model.register_parameter("w", nn.Parameter(part))
    with parity.record(model, folder / "uneven") as recording:
        recording.gradients()
        recording.state()
    said = []
    recording = parity.record(model, folder / "max")
    model.w.grad = dtensor(WHOLE, mesh, [Partial("max"), Replicate()])
    for refused in (
        recording.gradients,
        lambda: parity.record(model, folder / "mesh", mesh=init_device_mesh("cpu", (4,))),
    ):
        try:
            refused()
        except UsageError as error:
            said.append(str(error))
    return "\n".join(said)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("dtensors")
    write(folder / "one", {"w": WHOLE}, {"w": WHOLE})
    with parity.world(4) as world:
        (said,) = set(world.run(record_dtensors, folder))
    return folder, said


@pytest.mark.parametrize("case", CASES)
def test_placements(case: str, recorded: tuple[Path, str]) -> None:
    folder, _ = recorded
    report = compare(folder / "one", folder / f"{case}, right")
    assert not report.wrong, [j.verdict for j in report.wrong]
    assert wrong(compare(folder / "one", folder / f"{case}, wrong")) == {"gradient of w": "differs"}


def test_a_placement_that_cannot_be_is_found_by_shapes(recorded: tuple[Path, str]) -> None:
    report = compare(recorded[0] / "one", recorded[0] / "uneven")
    assert wrong(report) == {"gradient of w": "missing"}
    assert {j.verdict.status for j in report.judged} == {"exact", "missing"}


def test_what_is_refused(recorded: tuple[Path, str]) -> None:
    assert recorded[1].splitlines() == [
        "a DTensor is Partial(max) over dp; expected a sum or average over one of: dp, tp; give "
        "mesh= with that axis, or reduce it before it is recorded",
        "mesh: it has no names for its axes; expected a DeviceMesh of all ranks, made with "
        'mesh_dim_names; or give at={"dp": 0, "tp": 1}',
    ]
