"""Exit 0 when this interpreter has all that pyproject.toml asks for; else print what it lacks.

Standard library only, since it runs before anything is installed.
Usage: requirements.py [EXTRA ...] or requirements.py --only NAME
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OPERATORS = {
    ">=": lambda have, want: have >= want,
    "<": lambda have, want: have < want,
    "==": lambda have, want: have == want,
}


def numbers(text: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[+a-z]", text)[0]))


def lacking(requirement: str) -> str | None:
    name, rules = re.match(r"([\w.-]+)(.*)", requirement).groups()
    try:
        have = version(name)
    except PackageNotFoundError:
        return f"{requirement} (not installed)"
    for rule in filter(None, rules.split(",")):
        operator, want = re.match(r"(>=|<|==)(.*)", rule.strip()).groups()
        if not OPERATORS[operator](numbers(have), numbers(want)):
            return f"{requirement} ({have} is installed)"
    return None


def main(arguments: list[str]) -> int:
    import tomllib

    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    if arguments[:1] == ["--only"]:
        wanted = [text for text in wanted if re.match(r"[\w.-]+", text)[0] == arguments[1]]
    else:
        wanted += [text for e in arguments for text in project["optional-dependencies"][e]]
    found = [text for text in map(lacking, wanted) if text]
    if found:
        print("missing: " + ", ".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        print(f"missing: Python 3.11 or newer (this is {sys.version.split()[0]})")
        sys.exit(1)
    sys.exit(main(sys.argv[1:]))
