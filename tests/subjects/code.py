"""What a user writes for a subject: its functions, and how many lines they are."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from parity.case import Case
from parity.cases import combinations_of

MODULES = ("data_parallel", "sharded", "zero", "tensor_parallel", "pipelines", "llama")
NEEDS = {"llama": ("transformers", "accelerate")}  # what is not installed with the tests
FINDS = tuple(
    f"finds.{path.stem}"
    for path in sorted((Path(__file__).parent / "finds").glob("*.py"))
    if path.stem != "__init__"
)


@dataclass(frozen=True)
class Subject:
    """A function `check_NAME` of a module, with all that it uses there."""

    module: str
    name: str
    source: str  # of the module

    @property
    def check(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(
            import_module(f"tests.subjects.{self.module}"), f"check_{self.name}"
        )
        return found

    @property
    def cases(self) -> list[Case]:
        combinations = combinations_of(self.check)
        assert combinations is not None
        return combinations.cases

    @property
    def about(self) -> str:
        """What the check says of itself, or else the first line of its module."""
        said = ast.get_docstring(self._check) or ast.get_docstring(ast.parse(self.source)) or ""
        return said.partition("\n")[0]

    @property
    def functions(self) -> list[ast.FunctionDef]:
        """The check, and the functions of its module that it calls, as they stand there."""
        functions = _functions(self.source)
        found, left = set[str](), [f"check_{self.name}"]
        while left:
            name = left.pop()
            found.add(name)
            used = {n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)}
            left += [other for other in used & set(functions) if other not in found]
        baselines = _baselines(functions[f"check_{self.name}"])
        return [f for name, f in functions.items() if name in found - baselines]

    @property
    def code(self) -> list[str]:
        """The text of each of these functions."""
        return ["".join(self._rows(f)) for f in self.functions]

    @property
    def shown(self) -> list[str]:
        """The same, with the matrix above the check."""
        first = self._check.decorator_list[0].lineno - self._check.lineno
        rows = self.source.splitlines(keepends=True)
        above = "".join(rows[self._check.lineno - 1 + first : self._check.lineno - 1])
        return [*self.code[:-1], above + self.code[-1]]

    @property
    def matrix(self) -> str:
        """`dp=[1, 2, 3, 4]`: what the matrix above the check says."""
        call = self._check.decorator_list[0]
        assert isinstance(call, ast.Call)
        return ", ".join(
            ast.unparse(word) if word.arg != "options" else ast.unparse(word.value).strip("{}")
            for word in call.keywords
        )

    @property
    def _check(self) -> ast.FunctionDef:
        return _functions(self.source)[f"check_{self.name}"]

    @property
    def lines(self) -> int:
        """Those that a user writes: the candidate's functions whole, of the check its body."""
        count = 0
        for f in self.functions:
            rows = self._rows(f)
            if f.name == f"check_{self.name}":
                has_text = ast.get_docstring(f) is not None
                rows = rows[f.body[has_text].lineno - f.lineno :]
            count += sum(bool(row.strip()) and not row.strip().startswith("#") for row in rows)
        return count

    def _rows(self, f: ast.FunctionDef) -> list[str]:
        return self.source.splitlines(keepends=True)[f.lineno - 1 : f.end_lineno]


def why_not(module: str) -> str:
    """What is not installed that the module needs; empty if it can be run."""
    missing = [need for need in NEEDS.get(module, ()) if find_spec(need) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def subjects(modules: Sequence[str] = MODULES) -> Iterator[Subject]:
    """In the order of the modules, and of their code. Nothing is imported."""
    for module in modules:
        path = Path(__file__).parent / f"{module.replace('.', '/')}.py"
        source = path.read_text()
        for name in _functions(source):
            if name.startswith("check_"):
                yield Subject(module, name.removeprefix("check_"), source)


def cases(modules: Sequence[str] = MODULES) -> Iterator[tuple[Subject, Case]]:
    """Every case of every subject that can be run here."""
    for subject in subjects([module for module in modules if not why_not(module)]):
        for case in subject.cases:
            yield subject, case


def _functions(source: str) -> dict[str, ast.FunctionDef]:
    return {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}


def _baselines(check: ast.FunctionDef) -> set[str]:
    """The first argument of `case.check`: a user has it already."""
    calls = [n for n in ast.walk(check) if isinstance(n, ast.Call) and n.args]
    return {
        call.args[0].id
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "check"
        and isinstance(call.args[0], ast.Name)
    }
