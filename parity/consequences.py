"""What a wrong forward leads to: autograd goes back through it as it was made.

So behind a forward that is wrong a backward is, though what the forward puts out was overwritten
with what is right. It is told with it, and not as another mistake.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Sequence

from parity.culprit import PART_NAMES, Culprit
from parity.modules import MODEL
from parity.trace import Key

# By a forward: that is off by a factor, or that leaves a parameter out.
_PASSED_ON = ("scaled", "rows scaled", "zero")


def with_another(
    culprits: Sequence[Culprit], found: Culprit, judged: Sequence[Key], off: Container[Key]
) -> list[Culprit]:
    """And one that was found once these were put right; of all that was `judged`, this is `off`."""
    forward = [key for key in judged if key.check == "activation"]
    may_follow = all(f.by in PART_NAMES or f.kind in _PASSED_ON or f.of for f in found.fits)
    for i, c in enumerate(culprits if may_follow else ()):
        firsts = [x.fits[0] for x in (*c.backward, found) if x.fits]
        if len({fit.text for fit in firsts if fit.kind in _PASSED_ON}) > 1:
            continue  # one forward does not pass on several factors
        if any(_is_behind(key, found, c, forward, off) for key in found.names):
            theirs = c._replace(backward=[*c.backward, found])
            return [*culprits[:i], theirs, *culprits[i + 1 :]]
    return [*culprits, found]


def _is_behind(
    key: Key, found: Culprit, c: Culprit, forward: Sequence[Key], off: Container[Key]
) -> bool:
    """Whether it is of the backward of what made `c` in the forward, of whichever layer."""
    seen = {_path(k) for k in forward}
    owner = _made_by(key, seen)
    if c.verdict.key.check != "activation" or key.check not in ("backward", "gradient"):
        return False
    if any_layer(owner) != any_layer(_made_by(c.verdict.key, seen)):
        return False
    own = [k for k in forward if owner in _sides(k, seen)]
    alike = [k for k in own if any_layer(k.name) == any_layer(c.verdict.key.name)]
    if not alike:
        return True
    if alike[-1] not in off:
        return False  # in this layer the forward is right
    here = key._replace(check="activation")
    if key.check == "gradient" or here not in own:
        return True
    start, end = own.index(here), own.index(alike[-1])
    if key.name.startswith("output of "):
        return start < end
    # What its module takes in is used in front of its other modules, and where that can be seen;
    # what is wrong may go by the names of the two that follow.
    start_of_all, end_of_all = forward.index(here), forward.index(alike[-1])
    behind = {k.name for k in forward[start_of_all + 1 : end_of_all + 3]}
    return start + 1 == end or any(fit.of in behind for fit in found.fits)


def _sides(key: Key, seen: Collection[str]) -> tuple[str, ...]:
    """The modules whose code it is on a border of."""
    back = key._replace(check="backward")
    return _path(key), _made_by(key, seen), _made_by(back, seen)


def _path(key: Key) -> str:
    path = key.name.partition(" of ")[2]
    return "" if path == MODEL else path


def _made_by(key: Key, seen: Collection[str]) -> str:
    """The innermost module that was `seen` (recorded) whose own code makes this."""
    path = _path(key)
    match key.check, key.name.partition(" of ")[0]:
        case "gradient", _:
            path = key.name.rpartition(".")[0]
        case ("activation", "input") | ("backward", "output"):
            if not path:
                return "the caller"
            path = path.rpartition(".")[0]
    while path and path not in seen:
        path = path.rpartition(".")[0]
    return path


def any_layer(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)
