"""How many GPUs there are for torch, found without it: by the driver's files and the environment.

Loading torch costs a second, and asking CUDA makes a context of it. Where there is no GPU, which is
most machines that tests run on, nothing but the names in /dev is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

DEV = Path("/dev")


def visible(environ: Mapping[str, str], dev: Path = DEV, build: str | None = None) -> int:
    """As many as torch.cuda.device_count() says. `build` is "cuda", "hip", or "" for neither."""
    nvidia = len([p for p in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])
    amd = len(list(dev.glob("dri/renderD*"))) if (dev / "kfd").exists() else 0
    if not nvidia and not amd:
        return 0
    build = _torch_is_built_for() if build is None else build
    if build == "hip":
        below = environ.get("ROCR_VISIBLE_DEVICES")
        count = amd if below is None else min(amd, len(_entries(below, amd)))
        listed = environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES"))
    else:
        count = nvidia if build == "cuda" else 0
        listed = environ.get("CUDA_VISIBLE_DEVICES")
    return count if listed is None else len(_entries(listed, count))


def _entries(listed: str, count: int) -> list[str]:
    """Of a list, what comes before the first entry that is none. As for the driver, a list that
    names one twice is no list.
    """
    entries: list[str] = []
    for entry in map(str.strip, listed.split(",")):
        is_index = entry.isdigit() and int(entry) < count
        if not is_index and not entry.startswith(("GPU-", "MIG-")):
            break
        if entry in entries:
            return []
        entries.append(entry)
    return entries


def _torch_is_built_for() -> str:
    """Read, not imported."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = re.search(r"^(cuda|hip)\b[^=\n]*= *['\"]", text, re.MULTILINE)
    return found[1] if found else ""
