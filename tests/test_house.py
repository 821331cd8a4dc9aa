"""The rules of the house that a machine can keep: who imports whom, sizes, globals."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "heiretsu").glob("*.py"), *(ROOT / "parity").glob("*.py")])

# A module imports from the rows above its own only.
ROWS = {
    "heiretsu": [
        ["mesh", "layout", "schedule", "rng"],
        ["comm", "config"],
        ["layers"],
        ["model"],
        ["pipeline", "sync"],
        ["train"],
        ["data"],
        ["__init__"],
        ["__main__"],
    ],
    "parity": [
        ["errors", "case", "rank", "warm", "yaml_file"],
        ["trace", "launcher", "bounds", "matrix"],
        ["whole"],
        ["judge"],
        ["plan"],
        ["record"],
        ["baseline"],
        ["run"],
        ["report"],
        ["cli", "__init__"],
        ["__main__"],
    ],
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, f"{path.name}:{node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_module_imports_only_from_above(path: Path) -> None:
    package = path.parent.name
    other = {"heiretsu": "parity", "parity": "heiretsu"}[package]
    rows = ROWS[package]
    row = next(i for i, names in enumerate(rows) if path.stem in names)
    allowed = {name for names in rows[:row] for name in names}
    known = {name for names in rows for name in names}
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in (other, "tests"), f"{path}: imports {name}"
        module = rest.split(".")[0]
        if top == package and module in known:
            assert module in allowed, f"{path}: imports {name}, which is not above it"


def test_every_module_has_its_row() -> None:
    for package, rows in ROWS.items():
        names = sorted(p.stem for p in SOURCES if p.parent.name == package)
        assert names == sorted(name for names in rows for name in names)


def test_torch_distributed_is_spoken_to_in_few_places() -> None:
    speakers = {
        f"{p.parent.name}/{p.stem}"
        for p in SOURCES
        if any(name.startswith("torch.distributed") for name in imports(p))
    }
    assert speakers == {
        "heiretsu/mesh",
        "heiretsu/comm",
        "heiretsu/__main__",  # joins the group that torchrun started
        "parity/rank",  # joins the group that parity started
        "parity/record",  # asks for its rank
        "parity/launcher",  # knows what its files are called
        "parity/warm",
    }


def test_nine_functions_in_ten_are_under_30_lines_and_files_under_400() -> None:
    lengths = sorted(length for path in SOURCES for length in functions(path))
    assert lengths[int(len(lengths) * 0.9)][0] <= 30, lengths[-10:]
    assert max(len(path.read_text().splitlines()) for path in SOURCES) <= 400


def test_there_are_no_module_globals_that_change() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"


def test_every_module_opens_with_what_it_is() -> None:
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_asking_for_help_is_quick_because_it_loads_no_torch() -> None:
    program = "import sys, parity.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "module", ["heiretsu.mesh", "heiretsu.layout", "heiretsu.schedule", "parity.case"]
)
def test_the_examples_in_docstrings_are_true(module: str) -> None:
    import doctest
    import importlib

    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
