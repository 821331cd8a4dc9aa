"""One name per parameter, whatever the run has wrapped around the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from parity.errors import UsageError

# What DDP, FSDP, torch.compile and activation checkpointing put into the path of a module.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Rename = Callable[[str], str] | Mapping[str, str]


def plain(path: str, rename: Rename | None = None) -> str:
    """Without wrappers; then `rename`, which is called, or of which the longest prefix counts.

    >>> plain("module.blocks.0._checkpoint_wrapped_module.up.weight", {"blocks.0.": "blocks.4."})
    'blocks.4.up.weight'
    """
    name = ".".join(part for part in path.split(".") if part not in WRAPPERS)
    if rename is None:
        return name
    if callable(rename):
        return rename(name)
    for prefix in sorted(rename, key=len, reverse=True):
        if name.startswith(prefix):
            return rename[prefix] + name.removeprefix(prefix)
    return name


def plain_names(paths: Iterable[str], rename: Rename | None = None) -> dict[str, str]:
    """Path -> name. Raises UsageError where two parameters would have one name."""
    names: dict[str, str] = {}
    for path in paths:
        name = plain(path, rename)
        if name in names:
            raise UsageError(
                f"parameters '{names[name]}' and '{path}' would both be recorded as '{name}'; "
                "expected one name each; give `rename` a function that tells them apart"
            )
        names[name] = path
    return {path: name for name, path in names.items()}
