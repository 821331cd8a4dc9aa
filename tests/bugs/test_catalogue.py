"""The catalogue as a whole, and what is said about the bugs that everybody should know."""

from __future__ import annotations

from collections import Counter

import pytest

from parity.case import parse_axes
from parity.explain import lines
from tests.bugs.__main__ import DOCS, Hunt, Kill, document, summary, table
from tests.bugs.catalogue import BUGS, Bug

# The first twelve, as an issue had named them, and some with which the search for culprits went
# wrong: what is put right changes more than it mends. A full run of all diagnoses is
# `python -m tests.bugs`, and takes ten minutes.
KNOWN = (
    "row_bias_on_every_rank",
    "no_reduce_after_row_product",
    "no_sum_in_backward_of_column_input",
    "gradients_not_averaged_over_dp",
    "gradients_averaged_twice",
    "loss_not_divided_by_microbatches",
    "mean_of_means",
    "norm_counts_replicated_parameters_tp_times",
    "norm_of_the_own_stage_only",
    "tied_gradient_not_summed",
    "fused_qkv_cut_as_one_block",
    "backward_with_the_wrong_microbatch",
    "gradients_summed_over_dp_in_bfloat16",
    "row_sum_in_bfloat16",
    "rows_dealt_out_in_turn",
    "data_cut_over_all_ranks",
)


def test_every_check_and_axis_is_covered() -> None:
    assert len(BUGS) >= 120
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert sum(bug.silent is not None for bug in BUGS) >= 80
    first = Counter(bug.first.split()[0] for bug in BUGS)
    assert set(first) == {"forward", "gradient", "norm", "state", "loss"}
    cut = Counter(axis for bug in BUGS for axis, n in parse_axes(bug.case).items() if n > 1)
    assert min(cut[axis] for axis in ("dp", "tp", "pp")) >= 15
    assert {"bug", "drift", "split", "hole"} <= {bug.status for bug in BUGS}


def test_the_document_is_written_from_the_catalogue() -> None:
    assert DOCS.read_text() == document(), "run python -m tests.bugs --docs"


def test_most_bugs_have_a_diagnosis() -> None:
    assert sum(bool(bug.diagnosis) for bug in BUGS) >= 0.85 * len(BUGS)


@pytest.fixture(scope="module")
def hunt() -> Hunt:
    return Hunt()


@pytest.mark.parametrize("bug", [b for b in BUGS if b.name in KNOWN], ids=lambda bug: bug.name)
def test_the_diagnosis_names_the_mistake(bug: Bug, hunt: Hunt) -> None:
    kill, culprits = hunt.kill(bug, with_silent=False)
    assert kill.caught
    assert kill.told, lines(culprits)


def test_the_kill_table() -> None:
    kill = Kill("a", True, "bug", "gradient of w", True, "gradient norm", "scaled", True, 1e5, True)
    missed = Kill("b", False, "pass", "", False, "", "", False, 0.0, None)
    kills = [kill, missed]
    assert summary(kills) == (
        "2 bugs: 1 caught, 1 at the right first tensor, 1 with the right diagnosis; 1 of 1 silent "
        "where they change nothing"
    )
    lines_of = [" ".join(line.split()) for line in table(kills).splitlines()[2:]]
    assert lines_of == [
        "a bug gradient of w gradient norm scaled 1.0e+05 silent",
        "b MISSED (wrong place) - (not as expected) 0.0e+00 -",
    ]
