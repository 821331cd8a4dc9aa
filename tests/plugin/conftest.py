"""Sessions of pytest inside tests: only our plugin, no GPU, and nothing of what surrounds us.

A session in this process forgets the modules that it has loaded, and torch cannot be loaded twice:
so it is loaded here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import parity.plugin
from parity.subject import check

LOADED = (parity.plugin, check)
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def nothing_of_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("PYTEST_", "GITHUB_")) or name in ("CI", "BUILD_NUMBER", "COLUMNS"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "parity.plugin")
    # Who waits for the cores that another session has says so, and takes longer.
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
