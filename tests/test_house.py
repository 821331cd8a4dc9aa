"""The rules of the house that a machine can keep: who imports whom, sizes, globals."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "heiretsu",
    "parity",
    "parity/backend",
    "parity/offline",
    "parity/plugin",
    "parity/subject",
)
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]

# A module imports from the rows above its own only; `backend` and the like are packages with rows
# of their own.
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
        ["errors", "case", "cutting", "yaml_file", "arguments"],
        ["cases", "room"],
        ["backend", "slots", "forkserver", "scratch"],
        ["rank", "ledger", "bounds", "matrix_file", "strategies"],
        ["trace", "launcher", "mutants"],
        ["whole", "ranks", "script", "modules", "evidence"],
        ["judge", "wording"],
        ["plan", "mistakes", "rows", "parts"],
        ["tracing", "diagnose"],
        ["baseline", "culprit", "prepare"],
        ["run", "explain", "consequences"],
        ["report", "investigate", "soak"],
        ["document", "mutate"],
        ["mutation_report"],
        ["offline", "subject"],
        ["plugin", "warm"],
        ["cli", "__init__"],
        ["__main__"],
    ],
    "parity.offline": [
        ["boxes", "names", "place"],
        ["sketch", "read"],
        ["store", "spread"],
        ["recorder", "compare"],
        ["hints"],
        ["diff"],
        ["report"],
        ["__init__"],
    ],
    "parity.plugin": [
        ["early", "gpus", "options", "row", "timeouts"],
        ["summary", "shared"],
        ["document", "github", "running"],
        ["controller"],
        ["matrices"],
        ["__init__"],
    ],
    "parity.subject": [
        ["boxes", "packing", "placing"],
        ["alignment", "program"],
        ["features", "paths"],
        ["places", "data"],
        ["training"],
        ["target"],
        ["layout", "collect"],
        ["check"],
        ["__init__"],
    ],
    "parity.backend": [
        ["memory", "fold", "settings", "ledger", "guard", "threads"],
        ["board"],
        ["lane", "deadlock"],
        ["moves"],
        ["call"],
        ["engine", "watch", "mutation"],
        ["work"],
        ["member"],
        ["group"],
        ["__init__"],
    ],
}


def package_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


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
    package = package_of(path)
    other = "parity" if package == "heiretsu" else "heiretsu"
    rows = ROWS[package]
    row = next(i for i, names in enumerate(rows) if path.stem in names)
    allowed = {name for names in rows[:row] for name in names}
    known = {name for names in rows for name in names}
    for name in imports(path):
        assert name.partition(".")[0] not in (other, "tests"), f"{path}: imports {name}"
        module = name.removeprefix(f"{package}.").split(".")[0]
        if name.startswith(f"{package}.") and module in known:
            assert module in allowed, f"{path}: imports {name}, which is not above it"
        elif package == "parity.backend" and name.startswith("parity."):
            # The backend stands alone, but for the errors that it raises.
            assert name.startswith(("parity.errors", "parity.backend")), f"{path}: imports {name}"


def test_every_module_has_its_row() -> None:
    for package, rows in ROWS.items():
        names = [p.stem for p in SOURCES if package_of(p) == package]
        inner = [folder.removeprefix("parity/") for folder in FOLDERS if "/" in folder]
        names += inner if package == "parity" else []
        assert sorted(names) == sorted(name for names in rows for name in names)


def test_torch_distributed_is_spoken_to_in_few_places() -> None:
    speakers = {
        f"{p.parent.name}/{p.stem}"
        for p in SOURCES
        if any(name.startswith("torch.distributed") for name in imports(p))
    }
    assert {name for name in speakers if not name.startswith("backend/")} == {
        "heiretsu/mesh",
        "heiretsu/comm",
        "heiretsu/__main__",  # joins the group that torchrun started
        "parity/rank",  # joins the group that parity started
        "offline/place",  # reads DTensors
        "offline/recorder",  # asks for its rank
        "parity/tracing",  # asks for its rank
        "parity/launcher",  # knows what its files are called
        "parity/script",  # hosts the store of ranks that join by themselves
        "parity/warm",
        "subject/placing",
        "subject/target",  # makes the mesh
        "subject/layout",  # speaks in placements
        "parity/mutants",  # knows the reductions by name
    }


def test_nothing_but_a_script_for_torchrun_is_given_another_torch_distributed() -> None:
    """Changed calls go through the backend's rules; nobody replaces functions of torch."""
    patchers = [
        p.stem
        for p in SOURCES
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "setattr"
    ]
    assert patchers == ["script"]


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
    "module",
    [
        "heiretsu.mesh",
        "heiretsu.layout",
        "heiretsu.schedule",
        "parity.case",
        "parity.cutting",
        "parity.strategies",
    ],
)
def test_the_examples_in_docstrings_are_true(module: str) -> None:
    import doctest
    import importlib

    from hypothesis import find, settings

    # `find` would replay what it found for another example: the lambdas of examples look all alike.
    fresh = partial(find, settings=settings(database=None, max_examples=2000))
    result = doctest.testmod(importlib.import_module(module), extraglobs={"find": fresh})
    assert result.attempted > 0
    assert result.failed == 0
