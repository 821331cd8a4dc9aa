"""torch's own tests of its collectives, unmodified, on ranks that already are a group of this
backend: what they ask of a known backend is asked of ours under that one's name.

They are methods of one class, chosen by the name of a backend when their module is loaded. A rank
loads it once for each name and calls every method that has not passed yet. Tests for GPUs run on
tensors of the CPU: whatever asks for a GPU gets the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

SUITE = "torch.testing._internal.distributed.distributed_test"


class Role(NamedTuple):
    """The backend that the tests take ours for."""

    name: str
    has_gpus: bool


ON_CPU = (Role("gloo", False), Role("mpi", False))
ON_GPU = (Role("gloo", True), Role("nccl", True))


def run(folder: str, roles: tuple[Role, ...], left_out: frozenset[str]) -> dict[str, str]:
    """Every test by name: `passed`, or why torch skips it. Raises as the first that fails."""
    outcomes: dict[str, str] = {}
    for role in roles:
        suite = _load(role, Path(folder) / "-".join(map(str, role)))
        case = _case(suite)
        tests = {name for name in dir(case) if name.startswith("test_")} - left_out
        for name in sorted(tests):
            if outcomes.get(name) != "passed":
                outcomes[name] = _outcome(suite, case, name, role)
                dist.barrier()
    return outcomes


def _load(role: Role, folder: Path) -> ModuleType:
    """The module anew, as it is for that backend; `folder` is for the files of its tests."""
    world = dist.get_world_size()
    (folder / "test_dir").mkdir(parents=True, exist_ok=True)
    os.environ.update(BACKEND=role.name, WORLD_SIZE=str(world), TEMP_DIR=str(folder))
    if role.has_gpus:
        _pretend()
    _provide_expecttest()
    sys.modules.pop(SUITE, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        suite = importlib.import_module(SUITE)
    common = importlib.import_module("torch.testing._internal.common_distributed")
    common.TEST_CUDA = role.has_gpus
    # What skips small worlds does not for MPI, and three ranks are enough for its groups.
    os.environ["BACKEND"] = "mpi" if world > 2 else "gloo"
    return suite


def _provide_expecttest() -> None:
    """torch's test classes derive from this package's, and what it adds is not used here."""
    try:
        importlib.import_module("expecttest")
    except ImportError:
        stand_in = ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in


def _case(suite: ModuleType) -> type[Any]:
    """The class of the tests, without the processes that it would start."""

    class Case(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        def __init__(self, name: str) -> None:
            unittest.TestCase.__init__(self, name)
            self.rank = dist.get_rank()

        def _barrier(self, *_: Any, **__: Any) -> None:
            dist.barrier()

    return Case


def _outcome(suite: ModuleType, case: type[Any], name: str, role: Role) -> str:
    method = getattr(case(name), name)
    if getattr(method, "__unittest_skip__", False):
        return str(method.__unittest_skip_why__)
    torch.manual_seed(0)
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "OFF"  # some tests leave it on
    dist.set_debug_level_from_env()
    try:
        with _on_cpu() if role.has_gpus else contextlib.nullcontext():
            method()
    except unittest.SkipTest as skip:
        return str(skip)
    except SystemExit as end:  # how it skips where a process is one test
        return next(
            skip.message for skip in suite.TEST_SKIPS.values() if skip.exit_code == end.code
        )
    except BaseException as error:
        raise AssertionError(f"{name}, taken for {role.name}: {error}") from error
    return "passed"


# A GPU for every rank, which is the CPU


def _here(x: Any) -> Any:
    """The CPU for any way to say a GPU."""
    is_gpu = isinstance(x, str | torch.device) and str(x).startswith("cuda")
    return torch.device("cpu") if is_gpu or type(x) is int else x


class _on_cpu(TorchFunctionMode):  # noqa: N801 (used as a function)
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = _here(kwargs["device"])
        is_move = func is torch.Tensor.to
        args = [_here(x) if is_move or type(x) is not int else x for x in args]
        return func(*args, **kwargs)


def _pretend() -> None:
    """Once, for the rest of this process."""
    cuda, ddp = torch.cuda, nn.parallel.DistributedDataParallel
    if cuda.is_available():
        return
    cuda.is_available = dist.is_nccl_available = lambda: True
    cuda.device_count = dist.get_world_size
    cuda.current_device = dist.get_rank
    cuda.set_device = cuda.synchronize = lambda *_, **__: None
    cuda.device = lambda *_: contextlib.nullcontext()
    cuda.nccl.version = lambda: (2, 27, 0)
    move, init = nn.Module.to, ddp.__init__

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return move(self, *map(_here, args), **kwargs)

    def on_no_device(
        self: nn.Module, module: nn.Module, device_ids: Any = None, **kwargs: Any
    ) -> None:
        kwargs.pop("output_device", None)
        init(self, module, **kwargs)

    nn.Module.to, ddp.__init__ = to, on_no_device
