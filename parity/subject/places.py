"""Where what a rank has seen lies in what the baseline saw, and under which name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from parity.errors import TraceError
from parity.modules import MODEL, Placed, Seen
from parity.subject.alignment import local
from parity.subject.features import Features
from parity.subject.placing import (
    Axes,
    Cuts,
    Place,
    Stretch,
    Unplaced,
    as_dtensor,
    by_shape,
    cut,
    everything,
    of_dtensor,
    shares,
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
        rows: int | None = None,
        times: int = 1,
        features: Features | None = None,
        calls: Mapping[str, int] | None = None,
    ) -> None:
        """`inputs` and `outputs`: over which axes they are cut, by the user's word ("": those
        outputs that are not named); `paths`: the baseline's name of each module that has one there
        (None: all, the same); `rows`: of the whole batch, where modules are called for some of them
        at a time; `times`: how often gradients are counted until they are averaged over ranks;
        `features`: which of a module's this rank has, where it has not all; `calls`: how often the
        baseline has seen each record of a module.
        """
        self.axes, self.shapes, self.paths = axes, shapes, paths
        self.inputs, self.outputs = inputs or {}, outputs or {}
        self.rows, self.times, self.features = rows, times, features or {}
        self.expected_calls, self.calls = calls or {}, Counter[str]()
        self._done: dict[str, tuple[int, int]] = {}  # rows that were seen, of how many

    def of(self, check: str, name: str, tensor: Tensor) -> Place:
        """Raises TraceError where it cannot be told."""
        size = tuple(local(tensor).shape)
        if self.shapes is None:
            return everything(size)
        whole = self.shapes.get((check, name))
        if whole is None:
            return everything(size)  # an `extra` record, for the judge
        try:
            return self._of(tuple(whole), name, tensor, self._word(check, name))
        except Unplaced as problem:
            word = "output={0: 'dp'}" if check == "forward" else "split={'dp': 0}"
            raise TraceError(
                f"where the {check} of {name} lies is unclear: {problem}; say it, as in {word}"
            ) from problem

    def _word(self, check: str, name: str) -> Cuts | None:
        if check not in ("forward", "activation"):
            return None
        leaf = name.partition(f" of {MODEL}")[0].rpartition(" ")[2]
        return self.outputs.get(leaf) or self.outputs.get("")

    def _of(
        self, whole: tuple[int, ...], name: str, tensor: Tensor, word: Cuts | None = None
    ) -> Place:
        size = tuple(local(tensor).shape)
        if (placed := as_dtensor(tensor)) is not None:
            place = of_dtensor(placed)
            if place.shape != whole:
                raise Unplaced(f"it is a DTensor of {place.shape}, and the baseline's is {whole}")
            return place
        if word:
            place, given = everything(whole), {dim % len(whole) for dim in self.inputs}
            for dim, names in ((dim % len(whole), names) for dim, names in word.items()):
                axes = self.axes if dim in given else self.axes._replace(zigzag={})
                place = cut(place, size, {dim: names}, axes)
            return place
        return by_shape(whole, size, self.axes, self.inputs)

    def path_of(self, path: str) -> str | None:
        return path if self.paths is None else self.paths.get(path)

    def of_seen(self, seen: Seen) -> Placed | None:
        """What modules take in and put out; None for what has no place by its shape."""
        self.calls[seen.name] += 1
        size = tuple(local(seen.tensor).shape)
        whole = size if self.shapes is None else self.shapes.get(("activation", seen.name))
        if whole is None or (self.shapes is None and seen.call):
            return None
        stretches = self._stretches(whole, seen)
        if stretches:  # of the other dims its shape tells, as if it had all features
            full = seen.tensor[..., :1].expand(*size[:-1], whole[-1])
            seen = seen._replace(tensor=full)
        try:
            place = self._seen(tuple(whole), seen)
        except Unplaced:
            return None
        if stretches:
            place = place._replace(dims=(*place.dims[:-1], tuple(stretches)))
        boxes = [(offset, _part(slices)) for offset, slices in place.boxes]
        return Placed(place.shape, boxes, self.times)

    def _stretches(self, whole: Sequence[int], seen: Seen) -> Sequence[Stretch]:
        """The features that this rank has, if its parameters tell it."""
        x, found = seen.tensor, self.features.get((seen.path, seen.is_input), ())
        if as_dtensor(x) is not None or x.ndim != len(whole) or not x.numel():
            return ()
        is_cut = x.shape[-1] < whole[-1]
        return found if is_cut and sum(s.length for s in found) == x.shape[-1] else ()

    def _seen(self, whole: tuple[int, ...], seen: Seen) -> Place:
        x = seen.tensor
        is_plain = as_dtensor(x) is None and 0 < x.ndim == len(whole)
        if self.rows is None or not is_plain:
            if seen.call:
                raise Unplaced("the baseline's was called once")
            return self._of(whole, seen.name, x)
        # In microbatches: each call has the rows that follow those of the call before it.
        start, length = self._own_rows(whole[0], self.rows)
        done, _ = self._done.get(seen.name, (0, length))
        if done + len(x) > length:
            raise Unplaced("it has seen all rows before")
        self._done[seen.name] = (done + len(x), length)
        inner = by_shape((len(x), *whole[1:]), tuple(x.shape), self.axes, self.inputs)
        return Place(whole, ((Stretch(start + done, 0, len(x)),), *inner.dims[1:]))

    def _own_rows(self, length: int, rows: int) -> tuple[int, int]:
        """This rank's part of the batch, of which every row may have become several."""
        if length % rows:
            raise Unplaced("its rows are not those of the batch")
        over = self.inputs.get(0, ())
        own = shares(rows, (over,) if isinstance(over, str) else over, self.axes, even=True)
        if len(own) > 1:
            raise Unplaced("its rows do not follow each other")
        times = length // rows
        return own[0].whole * times, own[0].length * times

    @property
    def incomplete(self) -> set[str]:
        """Of which fewer rows were seen than this rank has, or in more calls than the baseline's
        were: nothing can be said of them.
        """
        parts = {name for name, (done, length) in self._done.items() if done < length}
        often = self.expected_calls.items() if self.rows is None else ()
        return parts | {name for name, n in often if self.calls[name] not in (0, n)}


def _part(slices: tuple[slice, ...]) -> Callable[[Tensor], Tensor]:
    return lambda x: local(x)[slices]
