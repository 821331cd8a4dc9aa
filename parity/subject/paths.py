"""Which module of the baseline each module of a candidate is: the one with the same parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from parity.subject.alignment import Held


def paths_of(
    held: Sequence[Held], *, is_whole: bool, alias: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The baseline's path of every module of the candidate that can be told by its parameters.

    A parameter `net.0.weight` that is the baseline's `layers.4.weight` makes `net.0` `layers.4`.
    Modules around that one, and others within those, are told by their names, where the same
    parameters are in them, and at last without their names. `is_whole`: the outermost module is the
    baseline's too. `alias`: the whole that each of the baseline's names stands for.
    """
    held = [_by_name(h, alias or {}) for h in held]
    paths = _by_own_parameters(held)
    pairs = [(h.name, part.whole) for h in held for part in h.parts]
    if not is_whole:  # of a part of the model, what other ranks have is in no module here
        known = {whole for _, whole in pairs}
        pairs += [("", name) for name, whole in (alias or {}).items() if whole not in known]

    def add(ours: str, theirs: str) -> bool:
        if ours in paths or theirs in paths.values() or not _are_in_both(pairs, ours, theirs):
            return False
        paths[ours] = theirs
        return True

    def add_around(is_named: bool) -> None:
        for ours, theirs in list(paths.items()):
            while ours and theirs and (_leaf(ours) == _leaf(theirs) or not is_named):
                ours, theirs = _around(ours), _around(theirs)
                if not (is_whole or (ours and theirs)) or not add(ours, theirs):
                    break

    add_around(is_named=True)
    # Around it a wrapper may be (DDP): then it is what is inside that is recorded.
    if is_whole and "" not in paths.values():
        paths[""] = ""
    for ours in sorted({path for h in held for path in _all_around(h.name)}):
        if (inside := paths.get(_around(ours))) is not None:
            add(ours, f"{inside}.{_leaf(ours)}".lstrip("."))
    add_around(is_named=False)
    return paths


def _by_name(held: Held, alias: Mapping[str, str]) -> Held:
    """What has two names in the baseline under that which it has in the candidate; where it has
    none of them, it may be in either module.
    """
    parts = []
    for part in held.parts:
        names = [name for name, whole in alias.items() if whole == part.whole] or [part.whole]
        same = [name for name in names if f".{held.name}".endswith(f".{name}")]
        parts += [part._replace(whole=name) for name in (same if len(names) > 1 else names)]
    return held._replace(parts=parts)


def _by_own_parameters(held: Sequence[Held]) -> dict[str, str]:
    own: dict[str, list[Held]] = {}
    owners: dict[str, set[str]] = {}  # of the parameters of each module of the baseline
    for h in held:
        own.setdefault(_around(h.name), []).append(h)
        for part in h.parts:
            owners.setdefault(_around(part.whole), set()).add(_around(h.name))
    # One whose parameters are in several modules here is none of them: a bias that is added later.
    return {
        path: theirs
        for path, hs in own.items()
        if (theirs := _same_module(hs)) is not None and owners[theirs] == {path}
    }


def _same_module(held: Sequence[Held]) -> str | None:
    """The one module of the baseline that has all these parameters, by the same names."""
    found = set()
    for h in held:
        whole = h.parts[0].whole if len(h.parts) == 1 else ""
        found.add(_around(whole) if _leaf(whole) == _leaf(h.name) else None)
    return found.pop() if len(found) == 1 else None


def _are_in_both(pairs: Sequence[tuple[str, str]], ours: str, theirs: str) -> bool:
    """Whether the same parameters are in both modules. `pairs` of names, the candidate's first."""
    inside = [(_is_in(name, ours), _is_in(whole, theirs)) for name, whole in pairs]
    return (True, True) in inside and all(a == b for a, b in inside)


def _is_in(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _around(path: str) -> str:
    return path.rpartition(".")[0]


def _all_around(name: str) -> Iterator[str]:
    """All modules around it but the outermost."""
    while name := _around(name):
        yield name
