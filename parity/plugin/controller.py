"""Gathers the rows of all items, from workers too, and says what came of them; once a session."""

from __future__ import annotations

import os
from os.path import relpath
from pathlib import Path

import pytest

from parity.plugin import document, github, summary
from parity.plugin import row as rows
from parity.plugin.row import Row
from parity.plugin.shared import Shared

ANNOTATORS = "pytest_github_actions_annotate_failures"


class Controller:
    """A plugin of its own: workers have none."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.rows: dict[str, Row] = {}
        self.places: dict[str, github.Place] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Before others see it, who could not write a row of ours (JUnit)."""
        row = rows.take(report.user_properties)
        if row is None:
            return
        self.rows[report.nodeid] = row
        self.places[report.nodeid] = self._place(report.location)
        if self.shared.options.properties:
            report.user_properties += row.for_junit()

    def _place(self, location: tuple[str, int | None, str]) -> github.Place:
        top = os.environ.get("GITHUB_WORKSPACE") or self.shared.config.rootpath
        file, line, _ = location
        path = Path(relpath(self.shared.config.rootpath / file, top)).as_posix()
        return github.Place(path, (line or 0) + 1)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: object) -> None:
        """Workers do not count GPUs by themselves: all must collect the same items."""
        node.workerinput["parity_gpus"] = self.shared.gpus  # type: ignore[attr-defined]

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        path = self.shared.options.json
        if path is not None and not self.shared.config.option.collectonly:
            path.write_text(document.text(self.shared, self.rows, int(exitstatus)))
        file = os.environ.get("GITHUB_STEP_SUMMARY")
        if self.rows and file and _is_on_github():
            with Path(file).open("a", encoding="utf-8") as out:
                out.write(github.markdown(self.rows))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.rows:
            return
        terminalreporter.section("parity")
        for line in summary.lines(self.rows):
            terminalreporter.line(line)
        manager = self.shared.config.pluginmanager
        if _is_on_github() and not manager.hasplugin(ANNOTATORS):
            for line in github.commands(self.rows, self.places):
                terminalreporter.line(line)


def _is_on_github() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"
