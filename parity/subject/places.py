"""Where what a rank has seen lies in what the baseline saw, and under which name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from parity.errors import TraceError
from parity.modules import Placed, Seen
from parity.subject.alignment import Held, local
from parity.subject.placing import (
    Axes,
    Cuts,
    Place,
    Unplaced,
    by_shape,
    cut,
    of_dtensor,
)

Shapes = Mapping[tuple[str, str], Sequence[int]]  # of wholes, by check and name


class Places:
    """On one rank; without `shapes` everything is whole: the baseline."""

    def __init__(
        self,
        axes: Axes,
        shapes: Shapes | None = None,
        inputs: Cuts | None = None,
        outputs: Mapping[str, Cuts] | None = None,
        paths: Mapping[str, str] | None = None,
    ) -> None:
        """`inputs` and `outputs`: over which axes they are cut, by the user's word ("": those
        outputs that are not named); `paths`: the baseline's name of each module that has one there
        (None: all, the same).
        """
        self.axes, self.shapes, self.paths = axes, shapes, paths
        self.inputs, self.outputs = inputs or {}, outputs or {}

    def of(self, check: str, name: str, tensor: Tensor) -> Place:
        """Raises TraceError where it cannot be told."""
        size = tuple(local(tensor).shape)
        if self.shapes is None:
            return Place(size, (0,) * len(size))
        whole = self.shapes.get((check, name))
        if whole is None:
            return Place(size, (0,) * len(size))  # an `extra` record, for the judge
        try:
            return self._of(tuple(whole), name, tensor, self._word(check, name))
        except Unplaced as problem:
            word = "output={0: 'dp'}" if check == "forward" else "split={'dp': 0}"
            raise TraceError(
                f"where the {check} of {name} lies is unclear: {problem}; say it, as in {word}"
            ) from problem

    def _word(self, check: str, name: str) -> Cuts | None:
        if check != "forward":
            return None
        return self.outputs.get(name.rpartition(" ")[2]) or self.outputs.get("")

    def _of(
        self, whole: tuple[int, ...], name: str, tensor: Tensor, word: Cuts | None = None
    ) -> Place:
        size = tuple(local(tensor).shape)
        if isinstance(tensor, DTensor):
            place = of_dtensor(tensor)
            if place.shape != whole:
                raise Unplaced(f"it is a DTensor of {place.shape}, and the baseline's is {whole}")
            return place
        if word:
            start = Place(whole, (0,) * len(whole))
            cuts = {dim % len(whole): names for dim, names in word.items()}
            return Place(whole, cut(start, size, cuts, self.axes))
        return by_shape(whole, size, self.axes, self.inputs)

    def path_of(self, path: str) -> str | None:
        return path if self.paths is None else self.paths.get(path)

    def of_seen(self, seen: Seen) -> Placed | None:
        """What modules take in and put out; None for what has no place by its shape."""
        size = tuple(local(seen.tensor).shape)
        whole = size if self.shapes is None else self.shapes.get(("activation", seen.name))
        if whole is None or (self.shapes is None and seen.call):
            return None
        try:
            place = self._microbatch(tuple(whole), seen)
        except Unplaced:
            return None
        return Placed(place.shape, [(place.offset, local)])

    def _microbatch(self, whole: tuple[int, ...], seen: Seen) -> Place:
        """Of several calls each has seen some rows, one call after the other."""
        rows = len(local(seen.tensor)) if seen.tensor.ndim else 0
        if not seen.call and (not whole or rows == whole[0]):
            return self._of(whole, seen.name, seen.tensor)
        if not rows or len(whole) != seen.tensor.ndim or isinstance(seen.tensor, DTensor):
            raise Unplaced("it is no microbatch")
        start = rows * seen.call
        try:
            return self._of(whole, seen.name, seen.tensor) if not seen.call else _never()
        except Unplaced:
            if whole[0] % rows or start >= whole[0]:
                raise
        inner = by_shape((rows, *whole[1:]), tuple(seen.tensor.shape), self.axes)
        return Place(whole, (start, *inner.offset[1:]))


def _never() -> Place:
    raise Unplaced("it is a later microbatch")


def paths_of(held: Sequence[Held], *, is_whole: bool) -> dict[str, str]:
    """The baseline's path of every module of the candidate that can be told by its parameters.

    A parameter `net.0.weight` that is the baseline's `layers.4.weight` makes `net.0` `layers.4`.
    `is_whole`: the outermost module is the baseline's too.
    """
    paths: dict[str, str] = {}
    for h in held:
        if len(h.parts) != 1:
            continue
        own, theirs = h.name.split("."), h.parts[0].whole.split(".")
        while own and theirs and own[-1] == theirs[-1]:
            own, theirs = own[:-1], theirs[:-1]
            if own:
                paths.setdefault(".".join(own), ".".join(theirs))
    # Around it a wrapper may be (DDP): then it is what is inside that is recorded.
    return paths if not is_whole or "" in paths.values() else {"": "", **paths}
