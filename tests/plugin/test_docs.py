"""What docs/check-your-layer.md shows is what happens. `python -m tests.plugin.test_docs` writes
the outputs anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from parity.plugin.options import ALL
from tests.test_readme import FILE, OUTPUT, ROOT, without_numbers

DOCUMENT = ROOT / "docs" / "check-your-layer.md"
REMOVED = "  (without the line)"


def run(command: str, folder: Path) -> str:
    """From what failed, or from the section at the end, up to the line with the time."""
    for name, text in FILE.findall(DOCUMENT.read_text()):
        if REMOVED in command:
            text = re.sub(r".*# try it without this line\n", "", text)
        (folder / name).write_text(text)
    words = command.removesuffix(REMOVED).split()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "GITHUB"))}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={
            **environment,
            "PYTHONPATH": str(ROOT),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_PLUGINS": "parity.plugin",
            "XDG_RUNTIME_DIR": str(folder),
            "COLUMNS": "80",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if REMOVED in command else 0), done.stdout + done.stderr
    start = re.search(r"^=+ (FAILURES|parity) =+$", done.stdout, re.MULTILINE)
    end = re.search(r"^=+ short test summary info|^=+ \d+ passed", done.stdout, re.MULTILINE)
    assert start is not None
    assert end is not None
    return done.stdout[start.start() : end.start()].rstrip() + "\n"


def without_luck(text: str) -> str:
    """Which tensor is rounded worst differs from machine to machine."""
    return without_numbers(re.sub(r"(largest [^:]+:).*", r"\1", text))


SHOWN = dict(OUTPUT.findall(DOCUMENT.read_text()))


@pytest.mark.parametrize("command", SHOWN)
def test_the_output_shown_is_the_output(command: str, tmp_path: Path) -> None:
    assert without_luck(run(command, tmp_path)) == without_luck(SHOWN[command])


def test_the_options_in_the_table_are_the_options() -> None:
    rows = re.findall(r"^\|(?: (`--\S+`))? \| `(\w+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    every = [(f"`{option.flag}`", option.ini) for option in ALL]
    assert rows == [*every, ("", "parity_matrix"), ("", "parity_properties")]


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    for command, old in OUTPUT.findall(text):
        with tempfile.TemporaryDirectory() as folder:
            new = run(command, Path(folder))
        start = f"<!-- output: {command} -->\n```\n"
        text = text.replace(start + old + "```", start + new + "```")
    DOCUMENT.write_text(text)
