"""The server that ranks are forked from; it can be started ahead of time, and without torch.

It has all that ranks import loaded (parity.warm), and serves all launches of this process.
"""

from __future__ import annotations

import multiprocessing as mp
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def context() -> ForkServerContext:
    """Whoever starts a process of it starts the server, if there is none: always the same one."""
    # Counting GPUs must not open CUDA before a fork: ask the driver's library instead.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(["parity.warm"])
    return found


def warm_up() -> None:
    """Start the server and wait for nothing: it imports while this process does something else."""
    context()
    forkserver.ensure_running()
