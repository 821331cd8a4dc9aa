from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity import Case, Run
from parity.case import parse_axes

axes = st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.integers(1, 99), min_size=1)


@given(axes)
def test_an_id_reads_back_as_its_axes(sizes: dict[str, int]) -> None:
    assert parse_axes(Case(sizes).id) == sizes


@pytest.mark.parametrize("text", ["", "dp0", "dp", "dp2-dp3", "2dp", "dp2_tp2", "dp2-"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it as in dp2-tp2-pp1"):
        parse_axes(text)


def test_options_are_part_of_the_id_and_the_title() -> None:
    case = Case({"dp": 2, "tp": 1}, {"tied": False})
    assert (case.id, case.title, case.world) == (
        "dp2-tp1-tied=False",
        "dp=2 tp=1 tied=False",
        2,
    )


def test_a_run_is_labelled_by_dtype_and_variant() -> None:
    assert Run(Case({"dp": 1}), "float64", 3, variant={"schedule": "1f1b"}).label == (
        "float64 schedule=1f1b"
    )
