"""A matrix file as tests: one item per case. Named on the command line, or by `parity_matrix`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from parity import forkserver
from parity.case import Case
from parity.errors import UsageError
from parity.plugin import running
from parity.plugin import shared as sharing

if TYPE_CHECKING:
    from parity.investigate import Investigator
    from parity.plan import Plan
    from parity.run import Session


def is_asked_for(path: Path, session: pytest.Session) -> bool:
    """By name: a matrix file that merely lies there is for `parity run`."""
    if path in session.config.stash[sharing.SHARED].options.matrices:
        return True
    is_one = any(fnmatchcase(path.name, f"*matrix*.{ending}") for ending in ("yaml", "yml"))
    return is_one and session.isinitpath(path)


def add_to_arguments(config: pytest.Config) -> None:
    """Files of `parity_matrix` belong to the whole suite, wherever `testpaths` has the rest of it.
    To name tests on the command line is to ask for no others.
    """
    if config.args_source == pytest.Config.ArgsSource.ARGS:
        return
    start = config.invocation_params.dir
    folders = [(start / name).resolve() for name in config.args]
    for path in config.stash[sharing.SHARED].options.matrices:
        if not any(path.is_relative_to(folder) for folder in folders):
            config.args.append(str(path))


class MatrixFile(pytest.File):
    """One program against its baselines; what they gave is kept for all its cases."""

    plan: Plan

    def collect(self) -> Iterator[pytest.Item]:
        if not self.config.option.collectonly:
            forkserver.warm_up()
        from parity.prepare import prepare

        try:
            self.plan, skipped = prepare(self.path, sharing.of(self).wish)
        except UsageError as error:
            raise self.CollectError(str(error)) from error
        reasons = {skip.case.id: skip.reason for skip in skipped}
        for case in [*self.plan.cases, *(skip.case for skip in skipped)]:
            item = MatrixItem.from_parent(self, name=case.id, case=case)
            if case.id in reasons:
                item.add_marker(pytest.mark.skip(reason=reasons[case.id]))
            yield item

    @cached_property
    def session_of_cases(self) -> tuple[Session, Investigator]:
        from parity.investigate import Investigator
        from parity.run import Session

        return Session(self.plan), Investigator(self.plan)


class MatrixItem(pytest.Item):
    def __init__(self, case: Case, **known: Any) -> None:
        super().__init__(**known)
        self.case = case
        self.add_marker(pytest.mark.parity(case=case))

    def runtest(self) -> None:
        from parity.run import Session
        from parity.subject.check import verdict

        file = self.parent
        assert isinstance(file, MatrixFile)
        first, closer = file.session_of_cases
        usual = file.plan.backend
        backend = replace(usual, deadline=running.deadline(self, usual.deadline))
        plan = replace(file.plan, backend=backend)
        session = Session(plan, first.baselines)
        result = closer.of(plan).investigate(session.result(self.case))
        self.stash[running.RUNNING].results.append(result)
        verdict(result, sharing.typed(self))

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.name
