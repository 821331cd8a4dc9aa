"""What all items of a session share: options, room, and what baselines gave. Kept on its config."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os.path import relpath
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parity.errors import UsageError
from parity.plugin import options as settings
from parity.plugin.options import Options
from parity.room import room

if TYPE_CHECKING:
    from parity.plan import Wish
    from parity.subject.check import Kept

MOST = 8  # ranks, where there is no GPU and nobody says another number


@dataclass
class Shared:
    config: pytest.Config
    options: Options
    gpus: int
    device: str
    ranks: int  # that there is room for

    @cached_property
    def kept(self) -> Kept:
        from parity.subject.check import Kept

        kept = Kept()
        self.config.add_cleanup(kept.close)
        return kept

    @property
    def wish(self) -> Wish:
        from parity.plan import Wish

        o = self.options
        return Wish(
            device=self.device,
            backend=o.backend,
            max_world=o.max_world,
            dtypes=o.dtype,
            seed=o.seed,
            deadline=o.deadline,
            gpus=self.gpus,
        )

    @property
    def backend(self) -> str:
        return {"auto": "nccl" if self.device == "cuda" else "parity"}.get(
            self.options.backend, self.options.backend
        )

    @property
    def kind_of_room(self) -> str:
        return ", one on each visible GPU" if self.backend == "nccl" else ""


SHARED = pytest.StashKey[Shared]()


def share(config: pytest.Config, gpus: int) -> Shared:
    """Read and check what the user sets; raises pytest.UsageError with all that is wrong."""
    options, objections = settings.read(config)
    device, ranks = "cpu", MOST
    try:
        o = options
        device, ranks = room(o.device, o.backend, o.max_world, MOST, gpus, "--parity-")
    except UsageError as error:
        objections.append(str(error))
    if objections:
        raise pytest.UsageError("\n".join(objections))
    shared = config.stash[SHARED] = Shared(config, options, gpus, device, ranks)
    return shared


def of(item: pytest.Item | pytest.Collector) -> Shared:
    return item.config.stash[SHARED]


def typed(item: pytest.Item) -> str:
    """What to type to run the item again, where this session was started."""
    path, separator, rest = item.nodeid.partition("::")
    start = item.config.invocation_params.dir
    place = Path(relpath(item.config.rootpath / path, start)).as_posix()
    return settings.again(of(item).options, f"{place}{separator}{rest}")
