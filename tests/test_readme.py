"""What documents show is what happens: files are written out, commands run, outputs compared.

Numbers and column widths differ from run to run and are not compared. `python -m tests.test_readme`
writes the outputs anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from parity.cli import parser
from parity.plugin import options

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TARGETS = ROOT / "docs" / "targets.md"
STEP = ROOT / "docs" / "check-your-training-step.md"
CLUSTER = ROOT / "docs" / "a-run-on-your-cluster.md"
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"<!-- output: (.*?) -->\n```\n(.*?)```", re.DOTALL)
QUOTE = re.compile(r"<!-- quote: (\S+) -->\n```\w*\n(.*?)```", re.DOTALL)
RUN = re.compile(r"<!-- run -->\n```bash\n(.*?)```", re.DOTALL)
REMOVED = "  (without the all_reduce)"


def run(command: str, folder: Path, document: Path = README) -> str:
    """The command's output, of a matrix from its table on; run in the checkout, or beside the
    document's files.
    """
    for name, text in FILE.findall(document.read_text()):
        if REMOVED in command:
            text = re.sub(r"( *)dist\.all_reduce.*\n", r"\1pass\n", text)
        (folder / name).write_text(text)
    shown = command.removesuffix(REMOVED)
    words = shown.split()
    if words[0] == "parity":
        words = [sys.executable, "-m", *words]
    done = subprocess.run(
        words,
        cwd=ROOT if "suite" in shown or "tests.bugs" in shown else folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path()},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    if words[-2:] == ["2", "crossed.py"]:
        assert done.returncode == 3, done.stdout
        return done.stderr
    if "tests.bugs" in shown:
        assert done.returncode == 0, done.stdout
        return done.stdout[: done.stdout.index("\nbug ")].strip() + "\n"
    assert done.returncode == (1 if REMOVED in command else 0), done.stdout + done.stderr
    return (
        done.stdout[done.stdout.index("\ncase ") + 1 :] if " check " not in shown else done.stdout
    )


def prepare(document: Path, folder: Path) -> None:
    """Its files, and what its commands make of them."""
    for name, text in FILE.findall(document.read_text()):
        (folder / name).write_text(text)
    for script in RUN.findall(document.read_text()):
        environment = {"PYTHONPATH": str(ROOT), "PATH": path(), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            ["bash", "-ec", script],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            timeout=500,
            check=True,
        )


def diff(command: str, folder: Path) -> str:
    words = [sys.executable, "-m", *command.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == (1 if "wrong" in command else 0), done.stdout + done.stderr
    return done.stdout


def path() -> str:
    """With this interpreter first, so that the scripts find what they need in it."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def without_numbers(text: str) -> str:
    text = re.sub(r"\d[\d.,]*(e[-+]?\d+)?", "#", text)
    return re.sub(r"[ -]{2,}", " ", text).strip()


SHOWN = [(d, *found) for d in (README, TARGETS, STEP) for found in OUTPUT.findall(d.read_text())]


@pytest.mark.parametrize(("document", "command", "shown"), SHOWN)
def test_the_output_shown_is_the_output(
    document: Path, command: str, shown: str, tmp_path: Path
) -> None:
    assert without_numbers(run(command, tmp_path, document)) == without_numbers(shown)


def test_what_the_readme_quotes_is_there() -> None:
    quotes = QUOTE.findall(README.read_text())
    assert len(quotes) == 2
    for document, text in quotes:
        assert text in (ROOT / document).read_text()


def test_a_run_on_your_cluster(tmp_path: Path) -> None:
    prepare(CLUSTER, tmp_path)
    shown = OUTPUT.findall(CLUSTER.read_text())
    assert len(shown) == 2
    for command, text in shown:
        assert without_numbers(diff(command, tmp_path)) == without_numbers(text)


def test_the_example_passes_as_it_stands(tmp_path: Path) -> None:
    out = run("parity run", tmp_path, TARGETS)
    assert "PASS (3):\n  tp=1  (diff=0.0)" in out
    assert "FAIL (0):" in out


def test_every_option_named_exists() -> None:
    text = "".join(p.read_text() for p in (README, *(ROOT / "docs").glob("*.md")))
    help_texts = ""
    for arguments in (
        ["run", "-h"],
        ["soak", "-h"],
        ["list", "-h"],
        ["exec", "-h"],
        ["mutate", "-h"],
        ["diff", "-h"],
    ):
        from contextlib import redirect_stdout, suppress
        from io import StringIO

        with redirect_stdout(StringIO()) as out, suppress(SystemExit):
            parser().parse_args(arguments)
        help_texts += out.getvalue()
    from heiretsu.__main__ import parser as heiretsu_parser

    with redirect_stdout(StringIO()) as out, suppress(SystemExit):
        heiretsu_parser().parse_args(["train", "-h"])
    known = set(re.findall(r"--[a-z][\w-]*", help_texts + out.getvalue()))
    known |= {"--standalone", "--nproc_per_node"}  # torchrun's
    known |= {"--no-silent", "--docs"}  # of tests.bugs
    known |= {"--lf", "--junitxml"}  # pytest's
    known |= {option.flag for option in options.ALL}
    assert set(re.findall(r"--[a-z][\w-]*", text)) <= known


def test_the_documented_keys_are_the_keys() -> None:
    from parity.matrix_file import Matrix

    keys = set(re.findall(r"^\| (`.*?) \|", (ROOT / "docs/matrix.md").read_text(), re.MULTILINE))
    assert {name for key in keys for name in re.findall(r"`(\w+)`", key)} == set(
        Matrix.model_fields
    )


def test_files_that_are_linked_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (ROOT / link).is_file(), link


def rewrite(document: Path, command: str, new: str) -> None:
    text = document.read_text()
    start = text.index(f"<!-- output: {command} -->\n```\n")
    start = text.index("```\n", start) + 4
    document.write_text(text[:start] + new + text[text.index("```", start) :])


if __name__ == "__main__":
    for document, command, _ in SHOWN:
        with tempfile.TemporaryDirectory() as folder:
            rewrite(document, command, run(command, Path(folder), document))
    with tempfile.TemporaryDirectory() as folder:
        prepare(CLUSTER, Path(folder))
        for command, _ in OUTPUT.findall(CLUSTER.read_text()):
            rewrite(CLUSTER, command, diff(command, Path(folder)))
