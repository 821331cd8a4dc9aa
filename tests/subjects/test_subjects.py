"""Each subject is green on all its topologies, and a mistake in its use is caught and named."""

from __future__ import annotations

import re

import pytest
import torch

from parity import Backend, Differs, TestCase
from parity.case import Case
from parity.explain import lines
from parity.subject.check import CouldNotRun, How, Kept
from tests.subjects.__main__ import PAGE, page
from tests.subjects.code import FINDS, MODULES, Subject, cases, subjects, why_not
from tests.subjects.mistakes import MISTAKES, Mistake

# What torch does wrong, and what it can, is that of the newest version.
IS_OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
NEW = {"sequence"}  # before, DTensor cannot flatten dimensions of which an inner one is cut
SUBJECTS = {subject.name: subject for subject in subjects()}


@pytest.fixture(scope="session")
def kept() -> Kept:
    return Kept()


def held(check, case: TestCase) -> TestCase:
    torch.manual_seed(0)
    check(case)
    return case


@pytest.mark.parametrize(
    ("subject", "case"), [pytest.param(s, c, id=f"{s.name}-{c.id}") for s, c in cases()]
)
def test_subject_is_its_baseline(subject: Subject, case: Case, kept: Kept) -> None:
    if IS_OLD and subject.name in NEW:
        pytest.skip("needs torch 2.13")
    result = held(subject.check, TestCase(case, kept=kept)).results[-1]
    assert all(verdict.elements for judged in result.judged for verdict in judged.verdicts)


@pytest.mark.parametrize("module", [module for module in MODULES if why_not(module)])
def test_what_is_not_installed(module: str) -> None:
    pytest.skip(why_not(module))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_caught_and_named(mistake: Mistake, kept: Kept) -> None:
    subject = SUBJECTS[mistake.subject]
    if why_not(subject.module):
        pytest.skip(why_not(subject.module))
    if IS_OLD and subject.name in NEW:
        pytest.skip("needs torch 2.13")
    case = next(case for case in subject.cases if case.id == mistake.case)
    test = TestCase(case, kept=kept)
    with pytest.raises(Differs):
        held(mistake.plant(subject), test)
    [result] = test.results
    assert result.first_divergence is not None
    verdict = result.first_divergence[1]
    assert (str(verdict.key), verdict.status) == (mistake.first, mistake.status)
    if mistake.subject == "ddp_pp" and not IS_OLD:
        assert "failed to run forward" in result.unexplained  # finds/ddp_in_a_pipeline.py
        return
    assert result.culprits, result.unexplained
    first = result.culprits[0]
    assert str(first.verdict.key) == (mistake.culprit or mistake.first)
    if mistake.words:
        assert mistake.words in "\n".join(lines([first]))


@pytest.mark.parametrize("subject", [*SUBJECTS.values()], ids=lambda subject: subject.name)
def test_a_user_writes_ten_lines_at_most(subject: Subject) -> None:
    assert 2 <= subject.lines <= 10, "\n".join(subject.code)


def test_the_page_says_what_is_held() -> None:
    """But for seconds. `python -m tests.subjects` writes it."""

    def told(text: str) -> list[str]:
        return [
            re.sub(r"[ -]+", " ", re.sub(r"\| \d* *\|$", "|", line)) for line in text.split("\n")
        ]

    assert told(PAGE.read_text()) == told(page({}))


def test_every_subject_has_a_mistake() -> None:
    assert set(SUBJECTS) - {mistake.subject for mistake in MISTAKES} <= {
        "ddp_uneven_rows",  # as ddp
        "fsdp_kept",  # as fsdp
    }


@pytest.mark.skipif(IS_OLD, reason="of torch 2.13")
@pytest.mark.parametrize("backend", ["parity", "gloo"])
@pytest.mark.parametrize("subject", [*subjects(FINDS)], ids=lambda subject: subject.name)
def test_what_torch_gets_wrong(subject: Subject, backend: str, kept: Kept) -> None:
    """Where torch is mended, this fails: the file is then to go."""
    told: dict[str, object] = {}
    exec(subject.source, told)  # noqa: S102 (our own)
    last = subject.cases[-1]
    test = TestCase(last, How(backend=Backend(backend), dtypes=["float64"]), kept)
    if "FAILS" in told:
        with pytest.raises(CouldNotRun, match=str(told["FAILS"])):
            held(subject.check, test)
        return
    with pytest.raises(Differs):
        held(subject.check, test)
    [result] = test.results
    assert result.first_divergence is not None
    assert str(result.first_divergence[1].key) == told["WRONG"]
    assert result.culprits, result.unexplained
    for word in told["WORDS"]:
        assert word in "\n".join(lines(result.culprits[:1]))
