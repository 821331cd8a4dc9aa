"""A script that was written for torchrun, on ranks of this host and over the checking backend."""

from __future__ import annotations

import functools
import os
import runpy
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

from parity.backend import NAME, Settings
from parity.launcher import Backend, launch_groups

HOST = "127.0.0.1"


def run_script(
    path: Path, argv: Sequence[str], ranks: int, settings: Settings, deadline: float
) -> None:
    """Run `path` as the main program of every rank, with torchrun's environment.

    Raises RanksFailed when a rank fails. The store listens on a port that the system chose.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        HOST, 0, is_master=True, wait_for_workers=False
    )
    backend = Backend(deadline=deadline, settings=settings)
    args = (str(path), list(argv), ranks, store.port)
    launch_groups(_main, ranks, [args], backend=backend, is_script=True)


def _main(rank: int, path: str, argv: list[str], ranks: int, port: int) -> None:
    os.environ.update(_environment(rank, ranks, port))
    _route()
    sys.argv = [path, *argv]
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"the script ended with sys.exit({end.code!r})") from end
    for thread in threading.enumerate():  # as Python does at the end of a script
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    if dist.is_initialized():
        dist.destroy_process_group()


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets, on one host."""
    mine = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "ROLE_RANK": rank}
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "ROLE_WORLD_SIZE": ranks}
    where = {"MASTER_ADDR": HOST, "MASTER_PORT": port, "GROUP_WORLD_SIZE": 1}
    agent = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "parity",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    return {key: str(value) for key, value in {**mine, **sizes, **where, **agent}.items()}


def _route() -> None:
    """Scripts name their backend (gloo, nccl); torch offers no other way to give them this one."""
    for name in ("init_process_group", "new_group"):
        routed = _routed(getattr(distributed_c10d, name))
        for module in (dist, distributed_c10d, device_mesh):
            if hasattr(module, name):
                setattr(module, name, routed)


def _routed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if function.__name__ == "init_process_group":
            kwargs["backend"], args = NAME, args[1:]
            kwargs.pop("device_id", None)
        else:
            kwargs["backend"] = NAME
            args = (*args[:2], *args[3:])
        kwargs.pop("pg_options", None)
        return function(*args, **kwargs)

    return call
