"""A process that takes slots, says so, and gives them back when it is told to; see test_slots."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from parity import slots
from parity.slots import Slot


def main(names: str, count: str, what: str = "") -> None:
    try:
        with slots.take(parse(names), int(count), patience=0) as mine:
            if what == "and starts a child":  # that is given all that can be inherited
                child = subprocess.Popen(["sleep", "600"], close_fds=False)
                say(str(child.pid))
            say("has", *(slot.name for slot in mine))
            sys.stdin.readline()
        say("gave back")
    except KeyboardInterrupt:
        folder = str(slots.folder_path())
        say("interrupted", *open_files(folder), threading.active_count())
    sys.stdin.readline()


def parse(names: str) -> list[Slot]:
    """`core-0,core-1`, or a list of GPUs as in CUDA_VISIBLE_DEVICES."""
    words = names.split(",")
    if names.startswith("core"):
        return [Slot(word, "cores") for word in words]
    return slots.gpus({"CUDA_VISIBLE_DEVICES": names}, len(words))[1]


def open_files(folder: str, pid: int | str = "self") -> list[str]:
    """What a process has open of this folder."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if os.path.islink(f"/proc/{pid}/fd/{fd}"):  # the one of this listing is closed
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return [path for path in found if path.startswith(folder)]


def meet(folder: str, times: str) -> None:
    """Both cores, so many times; nobody else is to be inside then."""
    inside = os.path.join(folder, "inside")
    for _ in range(int(times)):
        with slots.take(parse("core-0,core-1"), 2):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            os.sched_yield()
            os.unlink(inside)
    say("never met")


def say(*words: object) -> None:
    print(*words, flush=True)


if __name__ == "__main__":
    {"meet": meet}.get(sys.argv[1], main)(*sys.argv[1 + (sys.argv[1] == "meet") :])
