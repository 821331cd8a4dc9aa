"""Sites to mutants, fates to words: what needs no rank."""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap

import pytest

from parity.backend import Entry, Tally
from parity.case import Case, Run
from parity.judge import Verdict
from parity.mutants import KINDS, Site, labels, matches, mutants, sites
from parity.mutate import Choice, Fate, Report, Unclean, _cause, _fate
from parity.mutation_report import as_json, one_line, text
from parity.trace import Key

ENTRY = Entry(
    op="all_reduce", group="tp", bytes=64, dtype="float64", phase="forward", module="", site="",
    detail="SUM", members=(0, 1), result=64, through="all_reduce",
    trail="/x/comm.py:3 in total < /x/model.py:9 in forward",
)  # fmt: skip
TP, DP = [(0, 1), (0, 1), (2, 3), (2, 3)], [(0, 2), (1, 3), (0, 2), (1, 3)]


def ledgers(*calls: Entry, times: int = 1) -> list[list[Entry]]:
    """Four ranks, dp=2 tp=2, that all make these calls."""
    groups = {"tp": TP, "dp": DP}
    return [
        [replace(e, members=groups[e.group][rank]) for e in calls for _ in range(times)]
        for rank in range(4)
    ]


def found(*calls: Entry, times: int = 1) -> list[str]:
    all_ranks = ledgers(*calls, times=times)
    return [str(mutant) for mutant in mutants(sites(all_ranks)[0], all_ranks)]


def over_dp(**changes: object) -> Entry:
    return replace(ENTRY, group="dp", trail="/x/sync.py:1 in average", **changes)  # type: ignore[arg-type]


def test_a_sum_is_changed_in_every_way() -> None:
    assert found(ENTRY, over_dp(), times=2) == [
        "drop", "double", "op MAX", "op AVG", "scale by 0.5", "scale by 2", "stale",
        "one-rank rank 0", "one-rank rank 3", "wrong-group over dp",
    ]  # fmt: skip


def test_what_makes_no_sense_is_no_mutant() -> None:
    assert "stale" not in found(ENTRY)  # there is no call before
    assert "op AVG" not in found(replace(ENTRY, dtype="bool"))
    assert "op MAX" not in found(replace(ENTRY, dtype="complex64"))
    gathered = replace(ENTRY, op="all_gather", detail="")
    assert found(gathered) == [
        "drop", "scale by 0.5", "scale by 2", "one-rank rank 0", "one-rank rank 3",
    ]  # fmt: skip
    alone = [[replace(ENTRY, members=(0,))]]
    site = sites(alone)[0]
    by_name = [str(mutant) for mutant in mutants(site, alone)]
    assert by_name == ["drop", "double", "op MAX", "op AVG", "scale by 2"]


def test_another_group_must_make_the_call_as_often_and_as_large() -> None:
    ranks = ledgers(ENTRY, over_dp())
    ranks[3][0] = replace(ranks[3][0], bytes=32)  # dp's ranks 1 and 3 no longer call alike
    site = sites(ranks)[0]
    assert not any(m.kind == "wrong-group" for m in mutants(site, ranks))


def test_messages_have_mutants_of_their_own() -> None:
    message = replace(ENTRY, op="recv", detail="from rank 9")
    kinds = found(message, over_dp(), times=2)
    assert "wrong-peer over dp" in kinds
    assert "wrong-order" in kinds
    assert "double" not in kinds
    assert "wrong-order" not in found(message)
    assert "wrong-order" not in found(replace(message, detail="from any rank"), times=2)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"through": "all_gather_object"}, "all_gather_object: set-up, no tensor of the program"),
        ({"through": "init_device_mesh"}, "init_device_mesh: set-up, no tensor of the program"),
        ({"op": "barrier", "bytes": 0, "result": 0}, "it has no result"),
        ({"op": "send", "result": 0}, "what it sends is changed where it is received"),
        ({}, ""),
    ],
)
def test_what_is_left_alone(changes: dict[str, object], why: str) -> None:
    (site,) = sites([[replace(ENTRY, **changes)]])  # type: ignore[arg-type]
    assert site.why_not == why


def test_a_label_goes_as_far_out_as_it_must() -> None:
    other = replace(ENTRY, trail="/x/comm.py:3 in total < /x/model.py:12 in forward")
    alone = replace(ENTRY, trail="/x/sync.py:5 in norm < /x/train.py:1 in update")
    assert list(labels(sites([[ENTRY, other, alone]])).values()) == [
        "all_reduce on tp, model.py:9 in forward",
        "all_reduce on tp, model.py:12 in forward",
        "all_reduce on tp, sync.py:5 in norm",
    ]


def test_labels_differ_where_one_place_is_not_enough() -> None:
    other = replace(ENTRY, trail="/x/comm.py:7 in largest < /x/model.py:9 in forward")
    third = replace(ENTRY, trail="/x/comm.py:3 in total < /x/model.py:12 in forward")
    fourth = replace(ENTRY, trail="/x/comm.py:7 in largest < /x/model.py:12 in forward")
    names = labels(sites([[ENTRY, other, third, fourth]]))
    assert len(set(names.values())) == 4
    assert names[ENTRY.name] == "all_reduce on tp, comm.py:3 in total < model.py:9 in forward"


def test_patterns() -> None:
    label = "all_reduce on [0, 1], sync.py:5 in norm"
    assert matches(label, label)
    assert matches(label, "in norm")
    assert matches(label, "*sync*norm")
    assert not matches(label, "sync*norm")


RED = Verdict(Key("forward", "y"), "bug", error=1.0, allowed=1e-13, excess=9.0)
NEAR = Verdict(Key("loss", "by step"), "ok", excess=0.25)


@pytest.mark.parametrize(
    ("tally", "red", "verdict", "by", "said"),
    [
        (Tally(4, 4, 1.0), RED, "killed", "forward", "forward of y: bug: got"),
        (Tally(4, 4, 1.0), None, "survived", "", "4 results changed, by up to 1 of their size, and "
         "every check passed (the nearest: loss of by step, at 0.25 of its bound)"),
        (Tally(4, 2, float("inf")), None, "survived", "", "2 results changed, beyond all measure"),
        (Tally(4, 0, 0.0), None, "equivalent", "", "4 calls, and not a bit was changed"),
        (Tally(4, 0, 0.0), RED, "error", "", "no result was changed, and yet forward of y"),
        (Tally(), None, "error", "", "no call was met by the rule"),
    ],
)  # fmt: skip
def test_verdicts(tally: Tally, red: Verdict | None, verdict: str, by: str, said: str) -> None:
    got = _fate(tally, red, NEAR)
    assert got[:2] == (verdict, by)
    assert got[2].startswith(said)


def test_causes() -> None:
    assert _cause("ranks 0, 1 raised: Deadlock: ranks wait") == "Deadlock"
    assert _cause("rank 1 lost the others: Lost: rank 0") == "Lost"
    assert _cause("not done after 20 s, the deadline; rank 0 is at x") == "hang"
    assert _cause("rank 0 was killed by SIGSEGV") == "crash"


def report(*verdicts: str) -> Report:
    all_ranks = ledgers(ENTRY, over_dp())
    all_sites = sites(all_ranks)
    few = [m for site in all_sites for m in mutants(site, all_ranks)]
    tally = Tally(4, 0, 0.0)
    rows = [
        (few[i], v, "forward" * (v == "killed"), "why", tally, 1.0) for i, v in enumerate(verdicts)
    ]
    run = Run(Case({"dp": 2, "tp": 2}), "float64", 2)
    command, fates = "parity mutate m.yaml --case dp2-tp2", list(starmap(Fate, rows))
    return Report(command, run, all_sites, fates, 9.0, 1.5)


def test_the_report() -> None:
    done = report("killed", "equivalent", "survived", "killed")
    assert done.exit_code == 1
    assert done.score == pytest.approx(2 / 3)
    said = text(done)
    assert (
        "k killed, = no bit changed, ~ any value that ranks share will do, S SURVIVED, ! not "
        "decided" in said
    )
    assert "all_reduce on tp, comm.py:3 in total  k       =         Sk" in said
    assert "SURVIVED (1):\n  all_reduce on tp, comm.py:3 in total\n    SURVIVED   op MAX" in said
    assert "again: parity mutate m.yaml --case dp2-tp2 --only 'all_reduce on tp, comm.py:3 in total' -v" in said  # fmt: skip  # noqa: E501
    assert "killed by: forward 2" in said
    assert (
        "dp2-tp2, float64, 2 steps: 4 mutants: 2 killed, 1 equivalent, 1 survived; score 66.7%; "
        "9 s (1.5 s the clean run)"
    ) in said
    assert "drop" in text(done, verbose=True)
    assert as_json(done)["score"] == done.score


def test_exit_codes() -> None:
    assert report("killed", "equivalent").exit_code == 0
    assert report("killed", "error").exit_code == 3
    assert report("survived", "error").exit_code == 1
    assert Unclean.code == 1
    assert one_line(report("survived").fates[0]) == f"{'SURVIVED':<10} {'drop':<22}   1.0 s  why"


def test_kinds_that_are_unknown() -> None:
    assert Choice(kinds=["drop", "lose"]).objections == [
        f"--kind lose: unknown (known: {', '.join(KINDS)})"
    ]


def test_a_name_is_that_of_the_site_wherever_it_is_called() -> None:
    (site,) = sites([[ENTRY], [ENTRY]])
    assert isinstance(site, Site)
    assert list(site.calls) == [0, 1]
    assert site.name == ENTRY.name
