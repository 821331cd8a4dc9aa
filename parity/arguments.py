"""What may be typed: the commands, their options, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXIT_CODES = (
    "exit status: 0 every case passed; 1 a case differs from its baseline; 2 a mistake in the "
    "command or the matrix; 3 a case could not be run, and none differs"
)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="parity",
        description="Is the parallel program the same function as the one-device program?",
        epilog=EXIT_CODES,
    )
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a matrix and judge every case", epilog=EXIT_CODES)
    program = commands.add_parser(
        "exec",
        help="run a script that was written for torchrun, every call among its ranks checked",
        description="parity exec --ranks 8 script.py ...: as torchrun --nproc_per_node=8, on the "
        "CPUs of this host, with the checking backend whatever backend the script names",
        epilog="exit status: 0 all ranks ended well; 2 a mistake in the command; 3 a rank failed",
    )
    _add_program(program)
    closer = commands.add_parser(
        "explain",
        help="run failing cases again, everything recorded: which module, which mistake",
        epilog=EXIT_CODES,
    )
    soaking = commands.add_parser(
        "soak",
        help="random configurations of a matrix: code that is right must stay green",
        epilog=EXIT_CODES,
    )
    add = soaking.add_argument
    add("--count", type=_positive, default=200, metavar="N", help="configurations; default: 200")
    listing = commands.add_parser("list", help="print the cases of a matrix, and what is skipped")
    for command in (run, closer, soaking, listing):
        _add_choice(command)
    for command in (run, closer, soaking, listing):
        _add_backend(command)
    for command in (run, closer, soaking):
        _add_bounds(command)
    for command in (run, closer):
        _add_how(command)
    mutate = commands.add_parser(
        "mutate",
        help="change every call among ranks, one at a time: is each change noticed?",
        epilog="exit status: 0 every change was; 1 one was not, or the case is red as it is; 2 a "
        "mistake in the command or the matrix; 3 it could not be run",
    )
    _add_choice(mutate)
    _add_mutants(mutate)
    _add_testing(commands)
    _add_difference(commands)
    return top


def _add_testing(commands: Any) -> None:
    check = commands.add_parser(
        "check", help="run tests that @parity.matrix marks, without pytest", epilog=EXIT_CODES
    )
    layout = commands.add_parser(
        "layout", help="where the parameters of each rank lie in the baseline's, by their values"
    )
    for command in (check, layout):
        _add_tests(command)
    check.add_argument("-v", "--verbose", action="store_true", help="print every tensor compared")
    _add_backend(check)
    _add_limits(check)


def _add_difference(commands: Any) -> None:
    difference = commands.add_parser(
        "diff",
        help="hold two runs that parity.record has recorded against each other",
        epilog="exit status: 0 they agree; 1 they differ; 2 a mistake in the command or "
        "the folders, or nothing was compared; 3 it could not be done",
    )
    _add_recordings(difference)


def _add_tests(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("test", help="as in my_module:test_mlp, or tests/test_mlp.py; without a name all of it")
    add("--case", action="append", default=[], metavar="ID", help="as in dp2-tp2, or with *")
    add("--max-world", type=_positive, metavar="N", help="no case with more ranks than this")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _add_choice(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("matrix", nargs="?", default="matrix.yaml", type=Path, help="default: matrix.yaml")
    add("--case", action="append", default=[], metavar="ID", help="as in dp2-tp2-pp1, or with *")
    add("--max-world", type=_positive, metavar="N", help="no case with more ranks than this")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change an option")


def _add_backend(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--backend",
        choices=("auto", "parity", "gloo", "nccl"),
        default="auto",
        help="parity checks every call among ranks, in shared memory; auto: that, or nccl on GPUs",
    )


def _add_mutants(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--steps", type=_positive, metavar="N", help="training steps per run; default: 2")
    add("--only", action="append", default=[], metavar="SITE", help="a part of its name; with *")
    add("--kind", action="append", default=[], metavar="KIND", help="as in drop, scale, stale")
    add("--json", type=Path, metavar="FILE", help="write the report there too")
    add("-v", "--verbose", action="store_true", help="print what became of every mutant")


def _add_bounds(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--thresh", type=_above_zero, metavar="X", help="allow a relative error of X everywhere")
    _add_limits(command)


def _add_limits(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--dtype", action="append", metavar="DTYPE", help="instead of the given ones; repeatable")
    add("--seed", type=int, metavar="N", help="of data and parameters, or of what soak draws")
    add("--deadline", type=_above_zero, metavar="S", help="seconds that a case may take")


def _add_how(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--steps", type=_positive, metavar="N", help="training steps per run")
    add("--json", type=Path, metavar="FILE", help="write the report there too")
    add("--ledger", action="store_true", help="count what ranks say to each other, per axis")
    add("--fail-fast", action="store_true", help="stop after the first case that did not pass")
    add("-v", "--verbose", action="store_true", help="print every tensor that is wrong")


def _add_program(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--ranks", type=_positive, required=True, metavar="N", help="how many processes")
    add("--watch", action="store_true", help="see early reads and writes where they happen")
    add("--deadline", type=_above_zero, default=1e6, metavar="S", help="seconds that it may take")
    add("script", type=Path)
    add("arguments", nargs=argparse.REMAINDER, help="are the script's")


def _add_recordings(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("baseline", type=Path, help="a folder that parity.record wrote")
    add("candidate", type=Path, help="another")
    nudged = "the baseline, recorded with PARITY_NUDGE=1 (2, 3, ...); an even number, 4 or more"
    add("--nudged", action="extend", nargs="+", default=[], type=Path, metavar="DIR", help=nudged)
    add("--json", type=Path, metavar="FILE", help="write the report there too")
    add("-v", "--verbose", action="store_true", help="print every tensor that is wrong")


def _positive(text: str) -> int:
    number = int(text) if text.lstrip("-").isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return number
