"""Where a rank stands: a grid of pp x dp x tp positions, and one process group per line of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

# Slowest first: the ranks of a tp line are neighbours (the fastest links), those of a pp line are
# furthest apart (they say least to each other).
AXES = ("pp", "dp", "tp")


class At(NamedTuple):
    """The coordinates of one rank."""

    dp: int
    tp: int
    pp: int


@dataclass(frozen=True)
class Topology:
    """The size of every axis. A pure value: it needs no process.

    >>> topology = Topology(dp=2, tp=3)
    >>> str(topology), topology.world, topology.at(4), topology.peers("dp", 4)
    ('dp2-tp3-pp1', 6, At(dp=1, tp=1, pp=0), [1, 4])
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size(axis) < 1:
                raise ValueError(f"{axis}={self.size(axis)}: an axis has at least one rank")

    def size(self, axis: str) -> int:
        return int(getattr(self, axis))

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.pp

    def at(self, rank: int) -> At:
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside of {self}, which has {self.world} ranks")
        return At(dp=rank // self.tp % self.dp, tp=rank % self.tp, pp=rank // (self.tp * self.dp))

    def rank(self, at: At) -> int:
        return (at.pp * self.dp + at.dp) * self.tp + at.tp

    def peers(self, axis: str, rank: int) -> list[int]:
        """The ranks of the line through `rank` along `axis`, in order of their coordinate."""
        at = self.at(rank)
        return [self.rank(at._replace(**{axis: i})) for i in range(self.size(axis))]

    def lines(self, axis: str) -> list[list[int]]:
        """Every line along `axis`, by its first rank."""
        return [
            self.peers(axis, rank)
            for rank in range(self.world)
            if getattr(self.at(rank), axis) == 0
        ]

    def __str__(self) -> str:
        return f"dp{self.dp}-tp{self.tp}-pp{self.pp}"

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Read `dp2-tp3-pp1`; an axis that is not named has size 1."""
        sizes: dict[str, int] = {}
        for part in text.split("-"):
            match = re.fullmatch(r"(dp|tp|pp)([1-9]\d*)", part)
            if match is None or match[1] in sizes:
                raise ValueError(f"'{text}' is no topology; write it as in dp2-tp2-pp1")
            sizes[match[1]] = int(match[2])
        return cls(**sizes)


class Mesh:
    """This rank's coordinates and the groups it belongs to. Passed along, never a global.

    With more than one rank, torch.distributed must be initialised with as many ranks as `topology`
    has, and every rank must make the mesh: making groups is collective.
    """

    def __init__(self, topology: Topology, rank: int, device: torch.device) -> None:
        self.topology, self.rank, self.device = topology, rank, device
        self.at = topology.at(rank)
        self._groups: dict[str, dist.ProcessGroup] = {}
        if topology.world > 1:
            self._make_groups()

    def _make_groups(self) -> None:
        shape = tuple(self.topology.size(axis) for axis in AXES)
        grid = init_device_mesh(self.device.type, shape, mesh_dim_names=AXES)
        self._groups = {axis: grid.get_group(axis) for axis in AXES if self.size(axis) > 1}
        # Gradients travel upstream on a group of their own. On one communicator, stage i sending
        # an activation while stage i + 1 sends it a gradient would wait for each other for ever:
        # NCCL runs what is queued on a communicator in order.
        if self.topology.pp > 1:
            for line in self.topology.lines("pp"):
                group = dist.new_group(line, group_desc="pp upstream")
                if self.rank in line:
                    self._groups["pp upstream"] = group

    def size(self, axis: str) -> int:
        return self.topology.size(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        return self._groups[axis]

    @property
    def is_first_stage(self) -> bool:
        return self.at.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.at.pp == self.topology.pp - 1
