"""The server that ranks are forked from, started ahead of time: it imports torch meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import re
from multiprocessing import forkserver
from pathlib import Path

_DECORATOR = re.compile(rb"^[ \t]*@([\w.]+\.)?matrix\(", re.MULTILINE)


def warm_up() -> None:
    """Start it, and wait for nothing. It is the one that launches use (launcher.py)."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["parity.warm"])
    forkserver.ensure_running()


def will_be_needed(module: Path) -> bool:
    """Whether a test module has a test under @parity.matrix, by its text: to import it first takes
    as long as torch does, and the server could have been importing it at the same time.
    """
    try:
        text = module.read_bytes()
    except OSError:
        return False
    return b"parity" in text and _DECORATOR.search(text) is not None
