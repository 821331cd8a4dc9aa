"""What is said of rows, how GPUs are counted, and whose time limit is the smaller: no session."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parity.case import Case
from parity.launcher import Backend
from parity.plan import Baseline, Packed, Plan
from parity.plugin import github, gpus, running, summary, timeouts
from parity.plugin.early import will_need_ranks
from parity.plugin.row import COULD_NOT, DIFFERS, FAILED, KEY, PASSED, SKIPPED, Row, take
from parity.run import Result
from parity.subject.check import Kept

ROWS = {
    "a.py::test[tp1]": Row(
        "tp1", PASSED, 1.0, 4, 1000, (2e-16, "forward of y"), (1.4, "loss of x"), {"forward": 3e-14}
    ),
    "a.py::test[tp2]": Row(
        "tp2", PASSED, 1.0, 4, 1000, (3e-16, "gradient of w"), (0.9, "loss of x"), {"loss": 2e-14}
    ),
    "a.py::test[tp3]": Row("tp3", FAILED, 1.0, said="assert 1 == 2", again="pytest x"),
    "a.py::test[tp4]": Row(
        "tp4",
        DIFFERS,
        1.0,
        4,
        500,
        (0.9, "forward of y"),
        (9e5, "forward of y"),
        {"forward": 9e-14},
        said="first divergence: forward of y",
        size=0.9,
        again="pytest 'a.py::test[tp4]'",
    ),
    "a.py::test[tp16]": Row("tp16", SKIPPED, 0.0, said="it has 16 ranks, and there is room for 8"),
}


def test_the_section_says_what_was_compared_and_what_failed() -> None:
    assert summary.lines(ROWS) == [
        "5 cases: 2 passed, 1 differs, 1 failed otherwise, 1 skipped",
        "compared: 12 tensors, 2,500 elements",
        "largest relative error in float64: 3.0e-16, gradient of w in a.py::test[tp2]",
        "largest rho (1 = the baseline's own rounding): 1.4, loss of x in a.py::test[tp1]",
        "any relative error above these would have been flagged: forward 3.0e-14, loss 2.0e-14",
        "DIFFERS a.py::test[tp4]   first divergence: forward of y",
        "  again: pytest 'a.py::test[tp4]'",
        "FAILED a.py::test[tp3]   assert 1 == 2",
        "  again: pytest x",
    ]


def test_many_failures_are_counted_and_not_listed() -> None:
    rows = {f"t[{i}]": Row("tp2", COULD_NOT, said="it died", again="x") for i in range(23)}
    lines = summary.lines(rows)
    assert lines[0] == "23 cases: 23 could not be run"
    assert len(lines) == 2 + 2 * 20 + 1
    assert lines[-1] == "and 3 more"


def test_one_case_that_is_skipped() -> None:
    assert summary.lines({"t": Row("tp9", SKIPPED, said="why")}) == [
        "1 case, and nothing was compared: every one is skipped",
        "  why",
    ]
    rows = {f"t[{i}]": Row("tp9", SKIPPED, said="why") for i in range(3)}
    assert summary.lines(rows)[1:] == ["  why (3 of them)"]


def test_a_row_travels_as_one_property_and_ends_as_a_few() -> None:
    row = ROWS["a.py::test[tp4]"]
    properties: list[tuple[str, Any]] = [("theirs", 1), row.as_property()]
    assert take(properties) == row
    assert properties == [("theirs", 1)]
    assert take(properties) is None
    assert row.for_junit() == [
        ("parity_case", "tp4"),
        ("parity_status", "differs"),
        ("parity_tensors", 4),
        ("parity_elements", 500),
        ("parity_error", "9.0e-01"),
        ("parity_rho", "9e+05"),
        ("parity_first", "first divergence: forward of y"),
        ("parity_again", "pytest 'a.py::test[tp4]'"),
    ]
    assert row.as_property()[0] == KEY


def test_the_step_summary_puts_failures_first_and_stays_within_its_budget() -> None:
    text = github.markdown(ROWS)
    table = [line for line in text.splitlines() if line.startswith("| a.py")]
    assert [re.findall(r"tp\d+", line)[0] for line in table] == ["tp3", "tp4", "tp1", "tp2", "tp16"]
    assert table[2] == (r"| a.py::test\[tp1\] | passed | 2.0e-16 forward of y | 1.4 loss of x |  |")
    assert "left out" not in text
    rows = {f"é.py::test[{i}]": Row("tp2", PASSED, said="x") for i in range(1000)}
    text = github.markdown(rows, budget=4000)
    assert len(text.encode()) <= 4000
    shown = text.count("| é.py")
    assert shown > 50
    assert text.endswith(f"\n{1000 - shown} more rows are left out.\n")
    assert github.BUDGET < 2**20


def test_nothing_in_a_cell_is_markdown_or_html() -> None:
    row = Row("tp2", COULD_NOT, said="a|b <img src=x> *c* `d` \\ [e](f)\r\ng &amp;")
    line = github.markdown({"t": row}).splitlines()[6]
    cell = line.split(" | ")[-1]
    assert cell == r"a\|b &lt;img src=x> \*c\* \`d\` \\ \[e\](f)  g &amp;amp; |"


def test_annotations_are_few_escaped_and_the_worst_come_first() -> None:
    rows = {f"t[{i}]": Row("x", DIFFERS, said="s", size=float(i), again="g") for i in range(6)}
    rows = {"u": Row("x", COULD_NOT, said="50%\r\n: a,b", again="g"), **rows}
    lines = github.commands(rows, {"t[5]": github.Place("a,b:c%.py", 3)})
    assert lines[0] == ("::error file=a%2Cb%3Ac%25.py,line=3,title=differs%3A t[5]::s%0Aagain: g")
    assert [line.partition("::s")[0] for line in lines[1:5]] == [
        f"::error title=differs%3A t[{i}]" for i in (4, 3, 2, 1)
    ]
    assert lines[5:] == ["parity: 2 more annotations are withheld"]
    assert github.commands({"u": rows["u"]}, {}) == [
        "::error title=could not be run%3A u::50%25%0D%0A: a,b%0Aagain: g"
    ]
    assert github.commands({"p": ROWS["a.py::test[tp1]"]}, {}) == []


@pytest.mark.parametrize(
    ("files", "environ", "build", "count"),
    [
        ([], {}, "cuda", 0),
        (["nvidiactl", "nvidia-uvm"], {}, "cuda", 0),
        (["nvidia0", "nvidia1", "nvidiactl"], {}, "cuda", 2),
        (["nvidia0", "nvidia1"], {}, "", 0),
        (["nvidia0", "nvidia1"], {"CUDA_VISIBLE_DEVICES": ""}, "cuda", 0),
        (["nvidia0", "nvidia1"], {"CUDA_VISIBLE_DEVICES": "-1"}, "cuda", 0),
        (["nvidia0", "nvidia1"], {"CUDA_VISIBLE_DEVICES": " 1"}, "cuda", 1),
        (["nvidia0", "nvidia1"], {"CUDA_VISIBLE_DEVICES": "1,2,0"}, "cuda", 1),
        (["nvidia0", "nvidia1"], {"CUDA_VISIBLE_DEVICES": "1,1"}, "cuda", 0),
        (["nvidia0"], {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, "cuda", 2),
        (["kfd", "dri/renderD128", "dri/renderD129"], {}, "hip", 2),
        (["kfd", "dri/renderD128"], {"HIP_VISIBLE_DEVICES": ""}, "hip", 0),
        (["kfd", "dri/renderD128", "dri/renderD129"], {"ROCR_VISIBLE_DEVICES": "1"}, "hip", 1),
        (["dri/renderD128"], {}, "hip", 0),
    ],
)
def test_gpus_are_counted_by_files_and_the_environment(
    tmp_path: Path, files: list[str], environ: dict[str, str], build: str, count: int
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert gpus.visible(environ, tmp_path, build) == count


def test_what_torch_is_built_for_is_what_it_says() -> None:
    import torch

    assert gpus._torch_is_built_for() == (
        "hip" if torch.version.hip else "cuda" if torch.version.cuda else ""
    )


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("import parity\n@parity.matrix(tp=[1])\ndef test(case): ...", True),
        (
            "from parity import matrix\nclass Test:\n    @matrix(tp=[1])\n    def test(case): ...",
            True,
        ),
        ("# parity matrix(\n", False),
        ("@matrix(3)\ndef test(): ...", False),
    ],
)
def test_the_text_of_a_module_tells_whether_ranks_will_need_ranks(
    tmp_path: Path, text: str, needed: bool
) -> None:
    path = tmp_path / "test_it.py"
    assert not will_need_ranks(path)
    path.write_text(text)
    assert will_need_ranks(path) is needed


def an_item(
    marker: Any = None, option: Any = None, ini: Any = None, plugins: tuple[str, ...] = ("timeout",)
) -> Any:
    config = SimpleNamespace(
        pluginmanager=SimpleNamespace(hasplugin=plugins.__contains__),
        getoption=lambda name, default: option,
        getini=lambda name: ini,
    )
    return SimpleNamespace(config=config, get_closest_marker=lambda name: marker)


def test_the_limit_is_that_of_the_marker_then_of_the_option_the_environment_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTEST_TIMEOUT", raising=False)
    given = SimpleNamespace(args=(10,), kwargs={})
    named = SimpleNamespace(args=(), kwargs={"timeout": 11})
    assert timeouts.of(an_item(given, 20, "40")) == 10
    assert timeouts.of(an_item(named, 20, "40")) == 11
    assert timeouts.of(an_item(None, 20, "40")) == 20
    assert timeouts.of(an_item(None, None, "40")) == 40
    monkeypatch.setenv("PYTEST_TIMEOUT", "30")
    assert timeouts.of(an_item(None, None, "40")) == 30
    assert timeouts.of(an_item(None, 0, "40")) is None  # 0: switched off
    assert timeouts.of(an_item(given, 20, "40", plugins=())) is None
    assert timeouts.left(an_item(None, 60), elapsed=2) == 60 - 2 - 5
    assert timeouts.left(an_item(None, 6), elapsed=1) == 6 - 1 - 2
    assert timeouts.left(an_item(None, 1), elapsed=3) == 0.5
    assert timeouts.left(an_item(plugins=()), elapsed=3) == float("inf")


def test_results_without_a_single_element_are_no_comparison() -> None:
    result = Result(Case({"tp": 1}), "pass", [], 0.0)
    state: Any = running.Running(0.0, None, [result], has_case=True)  # type: ignore[arg-type]
    item: Any = SimpleNamespace(stash={running.RUNNING: state})
    with pytest.raises(running.ComparedNothing, match="there is no element in any of its tensors"):
        running.check_compared(item)


def test_baselines_are_kept_whatever_the_deadline_of_a_case_is() -> None:
    case, kept = Case({"tp": 1}), Kept()

    def baselines(deadline: float, data: bytes = b"a") -> object:
        packed = Packed("the baseline", data)
        backend = Backend(deadline=deadline)
        held = [Baseline("baseline", packed, case)]
        session, _ = kept.session(
            Plan(packed, held, [case], ["float64"], {}, {}, 1, 0, (), backend)
        )
        assert session.plan.backend.deadline == deadline
        return session.baselines

    assert baselines(10.0) is baselines(7.5)
    assert baselines(10.0, b"b") is not baselines(10.0)
    folder = Path(kept.folder(b"a"))
    assert folder.is_dir()
    kept.close()
    assert not folder.parent.exists()
