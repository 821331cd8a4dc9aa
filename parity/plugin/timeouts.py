"""Which limit pytest-timeout sets for an item: ours must come before it, since it names no rank."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest

MARGIN = 5.0  # seconds for ranks to say where they stand, and for the report; less if time is short
LEAST = 0.5


def of(item: pytest.Item) -> float | None:
    """The seconds that an item may take, or None."""
    manager = item.config.pluginmanager
    if not (manager.hasplugin("timeout") or manager.hasplugin("pytest_timeout")):
        return None
    marker = item.get_closest_marker("timeout")
    written = [
        *([*marker.args[:1], marker.kwargs.get("timeout")] if marker else []),
        item.config.getoption("timeout", default=None),
        os.environ.get("PYTEST_TIMEOUT"),
        _from_file(item.config),
    ]
    for value in written:
        if value is not None and value != "":
            with suppress(TypeError, ValueError):  # pytest-timeout itself will say so
                return float(value) or None
    return None


def _from_file(config: pytest.Config) -> object:
    with suppress(KeyError, ValueError):
        return config.getini("timeout")
    return None


def left(item: pytest.Item, elapsed: float) -> float:
    """The seconds that a launch may take, so that it is over before pytest-timeout strikes."""
    limit = of(item)
    if limit is None:
        return float("inf")
    return max(limit - elapsed - min(MARGIN, limit / 3), LEAST)
