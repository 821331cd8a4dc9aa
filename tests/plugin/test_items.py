"""Which items there are, which are skipped, and what options say: no rank is started here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parity.plugin.shared import SHARED
from tests.plugin.conftest import ROOT

FOUR = """
import parity
import pytest

@parity.matrix(dp=[1, 2], tp=[1, 2])
def test_grid(case):
    {body}
"""
NOTHING = "it compared nothing: call case.check(...)"


def ids(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if "::" in line and not line.startswith("SKIPPED")]


def test_one_item_per_case_and_each_can_be_chosen(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import parity
        import pytest

        BIAS = {"bias": [True, False]}

        @parity.matrix(dp=[1, 2], tp=[2], options=BIAS, when=lambda c: c.world > 2)
        def test_options(case):
            pass

        @pytest.mark.parametrize("width", [8, 16])
        @parity.matrix(tp=[1, 2])
        def test_beside(case, width, tmp_path):
            pass

        class TestMethods:
            @parity.matrix(tp=[1, 2])
            @pytest.mark.parametrize("width", [8])
            def test_one(self, case, width):
                pass

        def test_other():
            pass
        """
    )
    every = [
        "test_it.py::test_options[dp2-tp2-bias=True]",
        "test_it.py::test_options[dp2-tp2-bias=False]",
        "test_it.py::test_beside[tp1-8]",
        "test_it.py::test_beside[tp1-16]",
        "test_it.py::test_beside[tp2-8]",
        "test_it.py::test_beside[tp2-16]",
        "test_it.py::TestMethods::test_one[tp1-8]",
        "test_it.py::TestMethods::test_one[tp2-8]",
    ]
    collect = ("--collect-only", "-q", "--strict-markers", "--strict-config")
    assert ids(pytester.runpytest_inprocess(*collect)) == [*every, "test_it.py::test_other"]
    assert ids(pytester.runpytest_inprocess(*collect, "-m", "parity")) == every
    assert ids(pytester.runpytest_inprocess(*collect, "-k", "tp1 and one")) == [every[6]]
    result = pytester.runpytest_inprocess("--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.parity: a case of parallel code, against its*"])


@pytest.mark.skipif(pytest.version_tuple < (9, 0), reason="pytest 9 has the switch `strict`")
def test_strict_mode_and_options_in_native_toml(pytester: pytest.Pytester) -> None:
    pytester.makefile(
        ".toml",
        pytest="""
        [pytest]
        strict = true
        parity_max_world = 3
        parity_deadline = 20
        parity_device = "cpu"
        parity_dtype = ["float64", "float32"]
        parity_properties = false
        """,
    )
    pytester.makepyfile(FOUR.format(body="pass"))
    result = pytester.runpytest_inprocess("-rs", "-q")
    result.assert_outcomes(failed=3, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * it has 4 ranks, and there is room for 3"])


def test_what_does_not_fit_is_skipped_and_all_skipped_is_said(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import parity

        @parity.matrix(tp=[9, 16])
        def test_large(case):
            raise RuntimeError("never called")

        @parity.matrix(tp=[4], max_world=2)
        def test_limited(case):
            raise RuntimeError("never called")
        """
    )
    result = pytester.runpytest_inprocess("-rs", "-v")
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(
        [
            "=* parity =*",
            "3 cases, and nothing was compared: every one is skipped",
            "  it has 9 ranks, and there is room for 8",
            "  it has 16 ranks, and there is room for 8",
            "  it has 4 ranks, and the test allows 2 (max_world)",
            "SKIPPED [[]1[]] *: it has 9 ranks, and there is room for 8",
        ]
    )
    pytester.runpytest_inprocess("--parity-max-world", "16", "-k", "16").assert_outcomes(failed=1)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "@parity.matrix(tp=[1, 2])\ndef test_it(tmp_path): pass",
            "parity.matrix: test_it takes no argument `case`; write def test_it(case)",
        ),
        (
            "@parity.matrix(tp=[1, 2], when=lambda c: False)\ndef test_it(case): pass",
            "parity.matrix: test_it has no case: `when` is false for every combination",
        ),
    ],
    ids=["no argument", "no case"],
)
def test_a_test_that_could_have_no_case_is_an_error(
    pytester: pytest.Pytester, source: str, said: str
) -> None:
    pytester.makepyfile(f"import parity\n\n{source}\n")
    result = pytester.runpytest_inprocess("-q")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    lines = result.outlines
    place = lines.index(said)
    assert lines[place - 1].startswith("____")
    assert not any("Traceback" in line or line.startswith(">") for line in lines)


def test_the_fixture_is_for_tests_under_the_decorator(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(case): pass")
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["the fixture `case` is parity's, for tests under @parity.matrix*"])
    assert "= parity =" not in result.stdout.str()


def test_a_fixture_of_the_users_own_with_that_name_is_left_alone(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import parity
        import pytest

        @pytest.fixture
        def case():
            return 5

        def test_theirs(case):
            assert case == 5

        @parity.matrix(tp=[1])
        def test_ours(case):
            pass
        """
    )
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*its fixture `case` is another one: rename yours"])


def test_what_compares_nothing_fails_whatever_style_of_traceback(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(test_it=FOUR.format(body="pass"))
    for style in ("long", "native", "auto"):
        # The plugin is loaded already in this process: there is a warning.
        result = pytester.runpytest_inprocess(f"--tb={style}", "-kdp2-tp2", "--disable-warnings")
        result.assert_outcomes(failed=1, deselected=3)
        place = result.outlines.index(NOTHING)
        assert result.outlines[place - 1].strip("_ ") == "test_grid[dp2-tp2]"
        assert result.outlines[place + 1] == "  again: pytest 'test_it.py::test_grid[dp2-tp2]'"
        assert result.outlines[place + 2].strip("= ") == "parity"
    lines = result.outlines[place + 3 :]
    assert lines[:2] == ["1 case: 1 failed otherwise", "compared: 0 tensors, 0 elements"]
    assert lines[2] == f"FAILED test_it.py::test_grid[dp2-tp2]   {NOTHING}"
    assert lines[3] == "  again: pytest 'test_it.py::test_grid[dp2-tp2]'"
    assert "hidden" not in result.stdout.str()


def test_lf_and_x_and_what_to_type_in_another_folder(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=FOUR.format(body="pass"))
    folder = pytester.mkdir("inner")
    pytester.makeini("[pytest]\nparity_seed = 5")
    pytester.runpytest_inprocess("-q").assert_outcomes(failed=4)
    pytester.runpytest_inprocess("-x", "-q").assert_outcomes(failed=1)
    os.chdir(folder)
    result = pytester.runpytest_inprocess("..", "--lf", "-xq", "--parity-dtype=float64")
    result.assert_outcomes(failed=1)
    again = "  again: pytest '../test_it.py::test_grid[dp1-tp1]' --parity-dtype float64"
    assert result.outlines.count(again) == 2


def test_an_ordinary_exception_is_shown_as_pytest_shows_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FOUR.format(body="assert case['tp'] == 7"))
    result = pytester.runpytest_inprocess("-k", "dp1-tp2")
    result.stdout.fnmatch_lines(
        [
            ">       assert case['tp'] == 7",
            "E       *assert 2 == 7",
            "FAILED *::test_grid[[]dp1-tp2[]]   assert 2 == 7",
        ]
    )


def test_all_that_is_wrong_with_the_options_is_said_at_once(pytester: pytest.Pytester) -> None:
    pytester.makeini(
        """
        [pytest]
        parity_deadline = soon
        parity_backend = mpi
        parity_matrix = there.yaml
        parity_dtype = float32 float8
        """
    )
    result = pytester.runpytest_inprocess(
        "--parity-device=xpu", "--parity-max-world=0", "--parity-seed=-1", "--parity-json=no/x"
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line.removeprefix("ERROR: ") for line in result.errlines if line] == [
        "--parity-device xpu: expected one of auto, cpu, cuda",
        "parity_backend = mpi: expected one of auto, parity, nccl, gloo",
        "--parity-max-world 0: expected a whole number from 1 on",
        "parity_deadline: expected a number of seconds above 0",
        "parity_dtype = float8: expected one of float64, float32, bfloat16, float16",
        "--parity-seed -1: expected a whole number from 0 on",
        "--parity-json no/x: expected a file in a folder that exists",
        f"parity_matrix = {pytester.path / 'there.yaml'}: no such file",
    ]


def test_the_command_line_beats_the_file(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nparity_device = cuda\nparity_max_world = 1")
    pytester.makepyfile(FOUR.format(body="pass"))
    result = pytester.runpytest_inprocess()
    assert result.errlines[0] == (
        "ERROR: --parity-device cuda: no GPU is visible; use --parity-device cpu"
    )
    result = pytester.runpytest_inprocess("--parity-device=cpu", "--parity-max-world=2")
    result.assert_outcomes(failed=3, skipped=1)


def test_every_option_has_its_twin_and_stands_in_one_group(pytester: pytest.Pytester) -> None:
    text = pytester.runpytest_inprocess("--help").stdout.str()
    group = text.partition("parity: parallel code against a one-device baseline:")[2]
    for name in ("device", "backend", "max-world", "deadline", "dtype", "seed", "json"):
        assert f"  --parity-{name}=" in group.partition("\n\n")[0].removeprefix("\n")
        assert f"  parity_{name.replace('-', '_')} (" in text
    assert "parity_matrix (args)" in text
    assert "parity_properties (bool)" in text


def test_junit_files_can_do_without_our_properties(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        FOUR.format(body="pass")
        + "\ndef test_other(request):\n    request.node.user_properties.append(('a', 1))"
    )
    pytester.runpytest_inprocess("--junitxml=with.xml")
    assert (pytester.path / "with.xml").read_text().count('name="parity_case"') == 4
    pytester.makeini("[pytest]\nparity_properties = false")
    pytester.runpytest_inprocess("--junitxml=without.xml")
    text = (pytester.path / "without.xml").read_text()
    assert "parity" not in text.replace("parity.matrix", "")
    assert '<property name="a" value="1" />' in text


def test_github_is_told_only_there_and_annotations_only_by_one(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        test_it=FOUR.format(body="pass"), pytest_github_actions_annotate_failures=""
    )
    step = pytester.path / "step.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    for value, plugins, told, annotated in (
        ("false", (), False, False),
        ("true", (), True, True),
        ("true", ("-p", "pytest_github_actions_annotate_failures"), True, False),
    ):
        monkeypatch.setenv("GITHUB_ACTIONS", value)
        step.write_text("")
        pytester.syspathinsert()
        result = pytester.runpytest_inprocess(*plugins)
        result.assert_outcomes(failed=4)
        assert bool(step.read_text()) is told
        assert ("::error " in result.stdout.str()) is annotated


class Holder:
    """A plugin that holds on to what a session should have given back."""

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self.folder = item.config.stash[SHARED].kept.folder(b"some")
        assert Path(self.folder).is_dir()
        self.kept = item.config.stash[SHARED].kept


def test_folders_are_removed_when_the_session_ends(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FOUR.format(body="pass"))
    holder = Holder()
    pytester.inline_run("-k", "dp1-tp1", plugins=[holder]).assertoutcome(failed=1)
    assert not Path(holder.folder).parent.exists()


SAY = """
import multiprocessing.forkserver, pathlib, sys

def pytest_unconfigure(config):
    who = "worker" if hasattr(config, "workerinput") else "first"
    server = multiprocessing.forkserver._forkserver._forkserver_pid is not None
    pathlib.Path(f"loaded-{who}").write_text(f"torch {'torch' in sys.modules}, server {server}")
"""


def test_a_session_without_cases_loads_no_torch_and_starts_no_server(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As installed: by its entry point, with every other plugin there is."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Framework :: Pytest" in project["classifiers"]
    lines = [f"{name} = {of}" for name, of in project["entry-points"]["pytest11"].items()]
    assert lines == ["heiretsu-parity = parity.plugin"]
    installed = pytester.mkdir("installed") / "heiretsu-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: heiretsu\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{installed.parent}")
    monkeypatch.delenv("PYTEST_PLUGINS")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    pytester.makeconftest(SAY)
    result = pytester.runpytest_subprocess("--co", "-p", "no:xdist", "-p", "no:randomly")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.stdout.fnmatch_lines(["plugins: *heiretsu-0.1.0*"])
    assert (pytester.path / "loaded-first").read_text() == "torch False, server False"
    pytester.makepyfile("import parity\n\n@parity.matrix(tp=[1, 99])\ndef test_it(case): pass")
    result = pytester.runpytest_subprocess("--co", "-q")
    assert (pytester.path / "loaded-first").read_text() == "torch False, server False"
