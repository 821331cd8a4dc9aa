"""What a user sets: each as `--parity-...` on the command line, or as `parity_...` in a file."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from parity.case import DTYPES

DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "parity", "nccl", "gloo")


class Wrong(ValueError):
    """A value that cannot be; the text says what was expected."""


@dataclass(frozen=True)
class Options:
    """As they are in force. None: what the test or the matrix file says."""

    device: str = "auto"
    backend: str = "auto"
    max_world: int | None = None
    deadline: float | None = None
    dtype: tuple[str, ...] = ()
    seed: int | None = None
    json: Path | None = None
    properties: bool = True
    matrices: tuple[Path, ...] = ()
    typed: tuple[str, ...] = ()  # those of the command line that a case needs to be run again


def _one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise Wrong(f"expected one of {', '.join(known)}")
        return text

    return read


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise Wrong(f"expected a whole number from {least} on")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise Wrong("expected a number of seconds above 0")
    return number


def _dtype(text: str) -> str:
    return _one_of(DTYPES)(text)


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise Wrong("expected a file in a folder that exists")
    return path.resolve()


class _Option(NamedTuple):
    name: str
    type: Literal["string", "args", "int", "float"]  # in a file
    read: Callable[[str], Any]
    metavar: str
    help: str

    @property
    def flag(self) -> str:
        return f"--parity-{self.name.replace('_', '-')}"

    @property
    def ini(self) -> str:
        return f"parity_{self.name}"


ALL = [
    _Option("device", "string", _one_of(DEVICES), "D", "auto, cpu, or cuda: where ranks run"),
    _Option("backend", "string", _one_of(BACKENDS), "B", "auto, parity, nccl, or gloo"),
    _Option("max_world", "int", _whole(1), "N", "cases of more ranks are skipped"),
    _Option("deadline", "float", _seconds, "S", "seconds that one launch of a case may take"),
    _Option("dtype", "args", _dtype, "T", "what to compute in, instead of what tests say; again"),
    _Option("seed", "int", _whole(0), "N", "of torch before each case, and of its module (0)"),
    _Option("json", "string", _file, "FILE", "write all that was compared there"),
]


def add(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity", "parity: parallel code against a one-device baseline")
    for option in ALL:
        action = "append" if option.type == "args" else "store"
        group.addoption(
            option.flag, dest=option.ini, action=action, metavar=option.metavar, help=option.help
        )
        parser.addini(option.ini, f"as {option.flag}", type=option.type, default=None)
    parser.addini("parity_properties", "false: none in JUnit files", type="bool", default=True)
    parser.addini("parity_matrix", "matrix files that are tests too", type="args", default=[])


def read(config: pytest.Config) -> tuple[Options, list[str]]:
    """The options, and what is wrong with them."""
    objections: list[str] = []
    values: dict[str, Any] = {}
    typed: list[str] = []
    for option in ALL:
        given = config.getoption(option.ini, default=None)
        texts = [given] if isinstance(given, str) else list(given or [])
        if texts and option.name != "json":
            typed += [word for text in texts for word in (option.flag, text)]
        said = [(f"{option.flag} {text}", text) for text in texts]
        try:
            said = said or [(f"{option.ini} = {t}", t) for t in _from_file(config, option)]
        except (TypeError, ValueError, pytest.UsageError):  # pytest reads numbers by itself
            said = [(option.ini, "?")]
        found = []
        for written, text in said:
            try:
                found.append(option.read(text))
            except Wrong as wrong:
                objections.append(f"{written}: {wrong}")
        if found:
            values[option.name] = tuple(dict.fromkeys(found)) if option.type == "args" else found[0]
    matrices = tuple((config.rootpath / name).resolve() for name in config.getini("parity_matrix"))
    objections += [f"parity_matrix = {p}: no such file" for p in matrices if not p.is_file()]
    properties = bool(config.getini("parity_properties"))
    return (
        Options(**values, properties=properties, matrices=matrices, typed=tuple(typed)),
        objections,
    )


def _from_file(config: pytest.Config, option: _Option) -> list[str]:
    """What a configuration file says, as text: which types it has depends on its format."""
    value = config.getini(option.ini)
    if value is None:
        return []
    if option.name == "json":
        return [str(config.rootpath / value)]
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def again(options: Options, where: str) -> str:
    """What to type to run one item as it was run."""
    return shlex.join(["pytest", where, *options.typed])
