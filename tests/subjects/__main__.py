"""Runs all subjects and writes docs/what-is-already-there.md.   python -m tests.subjects"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from tabulate import tabulate

from parity import TestCase
from parity.subject.check import Kept
from tests.subjects.code import FINDS, subjects, why_not
from tests.subjects.mistakes import MISTAKES

PAGE = Path(__file__).parents[2] / "docs" / "what-is-already-there.md"

TEXT = """# What is already there

Parallel code that people have already, held as it is: nothing in it knows of parity. What stands
in the tables below is run by `tests/subjects/`, on every topology named, and `python -m
tests.subjects` writes this page.

```python
{example}
```

A user's code says how the model is made parallel, as it does in training, and which axis shares the
rows of the batch. Where parameters lie is told by their values, where outputs lie by their shapes
or placements. `lines` are all that a user writes: the functions of the candidate and the body of
the check (the model is there already). `s`: all topologies together, on 2 cores.

{subjects}

## Mistakes in its use

Each is planted in the lines above, and caught; tests hold which tensor differs first, how, and what
is said of it.

{mistakes}

## Where torch itself is wrong

Found by holding what is there. Each is a file in `tests/subjects/finds/`, and true of torch 2.13 on
the checking backend and on gloo; its test fails when torch is mended.

{finds}

## What this does not show

* A batch is the same in all steps, so a sampler that forgets `set_epoch` is not seen.
* Under a pipeline schedule gradients inside the model are not recorded, since it may weigh
  microbatches after the sum: a culprit is then the gradient of a parameter.
* Buffers (the running statistics of a batch norm) are not compared.
"""


def page(seconds: dict[str, str]) -> str:
    """The whole text. `seconds` by subject; what was not run has none."""
    every = list(subjects())
    example = next(subject for subject in every if subject.name == "fsdp")
    rows = [[f"`{s.name}`", s.about, s.matrix, s.lines, seconds.get(s.name, "")] for s in every]
    planted = [
        [f"`{m.name}`", m.subject, m.case, m.status, m.first, m.words.partition(" (an")[0]]
        for m in MISTAKES
    ]
    finds = [[f"`{s.name}`", s.about] for s in subjects(FINDS)]
    return TEXT.format(
        example="\n\n\n".join(code.strip() for code in example.shown),
        subjects=_table(rows, ["subject", "what it holds", "topologies", "lines", "s"]),
        mistakes=_table(planted, ["mistake", "in", "case", "seen as", "first", "what is said"]),
        finds=_table(finds, ["file", "what it shows"]),
    )


def _table(rows: list[list[object]], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    kept, seconds = Kept(), dict[str, str]()
    for subject in subjects():
        if missing := why_not(subject.module):
            print(f"{subject.name}: {missing}")
            continue
        start = time.perf_counter()
        for case in subject.cases:
            torch.manual_seed(0)
            subject.check(TestCase(case, kept=kept))
        seconds[subject.name] = f"{time.perf_counter() - start:.0f}"
        print(f"{subject.name}: {seconds[subject.name]} s", flush=True)
    PAGE.write_text(page(seconds))


if __name__ == "__main__":
    main()
