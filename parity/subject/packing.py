"""Functions of a test, sent to ranks: by value, since ranks need not be able to import a test."""

from __future__ import annotations

import io
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch
from torch import Tensor

from parity.errors import UsageError


def pack(value: Any, *functions: Any) -> bytes:
    """The same bytes for the same value. `functions` are those whose modules go along by value.

    Raises UsageError for what cannot be sent.
    """
    file = io.BytesIO()
    try:
        with _by_value(functions):
            _Pickler(file).dump(value)
    except Exception as error:
        raise UsageError(
            f"what the test gives cannot be sent to ranks: {type(error).__name__}: {error}; let "
            "baseline and candidate use nothing but functions, classes, numbers and tensors"
        ) from error
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """A tensor as its elements: torch's own way adds an address, which differs from run to run."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.layout == torch.strided and not value.requires_grad:
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return _tensor, (flat.numpy().tobytes(), value.dtype, tuple(value.shape))
        return super().reducer_override(value)


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


@contextmanager
def _by_value(functions: tuple[Any, ...]) -> Iterator[None]:
    names = {getattr(function, "__module__", None) for function in functions}
    modules = [sys.modules[name] for name in names if name in sys.modules and _is_own(name)]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _is_own(name: str) -> bool:
    """Not installed: the user's."""
    file = getattr(sys.modules[name], "__file__", None)
    installed = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")]
    return (
        file is not None
        and name != "__main__"
        and not any(Path(file).is_relative_to(folder) for folder in installed)
    )
