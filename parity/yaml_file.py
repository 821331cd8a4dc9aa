"""YAML read strictly: what YAML would quietly change or drop is an objection, with its line.

PyYAML reads 1e-5 as text, keeps the last of two equal keys, reads `on` as true and 12:30:45 as a
number. Here each value keeps the line it stands on, so that whoever finds fault can say where.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

Path = tuple[str | int, ...]

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Document:
    """The value of a YAML text, the line of each part, and objections to how it is written."""

    def __init__(self, text: str) -> None:
        """Raises yaml.YAMLError when the text is no YAML."""
        self.lines: dict[Path, int] = {}
        self.objections: list[tuple[Path, str]] = []
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            self.value = self._read(loader, node, ()) if node is not None else None
        finally:
            loader.dispose()

    def line(self, path: Path) -> int:
        """The line of the part at `path`, or of the nearest part around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def _read(self, loader: yaml.SafeLoader, node: yaml.Node, path: Path) -> Any:
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(loader, node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._read(loader, item, (*path, i)) for i, item in enumerate(node.value)]
        value = loader.construct_object(node)
        self._check_scalar(node, value, path)
        return value

    def _read_mapping(
        self, loader: yaml.SafeLoader, node: yaml.MappingNode, path: Path
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node)
            if not isinstance(key, str):
                text = f"the key {key_node.value} is read as {key!r}; write '{key_node.value}'"
                self._object(path, key_node, text)
                continue
            inner = (*path, key)
            if key in values:
                first = self.lines[inner]
                text = f"the key {key} stands here and in line {first}; keep one of them"
                self._object((*path, key, "again"), key_node, text)
                continue
            values[key] = self._read(loader, value_node, inner)
            self.lines[inner] = key_node.start_mark.line + 1
        return values

    def _check_scalar(self, node: yaml.Node, value: Any, path: Path) -> None:
        text = str(node.value)
        is_plain = getattr(node, "style", None) is None
        if is_plain and isinstance(value, str) and _NUMBER.fullmatch(text):
            self._object(path, node, f"YAML reads {text} as text; write {_with_point(text)}")
        elif is_plain and isinstance(value, int | float) and ":" in text:
            self._object(path, node, f"YAML reads {text} as the number {value}; write '{text}'")

    def _object(self, path: Path, node: yaml.Node, text: str) -> None:
        self.lines[path] = node.start_mark.line + 1
        self.objections.append((path, text))


def _with_point(number: str) -> str:
    """1e-5 as YAML 1.1 takes it for a number: 1.0e-5, with a point and a sign."""
    mantissa, exponent = re.split("[eE]", number)
    mantissa += "" if "." in mantissa else ".0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"
