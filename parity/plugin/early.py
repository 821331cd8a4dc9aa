"""Whether a test module will need ranks, known before it is imported: by its text."""

from __future__ import annotations

import re
from pathlib import Path

_DECORATOR = re.compile(rb"^[ \t]*@([\w.]+\.)?matrix\(", re.MULTILINE)


def will_need_ranks(module: Path) -> bool:
    """It has a test under @parity.matrix. To import the module first takes as long as to import
    torch, and the server of ranks could have been importing it at the same time.
    """
    try:
        text = module.read_bytes()
    except OSError:
        return False
    return b"parity" in text and _DECORATOR.search(text) is not None
