"""The tests of a file or a module that `@parity.matrix` has marked, without pytest."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from parity.cases import Combinations, combinations_of
from parity.errors import UsageError


class Test(NamedTuple):
    """A function that takes one argument, a case, and the cases that it is for."""

    name: str
    function: Callable[[Any], object]
    combinations: Combinations


def collect(reference: str) -> list[Test]:
    """`my_module:test_mlp`, `folder/test_file.py:test_mlp`, or all of them without a name.

    Raises UsageError where there is none.
    """
    where, _, name = reference.partition(":")
    module = _module(where)
    found = [
        Test(each, function, combinations)
        for each, function in vars(module).items()
        if (combinations := combinations_of(function)) is not None and name in ("", each)
    ]
    if found:
        return found
    if name and hasattr(module, name):
        raise UsageError(
            f"{reference}: {name} has no cases; put @parity.matrix(tp=[1, 2]) above it"
        )
    known = [each for each, value in vars(module).items() if combinations_of(value) is not None]
    raise UsageError(
        f"{reference}: no such test in {where} (there are: {', '.join(known) or 'none'})"
    )


def _module(where: str) -> ModuleType:
    path = Path(where)
    try:
        if path.suffix != ".py":
            sys.path.insert(0, str(Path.cwd()))
            return importlib.import_module(where)
        if not path.is_file():
            raise UsageError(f"{where}: no such file")
        sys.path.insert(0, str(path.resolve().parent))
        return importlib.import_module(path.stem)
    except UsageError:
        raise
    except Exception as error:  # importing runs the user's code, which may do anything
        raise UsageError(
            f"{where}: {type(error).__name__}: {error} (write it as my_module:test_mlp, or "
            "test_file.py:test_mlp)"
        ) from error
