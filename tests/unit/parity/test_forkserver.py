"""The fork server started ahead of time: by whom does not matter, and nobody waits for it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SAME = """
import os, sys
from parity.forkserver import warm_up

def server():
    return os.getppid(), "parity.warm" in sys.modules

if __name__ == "__main__":
    warm_up()
    assert "torch" not in sys.modules
    from multiprocessing import forkserver
    started = forkserver._forkserver._forkserver_pid
    warm_up()
    from parity import launch
    assert launch(server, 2) == [(started, True)] * 2
    warm_up()
    assert forkserver._forkserver._forkserver_pid == started
"""
# The first that is imported; its import ends when somebody has written to the FIFO.
SLOW = "open({!r}).read()\n"
AHEAD = """
from parity.forkserver import warm_up
warm_up()
print("goes on", flush=True)
input()
"""


def python(folder: Path, program: str, path: str) -> subprocess.Popen[str]:
    script = folder / "program.py"
    script.write_text(program)
    return subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ranks_come_from_the_server_that_was_warmed_up(tmp_path: Path) -> None:
    done = python(tmp_path, SAME, str(ROOT))
    said = done.communicate(timeout=120)
    assert (done.returncode, *said) == (0, "", "")


def test_nobody_waits_for_what_the_server_imports(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "safetensors.py").write_text(SLOW.format(str(fifo)))
    process = python(tmp_path, AHEAD, f"{tmp_path}{os.pathsep}{ROOT}")
    try:
        assert select.select([process.stdout], [], [], 60)[0], "it waits"
    finally:
        fifo.open("w").close()  # comes back when the server is there to read
    assert process.communicate("\n", timeout=60)[0] == "goes on\n"
    assert process.returncode == 0
