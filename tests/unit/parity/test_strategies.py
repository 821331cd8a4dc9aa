"""What parity.strategies draws: it holds what it promises, reaches all of it, and shrinks well."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Hashable
from itertools import pairwise, product
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

import parity
from parity import strategies as ps

ROOT = Path(__file__).parents[3]
DOC = (ROOT / "docs/strategies.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", DOC, re.DOTALL))
OUTPUT = re.compile(r"<!-- output: pytest (\S+) -->\n```\n(.*?)```", re.DOTALL)


def drawn(strategy: st.SearchStrategy[object], count: int = 1000) -> list[object]:
    """So many draws, fewer if there are not as many."""
    values = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(value: object) -> None:
        values.append(value)

    draw()
    return values


def simplest(strategy: st.SearchStrategy[object], condition: Callable[..., bool]) -> object:
    return find(strategy, condition, settings=settings(database=None, max_examples=2000))


def compositions(size: int, parts: int, least: int = 0) -> set[tuple[int, ...]]:
    """All ways to give each part its share, by trying all."""
    tuples = product(range(least, size + 1), repeat=parts)
    return {shares for shares in tuples if sum(shares) == size}


def hashable(mask: torch.Tensor) -> Hashable:
    return tuple(map(tuple, mask.tolist()))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (
            ps.topologies(8).map(lambda case: tuple(case.axes.values())),
            {sizes for sizes in product(range(1, 9), repeat=3) if prod(sizes) <= 8},
        ),
        (
            ps.topologies(12, ["a", "b"], min_world=4, b=[1, 3]).map(lambda c: (*c.axes.values(),)),
            {(a, b) for a in range(1, 13) for b in (1, 3) if 4 <= a * b <= 12},
        ),
        (ps.even(3, max_size=12), {3, 6, 9, 12}),
        (ps.uneven(3, max_size=7), {1, 2, 4, 5, 7}),
        (ps.shapes(ps.even(2, max_size=4), 5), {(2, 5), (4, 5)}),
        (ps.shares(5, 3), compositions(5, 3)),
        (ps.shares(4, 4), compositions(4, 4)),
        (ps.shares(7, 3, min_share=1), compositions(7, 3, 1)),
        (ps.shares(3, 3, min_share=1), {(1, 1, 1)}),
        (ps.shares(0, 2), {(0, 0)}),
        (
            ps.microbatch_splits(5, dp=2, micro_batches=[1, 2], min_rows=1),
            {((a,), (5 - a,)) for a in range(1, 5)}
            | {((a, b), (c, d)) for a, b, c, d in compositions(5, 4, 1)},
        ),
        (
            ps.microbatch_splits(2, micro_batches=2, min_rows=0),
            {((0, 2),), ((1, 1),), ((2, 0),)},
        ),
        (
            ps.microbatch_splits(8, dp=2, equal=True),
            {((4 // n,) * n,) * 2 for n in (1, 2, 4)},
        ),
        (
            ps.valid_masks(2, 2, shares=(1, 1)).map(hashable),
            {m for m in product(product((False, True), repeat=2), repeat=2) if any(map(any, m))},
        ),
        (
            ps.valid_masks(1, 2, nothing=True).map(hashable),
            {(row,) for row in product((False, True), repeat=2)},
        ),
        (
            ps.cuts((5,), 3).map(lambda cut: tuple(part.shape[0] for part in cut)),
            compositions(5, 3),
        ),
        (
            ps.cuts((5, 2), 2, empty=False).map(lambda cut: tuple(part.shape for part in cut)),
            {((a, 2), (5 - a, 2)) for a in range(1, 5)} | {((5, 1), (5, 1))},
        ),
        (
            ps.cuts((3, 4), 4, how=["tensor_split"], dims=[-1]).map(lambda cut: cut[-1]),
            {ps.Part((0, 3), (3, 1))},
        ),
        (ps.cuts((), 1), {(ps.Part((), ()),)}),
        (ps.flat_cuts(5, 2, align=[1, 4]).map(lambda cut: cut[1]), {(3, 5, 1), (4, 5, 3)}),
        (
            ps.groupings(3),
            {((a,), (b,), (c,)) for a, b, c in product(range(3), repeat=3) if len({a, b, c}) == 3}
            | {(p,) for p in product(range(3), repeat=3) if len(set(p)) == 3},
        ),
    ],
)  # fmt: skip
def test_all_that_is_promised_is_drawn_and_nothing_else(
    strategy: st.SearchStrategy[Hashable], expected: set[Hashable]
) -> None:
    assert set(drawn(strategy)) == expected


@pytest.mark.parametrize("room", [8, 64])
def test_large_topologies_are_not_rare(room: int) -> None:
    worlds = [case.world for case in drawn(ps.topologies(room), 300)]
    assert sum(2 * world > room for world in worlds) > len(worlds) / 4


def test_uneven_splits_and_shares_without_a_valid_token_are_not_rare() -> None:
    splits = drawn(ps.shares(12, 4), 300)
    assert sum(max(split) - min(split) > 1 for split in splits) > len(splits) / 3
    masks = drawn(ps.valid_masks(8, 6, shares=((2, 2), (4,))), 300)
    bare = [m for m in masks if not all(part.any() for part in m.split((2, 2, 4)))]
    assert len(bare) > len(masks) / 4
    assert any(mask.all() for mask in masks)


@given(st.integers(1, 20), st.integers(1, 6), st.data())
def test_the_conventions_are_those_of_torch(size: int, parts: int, data: st.DataObject) -> None:
    def lengths(how: str) -> list[int]:
        cut = data.draw(ps.cuts((size,), parts, how=[how]))
        return [part.shape[0] for part in cut]

    assert lengths("tensor_split") == [len(p) for p in torch.arange(size).tensor_split(parts)]
    chunks = [len(p) for p in torch.arange(size).chunk(parts)]
    assert lengths("chunk") == chunks + [0] * (parts - len(chunks))


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 6), st.data())
def test_cuts_cover_each_element_once(shape: list[int], parts: int, data: st.DataObject) -> None:
    parts = parts if shape else 1
    cut = data.draw(ps.cuts(shape, parts))
    times = torch.zeros(shape, dtype=torch.int64)
    for part in cut:
        assert times[part.slices].shape == part.shape
        times[part.slices] += 1
    assert len(cut) == parts
    assert (times == 1).all()


@given(st.integers(0, 40), st.integers(1, 6), st.data())
def test_flat_cuts_are_equally_long_and_in_order(n: int, parts: int, data: st.DataObject) -> None:
    cut = data.draw(ps.flat_cuts(n, parts))
    assert len({stop - start + padding for start, stop, padding in cut}) == 1
    assert [i for start, stop, _ in cut for i in range(start, stop)] == list(range(n))
    assert all(start == after for (_, after, _), (start, _, _) in pairwise(cut))


@given(st.sampled_from(["float32", torch.float64, "bfloat16", "int64"]), st.data())
def test_exact_tensors_are_whole_numbers(dtype: str | torch.dtype, data: st.DataObject) -> None:
    x = data.draw(ps.exact_tensors((5, 7), dtype, bound=3))
    assert x.shape == (5, 7)
    assert x.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    assert x.abs().max() <= 3
    assert torch.equal(x, x.to(torch.int64).to(x.dtype))


@pytest.mark.parametrize(
    ("strategy", "condition", "expected"),
    [
        (ps.topologies(64), lambda case: True, "dp1-tp1-pp1"),
        (ps.topologies(64), lambda case: case.world > 1, "dp2-tp1-pp1"),
        (ps.topologies(16), lambda case: min(case.axes.values()) > 1, "dp2-tp2-pp2"),
        (ps.topologies(16, tp=[4, 2]), lambda case: case.axes["pp"] == 3, "dp1-tp2-pp3"),
        (ps.shapes(ps.even(4), ps.uneven(4)), lambda shape: shape[0] > 4, (8, 1)),
        (ps.shares(9, 3), lambda shares: shares != (3, 3, 3), (2, 4, 3)),
        (ps.shares(9, 3), lambda shares: 0 in shares, (0, 6, 3)),
        (ps.microbatch_splits(8, dp=2), lambda split: len(split[0]) > 1, ((2, 2), (2, 2))),
        (ps.microbatch_splits(8, dp=2), lambda split: split[0] != split[1], ((3,), (5,))),
        (ps.valid_masks(2, 2), lambda mask: True, ((True, True), (True, True))),
        (ps.valid_masks(2, 2), lambda mask: not mask.all(), ((True, True), (True, False))),
        (ps.exact_tensors((4,), bound=2), lambda x: True, (1, 2, -2, -1)),
        (ps.cuts((4, 6), 6), lambda cut: True, ((1, 6), (1, 6), (1, 6), (1, 6), (0, 6), (0, 6))),
        (ps.cuts((4, 6), 6, empty=False), lambda cut: True, ((4, 1),) * 6),
        (ps.cuts((6, 4), 4), lambda cut: cut[0].shape[1] < 4, ((6, 1),) * 4),
        (ps.groupings(4), lambda groups: len(groups) < 4, ((0, 1), (2, 3))),
    ],
)
def test_what_fails_shrinks_to_the_plainest(
    strategy: st.SearchStrategy[object], condition: Callable[..., bool], expected: object
) -> None:
    found = simplest(strategy, condition)
    if isinstance(found, parity.Case):
        found = found.id
    elif isinstance(found, torch.Tensor):
        found = hashable(found) if found.ndim > 1 else tuple(found.tolist())
    elif isinstance(found[0], ps.Part):
        found = tuple(part.shape for part in found)
    assert found == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ps.topologies(0), "max_world is a whole number from 1 on, not 0"),
        (lambda: ps.topologies(4, min_world=5), "max_world is a whole number from 5 on, not 4"),
        (lambda: ps.topologies(axes="dp"), "axes are different names, at least one, as in"),
        (lambda: ps.topologies(axes=["dp", "dp"]), "axes are different names"),
        (lambda: ps.topologies(ep=2), "'ep' is no axis of these (they are dp, tp, pp)"),
        (lambda: ps.topologies(tp=[0]), "tp is a whole number from 1 on, not 0"),
        (lambda: ps.topologies(tp=[]), "tp has nothing to choose from"),
        (lambda: ps.topologies(tp=16), "no topology of 1 to 8 ranks has tp=16"),
        (lambda: ps.topologies("8"), "max_world is a whole number from 1 on, not '8'"),
        (lambda: ps.even(8, max_size=7), "no size from 1 to 7 is even over 8"),
        (lambda: ps.uneven(1), "is uneven over 1; limit the axis to sizes from 2 on"),
        (lambda: ps.shapes(-1), "a dimension is a whole number from 0 on, not -1"),
        (lambda: ps.shares(3, 2, min_share=2), "3 does not give each of 2 parts 2"),
        (lambda: ps.microbatch_splits(3, dp=4), "3 rows over dp=4 do not give each of"),
        (lambda: ps.microbatch_splits(3, dp=2, equal=True), "microbatches as many rows"),
        (lambda: ps.valid_masks(4, 0), "length is a whole number from 1 on, not 0"),
        (lambda: ps.valid_masks(4, 2, shares=(2, 1)), "shares of 4 rows add up to them"),
        (lambda: ps.exact_tensors((2, -1)), "a dimension is a whole number from 0 on, not -1"),
        (lambda: ps.cuts((4,), 2, how=["half"]), "by some of even, tensor_split, chunk, any"),
        (lambda: ps.cuts((4,), 2, dims=[1]), "there is no dimension 1 of 1"),
        (lambda: ps.cuts((3, 9), 4, dims=[0], empty=False), "(3, 9) has no cut along [0] in 4"),
        (lambda: ps.cuts((), 2), "() has no cut in 2 parts by even, tensor_split, chunk, any"),
        (lambda: ps.flat_cuts(4, 2, align=()), "align has nothing to choose from"),
        (lambda: ps.groupings(4, 3), "4 ranks do not make groups of 3"),
    ],
)
def test_wrong_arguments_are_refused_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_it_loads_no_torch_and_is_an_attribute_of_parity() -> None:
    program = "import sys, parity; parity.strategies.cuts; sys.exit('torch' in sys.modules)"
    assert python(program).returncode == 0


def test_without_hypothesis_it_says_what_to_install() -> None:
    done = python("import sys; sys.modules['hypothesis'] = None; from parity import strategies")
    assert "parity.strategies needs hypothesis: pip install 'hypothesis>=6.100'" in done.stderr


def run_doc(folder: Path, name: str, text: str) -> subprocess.CompletedProcess[str]:
    (folder / name).write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("name", "shown"), OUTPUT.findall(DOC))
def test_the_mistake_in_the_documentation_shrinks_to_what_is_shown(
    name: str, shown: str, tmp_path: Path
) -> None:
    out = run_doc(tmp_path, name, FILES[name]).stdout
    said = re.sub(r"^E +(?=Draw)|^E {7}|  # or any other.*", "", out, flags=re.MULTILINE)
    assert shown in said, out


def test_the_remedy_in_the_documentation_passes(tmp_path: Path) -> None:
    text = FILES["test_accumulation.py"].replace("loss[ok].mean()", "loss[ok].sum()")
    done = run_doc(tmp_path, "test_accumulation.py", text.replace("len(split)", "valid.sum()"))
    assert done.returncode == 0, done.stdout


def test_the_example_on_ranks_passes(tmp_path: Path) -> None:
    done = run_doc(tmp_path, "test_vocabulary.py", FILES["test_vocabulary.py"])
    assert done.returncode == 0, done.stdout


def test_every_strategy_is_in_the_documentation() -> None:
    public = {
        name
        for name, value in vars(ps).items()
        if callable(value) and value.__module__ == ps.__name__ and not name.startswith("_")
    }
    assert public - {"T", "R"} <= set(re.findall(r"\w+", DOC))
