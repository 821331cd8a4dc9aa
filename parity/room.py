"""On which device cases are run, and how many ranks there is room for there. Needs no torch."""

from __future__ import annotations

from parity.errors import UsageError


def room(
    device: str, backend: str, max_world: int | None, most: int, gpus: int, flag: str = "--"
) -> tuple[str, int]:
    """The device, and how many ranks fit: the visible GPUs, or as many processes as were asked, and
    `most` where nothing was. Raises UsageError for a device that is not there, or a backend that
    does not go with it; `flag` is how the options begin there.
    """
    if device == "cuda" and not gpus:
        raise UsageError(f"{flag}device cuda: no GPU is visible; use {flag}device cpu")
    wanted = max_world or most
    device = "cpu" if device == "cpu" or not gpus else "cuda"
    if backend == "nccl" and device != "cuda":
        raise UsageError(f"{flag}backend nccl: it needs GPUs; use parity or gloo")
    if backend == "gloo" and device == "cuda":
        raise UsageError(
            f"{flag}backend gloo: heeds no GPU here; use nccl, or parity, which passes by the host"
        )
    # The backend parity passes through the host's memory: as many ranks as one likes per GPU.
    if device == "cpu" or backend == "parity":
        return device, wanted
    if max_world and max_world > gpus:
        raise UsageError(
            f"{flag}max-world {max_world}: {gpus} GPUs are visible; use {flag}max-world {gpus}, "
            f"or {flag}device cpu"
        )
    return device, min(gpus, wanted)
