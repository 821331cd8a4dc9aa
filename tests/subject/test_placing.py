"""Where an activation lies by its shape: what is plain is found, what is ambiguous is asked for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity.modules import Seen
from parity.subject.alignment import Held, Part
from parity.subject.paths import paths_of
from parity.subject.places import Places
from parity.subject.placing import (
    Axes,
    Unplaced,
    by_shape,
    cut,
    everything,
    place_at,
    share,
    shares,
)
from parity.trace import Trace


def axes(at: dict[str, int], **sizes: int) -> Axes:
    return Axes(sizes, at)


@given(st.integers(0, 40), st.integers(1, 9), st.booleans())
def test_shares_tile_a_length(length: int, parts: int, even: bool) -> None:
    shares = [share(length, parts, i, even=even) for i in range(parts)]
    covered = [element for start, n in shares for element in range(start, start + n)]
    assert covered == list(range(length))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_a_cut_over_one_axis_is_found_by_the_shape(
    shape: list[int], n: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    covered = []
    for r in range(n):
        start, length = share(shape[dim], n, r)
        size = [length if d == dim else m for d, m in enumerate(shape)]
        place = by_shape(shape, size, axes({"tp": r}, tp=n))
        covered += (
            [] if size == shape and r else [*range(place.offset[dim], place.offset[dim] + length)]
        )
        assert length == shape[dim] or not length or place.offset[dim] == start
    if n <= shape[dim]:
        assert sorted(set(covered)) == list(range(shape[dim]))


def test_two_dims_over_two_axes() -> None:
    here = axes({"dp": 1, "tp": 2}, dp=2, tp=4)
    assert by_shape((8, 5, 16), (4, 5, 4), here) == place_at((8, 5, 16), (4, 0, 8), (4, 5, 4))


def test_one_dim_over_two_axes_is_cut_by_the_first_of_them_first() -> None:
    here = axes({"dp": 1, "tp": 2}, dp=2, tp=4)
    assert by_shape((16,), (2,), here).offset == (12,)


def test_an_axis_of_one_explains_nothing_and_is_not_in_the_way() -> None:
    assert by_shape((6,), (3,), axes({"dp": 0, "tp": 1}, dp=1, tp=2)).offset == (3,)


@pytest.mark.parametrize(
    ("shape", "size", "why"),
    [
        ((8,), (4,), "dim 0 of 8 is 4 long here, and may be cut over dp or tp"),
        ((8, 3), (8,), "it has 1 dims, and the baseline's 2"),
        ((9,), (6,), "dim 0 of 9 is 6 long here, which no axis explains"),
        ((4,), (8,), "dim 0 of 4 is 8 long here, which no axis explains"),
    ],
)
def test_what_is_unclear_is_asked_for(
    shape: tuple[int, ...], size: tuple[int, ...], why: str
) -> None:
    with pytest.raises(Unplaced) as caught:
        by_shape(shape, size, axes({"dp": 1, "tp": 1}, dp=2, tp=2))
    assert str(caught.value) == why


def test_how_the_inputs_are_cut_is_taken_first() -> None:
    here = axes({"dp": 1, "tp": 0}, dp=2, tp=2)
    assert by_shape((8,), (4,), here, {0: "dp"}).offset == (4,)


@given(st.integers(1, 30), st.integers(1, 6))
def test_inputs_that_are_cut_unevenly_are_found_where_they_were_cut(length: int, n: int) -> None:
    for r in range(n):
        start, size = share(length, n, r, even=True)
        if size != length:
            place = by_shape((length,), (size,), axes({"dp": r}, dp=n), {0: "dp"})
            assert place.offset == (start,)


def test_an_axis_that_cuts_the_inputs_along_one_dim_explains_no_other() -> None:
    here = axes({"dp": 1, "tp": 1}, dp=2, tp=2)
    assert by_shape((8, 6), (4, 3), here, {0: "dp"}).offset == (4, 3)
    with pytest.raises(Unplaced, match="which no axis explains"):
        by_shape((8, 6), (8, 3), axes({"dp": 1}, dp=2), {0: "dp"})


def test_a_cut_by_word_is_held_against_the_shape() -> None:
    here = axes({"tp": 1}, tp=2)
    whole = everything((8, 6))
    assert cut(whole, (8, 3), {1: "tp"}, here) == place_at((8, 6), (0, 3), (8, 3))
    with pytest.raises(Unplaced, match="dim 0 of 8 cut over tp is not 8 long on this rank"):
        cut(whole, (8, 3), {0: "tp"}, here)


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.data())
def test_parts_that_go_zigzag_tile_a_length(
    length: int, cp: int, tp: int, even: bool, data: st.DataObject
) -> None:
    """Whichever of two axes goes zigzag, and in whatever order they cut."""
    zigzag = data.draw(st.sets(st.sampled_from(["cp", "tp"])))
    names = data.draw(st.permutations(["cp", "tp"]))
    whole, held = torch.arange(length), []
    for c, t in itertools.product(range(cp), range(tp)):
        here = Axes({"cp": cp, "tp": tp}, {"cp": c, "tp": t}, {axis: {length} for axis in zigzag})
        stretches = shares(length, names, here, even=even)
        place = everything((length,))._replace(dims=(stretches,))
        mine = place.part_of(whole)
        for offset, slices in place.boxes:
            assert mine[slices].tolist() == [*range(offset[0], offset[0] + len(mine[slices]))]
        held += mine.tolist()
    assert sorted(held) == [*range(length)]


def test_zigzag_gives_each_rank_a_part_from_both_ends() -> None:
    def of(r: int, n: int) -> list[int]:
        here = Axes({"cp": n}, {"cp": r}, {"cp": {12}})
        place = by_shape((12,), (12 // n,), here)
        features = by_shape((24,), (24 // n,), here)  # of another length: cut as everything else is
        assert features.offset == (24 // n * r,)
        return place.part_of(torch.arange(12)).tolist()

    assert [of(r, 3) for r in range(3)] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert of(0, 1) == [*range(12)]


def test_every_product_of_axes_is_explained() -> None:
    sizes = {"dp": 2, "cp": 3, "tp": 5}
    covered = set()
    for i in range(math.prod(sizes.values())):
        at = {"dp": i // 15, "cp": i // 5 % 3, "tp": i % 5}
        covered.add(by_shape((30,), (1,), Axes(sizes, at)).offset[0])
    assert covered == set(range(30))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_what_modules_see_of_microbatches_tiles_the_whole(
    dp: int, tp: int, microbatches: int, tokens: int
) -> None:
    """Rows over dp, unevenly too, columns over tp, and each row of the batch being some tokens."""
    rows, width = 2 * dp + 1, 3 * tp
    covered = torch.zeros(rows * tokens, width, dtype=torch.int64)
    for d in range(dp):
        for t in range(tp):
            here = axes({"dp": d, "tp": t}, dp=dp, tp=tp)
            shapes = {("activation", "output of net"): (rows * tokens, width)}
            places = Places(here, shapes, {0: "dp"}, rows=rows)
            _, own = share(rows, dp, d, even=True)
            mine = torch.ones(own * tokens, 3, dtype=torch.int64)
            for call, part in enumerate(mine.split(-(-own // microbatches) * tokens)):
                placed = places.of_seen(Seen("net", False, call, part))
                assert placed is not None
                ((offset, _),) = placed.boxes
                i, j = offset
                covered[i : i + len(part), j : j + 3] += part
            assert places.incomplete == set()
            assert places.of_seen(Seen("net", False, 99, mine)) is None
    assert (covered == 1).all()


def test_what_is_seen_of_some_rows_only_is_forgotten() -> None:
    places = Places(axes({"dp": 0}, dp=1), {("activation", "output of net"): (4, 2)}, rows=4)
    assert places.of_seen(Seen("net", False, 0, torch.ones(3, 2))) is not None
    assert places.incomplete == {"output of net"}
    trace = Trace()
    trace.add("activation", "output of net", torch.ones(3, 2), shape=(4, 2), offset=(0, 0))
    trace.add("gradient", "output of net", torch.ones(1))
    trace.forget(places.incomplete)
    assert [str(box.key) for box in trace.boxes] == ["gradient of output of net"]


def named(**wholes: str) -> list[Held]:
    """Parameters by their own names, `__` for a dot, that are one whole each."""
    return [
        Held(name.replace("__", "."), (1,), [Part(whole, (1,), [])])
        for name, whole in wholes.items()
    ]


@pytest.mark.parametrize(
    ("held", "is_whole", "paths"),
    [
        (named(a__w="a.w", a__b="a.b"), True, {"a": "a", "": ""}),
        (named(module__a__w="a.w"), True, {"module.a": "a", "module": ""}),
        (named(net__0__w="layers.4.w"), False, {"net.0": "layers.4", "net": "layers"}),
        (
            named(x__0__mlp__up__w="y.3.mlp.up.w", x__0__norm__w="y.3.norm.w"),
            False,
            {
                "x.0.mlp.up": "y.3.mlp.up",
                "x.0.mlp": "y.3.mlp",
                "x.0": "y.3",
                "x.0.norm": "y.3.norm",
                "x": "y",
            },
        ),
        # Whatever they are called, modules of the same parameters are the same.
        (
            named(layers__0__ffn__up__w="h.0.mlp.up.w", layers__0__n__w="h.0.ln.w", out__w="f.w"),
            True,
            {
                "layers.0.ffn.up": "h.0.mlp.up",
                "layers.0.ffn": "h.0.mlp",
                "layers.0.n": "h.0.ln",
                "layers.0": "h.0",
                "layers": "h",
                "out": "f",
                "": "",
            },
        ),
        # One module for several of the baseline's is what is around them, if that has its name and
        # nothing else in it.
        (named(net__up="net.0.w", net__b="net.2.b"), True, {"net": "net", "": ""}),
        (named(net__up="net.0.w", out__b="net.2.b"), True, {"out": "net.2", "": ""}),
        (named(net__up="net.0.w", net__b="other.b", other__c="other.c"), True, {"": ""}),
        (
            named(net__up="net.0.w", net__b="net.2.b", net__in__w="net.in.w"),
            True,
            {"net.in": "net.in", "net": "net", "": ""},
        ),
        # Of a wrapper and what is inside, one is the baseline's.
        (named(a__w="a.w", b__module__w="b.w"), True, {"a": "a", "b.module": "b", "": ""}),
        # Nor is either of two that hold the parameters of one: a bias that is added outside.
        (
            named(a__w="a.w", a__b="a.b", b__w="b.w", b="b.b"),
            True,
            {"a": "a", "": ""},
        ),
    ],
)
def test_modules_have_the_names_that_their_parameters_tell(
    held: list[Held], is_whole: bool, paths: dict[str, str]
) -> None:
    assert paths_of(held, is_whole=is_whole) == paths


def test_a_part_of_a_module_is_not_that_module() -> None:
    """A stage of a pipeline: others have the rest of the layers."""
    alias = {name: name for name in ("layers.3.w", "layers.4.a.w", "layers.4.b.w")}
    stage = named(layers__0__a__w="layers.4.a.w", layers__0__b__w="layers.4.b.w")
    told = {"layers.0.a": "layers.4.a", "layers.0.b": "layers.4.b", "layers.0": "layers.4"}
    assert paths_of(stage, is_whole=False, alias=alias) == told
    assert paths_of(stage[:1], is_whole=False, alias=alias) == {"layers.0.a": "layers.4.a"}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_tied_weight_is_of_the_module_that_has_its_name(prefix: str) -> None:
    alias = {"emb.weight": "emb.weight", "head.weight": "emb.weight", "n.weight": "n.weight"}

    def of(name: str) -> dict[str, str]:
        tied = Held(prefix + name, (1,), [Part("emb.weight", (1,), [])])
        other = Held(f"{prefix}n.weight", (1,), [Part("n.weight", (1,), [])])
        paths = paths_of([tied, other], is_whole=True, alias=alias)
        return {path.removeprefix(prefix): theirs for path, theirs in paths.items() if theirs}

    assert of("emb.weight") == {"emb": "emb", "n": "n"}
    assert of("head.weight") == {"head": "head", "n": "n"}
    assert of("other.weight") == {"n": "n"}


@given(st.sets(st.text("ab.", min_size=1, max_size=6).filter(lambda x: "" not in x.split("."))))
def test_a_module_by_the_same_names_is_the_same(modules: set[str]) -> None:
    """And inside a wrapper; a module that is named for another's parameter is no module."""
    names = [f"{path}.weight" for path in modules]
    told = {path: path for name in names for path in _around(name)}
    pieces = [Held(name, (1,), [Part(name, (1,), [])]) for name in names]
    assert paths_of(pieces, is_whole=True) == {"": "", **told}
    assert paths_of(pieces, is_whole=False) == told
    inside = [h._replace(name=f"module.{h.name}") for h in pieces]
    wrapped = {f"module.{path}": path for path in told}
    whole = {"module": ""} if names else {"": ""}
    assert paths_of(inside, is_whole=True) == {**whole, **wrapped}


def _around(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
