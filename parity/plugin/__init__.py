"""The pytest plugin: tests under `@parity.matrix`, one item per case. It loads no torch itself."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from parity import forkserver
from parity.case import Case
from parity.cases import combinations_of
from parity.plugin import early, gpus, matrices, options, running
from parity.plugin import shared as sharing
from parity.plugin.controller import Controller

if TYPE_CHECKING:
    from parity.subject.check import TestCase


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "parity: a case of parallel code, against its baseline")
    told = getattr(config, "workerinput", None)
    count = gpus.visible(os.environ) if told is None else told.get("parity_gpus", 0)
    shared = sharing.share(config, count)
    if told is None:
        config.pluginmanager.register(Controller(shared), "heiretsu-parity-controller")
    matrices.add_to_arguments(config)  # workers read the command line by themselves


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> None:
    if not parent.config.option.collectonly and early.will_need_ranks(module_path):
        forkserver.warm_up()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if matrices.is_asked_for(file_path, parent.session):
        return matrices.MatrixFile.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    combinations = combinations_of(metafunc.function)
    if combinations is None:
        return
    name = metafunc.function.__name__
    if "case" not in metafunc.fixturenames:
        raise pytest.Collector.CollectError(
            f"parity.matrix: {name} takes no argument `case`; write def {name}(case)"
        )
    cases = combinations.cases
    if not cases:
        raise pytest.Collector.CollectError(
            f"parity.matrix: {name} has no case: `when` is false for every combination"
        )
    shared = metafunc.config.stash[sharing.SHARED]
    if not metafunc.config.option.collectonly:
        forkserver.warm_up()
    parameters = []
    for case in cases:
        marks = [pytest.mark.parity(case=case)]
        if reason := combinations.why_not(case, shared.ranks, shared.kind_of_room):
            marks.append(pytest.mark.skip(reason=reason))
        parameters.append(pytest.param(case, id=case.id, marks=marks))
    metafunc.parametrize("case", parameters, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> TestCase:
    """The case of a test under @parity.matrix; `case.check(...)` holds code against a baseline."""
    asked = getattr(request, "param", None)
    if not isinstance(asked, Case):
        pytest.fail(
            "the fixture `case` is parity's, for tests under @parity.matrix(...), as in "
            "@parity.matrix(tp=[1, 2, 4])",
            pytrace=False,
        )
    return running.test_case(request.node, asked)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """After marks have been heard (pytest does that first), and before fixtures are made."""
    if running.case_of(item) is not None:
        running.begin(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    if running.case_of(item) is None:
        return (yield)
    running.seed(item)
    result = yield
    running.check_compared(item)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    try:
        return (yield)
    finally:
        running.end(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    running.make_report(item, call, report)
    return report
