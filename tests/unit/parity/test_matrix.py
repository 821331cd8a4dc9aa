"""The matrix file: every objection with its line and what to write; combining as GitHub does."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity import Case, UsageError
from parity.matrix_file import Matrix, combinations, load, skips

HEAD = "target: a.b:c\nbaselines: {plain: a.b:d}\n"


def matrix(**fields: object) -> Matrix:
    start = {"target": "a:b", "baselines": {"plain": "a:c"}, "axes": {"dp": "auto", "tp": "auto"}}
    return Matrix.model_validate({**start, **fields})


def objections(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "matrix.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load(path)
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("axes: {dp: auto}\nstepz: 3", "4: stepz: unknown key (known: target, objections, "),
        (
            "axes: {dp: auto}\nsteps: 3\nsteps: 4",
            "5: steps: the key steps stands here and in line 4",
        ),
        ("axes: {dp: auto}\nsteps: '10'", "4: steps: expected a whole number, got '10'; write 10"),
        ("axes: {dp: auto}\nsteps: 0", "4: steps: must be 1 or more, got 0"),
        ("axes: {dp: auto}\ndeadline: 1e-5", "4: deadline: YAML reads 1e-5 as text; write 1.0e-5"),
        ("axes: {dp: auto}\ndeadline: 3e7", "4: deadline: YAML reads 3e7 as text; write 3.0e+7"),
        (
            "axes: {dp: auto}\noptions: {on: 3}",
            "4: options: the key on is read as True; write 'on'",
        ),
        (
            "axes: {dp: auto}\noptions: {at: 12:30:45}",
            "4: options.at: YAML reads 12:30:45 as the nu",
        ),
        ("axes: {dp: 4}", "3: axes.dp: expected 'auto' or a list of sizes; write [4], got 4"),
        ("axes: {dp: [1, two]}", "3: axes.dp.1: expected a whole number, got 'two'"),
        ("axes: {dp: [2, 2]}", "3: axes.dp: a value is listed twice in [2, 2]"),
        ("axes: {dp: []}", "3: axes.dp: must not be empty"),
        ("axes: {dp: auto}\ndeadline: .inf", "4: deadline: must be a finite number, got inf"),
        ("axes: {dp: auto}\nexclude: [{}]", "4: exclude.0: must not be empty"),
        ("axes: {}", "3: axes: must not be empty"),
        ("steps: 3", "1: axes: is missing"),
        ("axes: {dp: auto}\ndtypes: [float63]", "4: dtypes.0: expected 'float64', 'float32', "),
        ("axes: {dp: auto}\ndtypes: [float64, float64]", "4: dtypes: a value is listed twice in"),
        ("axes: {dp: auto}\nexclude: [{tp: 2}]", "4: exclude.0.tp: no axis of this matrix (its ax"),
        ("axes: {dp: auto}\ninclude: [{dp: x}]", "4: include.0.dp: expected a whole number from 1"),
        (
            "axes: {dp: auto}\noverrides: [{tensor: x, bound: 1.0e-5, reason: ''}]",
            "4: overrides.0.reason: needs a sentence that says why, got ''",
        ),
        ("axes: {dp: auto}\nsoak: {b: []}", "4: soak.b: must not be empty"),
        ("axes: {dp: auto}\nsoak: {b: {from: 1, two: 2}}", "4: soak.b.to: is missing"),
        ("axes: {dp: auto}\nsoak: {b: {from: 3, to: 2}}", "4: soak.b: from 3 to 2 is no range"),
        ("axes: [", "3: no YAML: "),
    ],
)
def test_each_mistake_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    found = objections(tmp_path, HEAD + text)
    assert any(line.startswith(said) for line in found), found


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    text = "target: a.b\nbaselines: {one: {cas: dp1}, two: {case: tp1}}\naxes: {dp: auto}\nsteps: x"
    assert objections(tmp_path, text) == [
        "1: target: expected package.module:function, got 'a.b'",
        "2: baselines.one.cas: unknown key here",
        "2: baselines.one.case: is missing",
        "4: steps: expected a whole number, got 'x'",
    ]


def test_a_baseline_case_must_name_the_axes(tmp_path: Path) -> None:
    text = "target: a:b\nbaselines: {one: {case: tp1}}\naxes: {dp: auto}"
    assert objections(tmp_path, text) == [
        "2: baselines.one.case: 'tp1' does not name the axes dp, in order"
    ]


def test_an_alias_that_contains_itself(tmp_path: Path) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_text("axes: &a {dp: [1, 2], x: *a}")
    with pytest.raises(UsageError, match="refers to what contains it"):
        load(path)


def test_no_file_and_an_empty_file(tmp_path: Path) -> None:
    assert len(objections(tmp_path, "")) == 3
    with pytest.raises(UsageError, match="name a matrix file that exists"):
        load(tmp_path / "nothing.yaml")


def test_the_projects_own_matrix_loads_and_has_38_triples() -> None:
    own = load(Path(__file__).parents[3] / "matrix.yaml")
    assert len(combinations(own, 8)) == 38


@given(st.integers(1, 12), st.integers(1, 3))
def test_auto_lists_every_combination_that_fits_once(room: int, count: int) -> None:
    axes = {name: "auto" for name in ("dp", "tp", "pp")[:count]}
    cases = combinations(matrix(axes=axes), room)
    sizes = [tuple(case.axes.values()) for case in cases]
    assert len(set(sizes)) == len(sizes)
    assert all(prod(s) <= room for s in sizes)
    grid = [()]
    for _ in range(count):
        grid = [(*s, n) for s in grid for n in range(1, room + 1)]
    assert sorted(sizes) == sorted(s for s in grid if prod(s) <= room)
    assert [case.world for case in cases] == sorted(case.world for case in cases)


def test_sizes_by_name_are_kept_even_when_they_do_not_fit() -> None:
    """They are skipped with a reason, not dropped in silence."""
    cases = combinations(matrix(axes={"dp": [1, 16]}), 8)
    assert [case.id for case in cases] == ["dp1", "dp16"]
    assert [tuple(skip) for skip in skips(cases, 8, lambda case: [])] == [
        (Case({"dp": 16}), "it has 16 ranks, and there is room for 8")
    ]


def test_a_named_size_with_an_auto_axis_grows_only_as_far_as_it_fits() -> None:
    cases = combinations(matrix(axes={"dp": "auto", "tp": [4]}), 8)
    assert [case.id for case in cases] == ["dp1-tp4", "dp2-tp4"]


def test_exclude_removes_by_partial_match() -> None:
    axes = {"dp": [1, 2], "tp": [1, 2]}
    kept = combinations(matrix(axes=axes, exclude=[{"dp": 2}]), 8)
    assert [case.id for case in kept] == ["dp1-tp1", "dp1-tp2"]


def test_include_extends_what_it_does_not_contradict() -> None:
    axes = {"dp": [1, 2], "tp": [1]}
    cases = combinations(matrix(axes=axes, include=[{"dp": 2, "color": "red"}]), 8)
    assert [case.id for case in cases] == ["dp1-tp1", "dp2-tp1-color=red"]


def test_include_without_an_axis_extends_every_case() -> None:
    cases = combinations(matrix(axes={"dp": [1, 2]}, include=[{"color": "red"}]), 8)
    assert [case.id for case in cases] == ["dp1-color=red", "dp2-color=red"]


def test_include_that_matches_nothing_is_a_new_case() -> None:
    axes = {"dp": [1, 2], "tp": [1]}
    cases = combinations(matrix(axes=axes, include=[{"dp": 3}, {"dp": 3, "x": 1}]), 8)
    assert [case.id for case in cases] == ["dp1-tp1", "dp2-tp1", "dp3-tp1", "dp3-tp1-x=1"]


def test_include_comes_after_exclude() -> None:
    fields = {"axes": {"dp": [1, 2]}, "exclude": [{"dp": 2}], "include": [{"dp": 2}]}
    assert [case.id for case in combinations(matrix(**fields), 8)] == ["dp1", "dp2"]


def test_a_skip_has_every_reason() -> None:
    skip = next(skips([Case({"dp": 9})], 8, lambda case: ["nine is odd"]))
    assert skip.reason == "nine is odd; it has 9 ranks, and there is room for 8"
