"""Two recordings: what is found, what is said about it, and what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from parity import UsageError
from parity.cli import main
from parity.offline.report import as_json, text
from parity.subject.alignment import Box, Held, Part
from tests.offline.ranks import compare, recorder, write, write_all, wrong

G = {"w": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}
ONES = {"w": torch.ones(6, 4)}


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return write(tmp_path / "a", ONES, G)


def candidate(folder: Path, gradients: list[Tensor], axis: str = "tp") -> Path:
    """Ranks that hold the same parameter, and these gradients."""
    return write_all(folder, [({axis: i}, {"w": g}) for i, g in enumerate(gradients)])


def test_what_agrees(baseline: Path, tmp_path: Path) -> None:
    report = compare(baseline, candidate(tmp_path / "b", [G["w"], G["w"]]))
    assert report.exit_code == 0
    said = text(report)
    assert "compared: 3 tensors, 72 elements, 1 steps, 3 copies bit by bit" in said
    assert "step 0  PASS  0.0e+00      0.0e+00     0.0e+00  3 equal" in said
    assert (
        "bounds: half of the digits, which is a guess; measured ones are sharper: record the"
        in (said)
    )
    assert said.endswith(f"PASS  {tmp_path / 'b'} against {baseline}")


def found(baseline: Path, folder: Path, gradients: list[Tensor]) -> tuple[str, str, list[str]]:
    """The status of the gradient, what is wrong in words, the hints."""
    report = compare(baseline, candidate(folder, gradients))
    (j,) = report.wrong
    assert str(j.verdict.key) == "gradient of w"
    return j.verdict.status, j.verdict.text, list(j.hints)


def test_copies_that_differ_in_one_bit(baseline: Path, tmp_path: Path) -> None:
    other = G["w"].clone()
    other[2, 3] = torch.nextafter(other[2, 3], torch.tensor(9.0))
    status, said, _ = found(baseline, tmp_path / "b", [G["w"], other])
    assert status == "split"
    assert said.startswith("ranks 0 and 1 hold different copies (1 elements differ, by up to ")


def test_a_sum_that_is_missing(baseline: Path, tmp_path: Path) -> None:
    part = torch.randn(6, 4)
    status, _, hints = found(baseline, tmp_path / "b", [part, G["w"] - part])
    assert status == "split"
    assert hints == [
        "the sum over tp of what the ranks hold equals the baseline: a sum over tp (an all-reduce) "
        "is missing"
    ]


def test_an_average_that_is_missing(baseline: Path, tmp_path: Path) -> None:
    part = torch.randn(6, 4)
    _, _, hints = found(baseline, tmp_path / "b", [part, 2 * G["w"] - part])
    assert hints == [
        "the mean over tp of what the ranks hold equals the baseline: an average over tp is missing"
    ]


def test_no_hint_where_nothing_simple_fits(baseline: Path, tmp_path: Path) -> None:
    """What the ranks hold adds up to the baseline and as much again of something else."""
    part, rest = torch.randn(6, 4), torch.randn(6, 4)
    rest -= G["w"] * (rest * G["w"]).sum() / G["w"].square().sum()
    _, _, hints = found(baseline, tmp_path / "b", [part, G["w"] + rest - part])
    assert hints == []


def test_a_factor(baseline: Path, tmp_path: Path) -> None:
    status, _, hints = found(baseline, tmp_path / "b", [G["w"] / 2, G["w"] / 2])
    assert status == "differs"
    assert hints == [
        "it is 1/2 (tp) times the baseline: divided by tp once too often, or not summed over it"
    ]
    said = text(compare(baseline, tmp_path / "b"))
    assert "FAIL   first divergence: step 0, gradient of w\n  differs: got " in said
    assert "relative error 5.0e-01, allowed 4.9e-04" in said
    assert "the 1 tensors before it agree; of the 1 after it, 0 do not" in said
    assert f"again: parity diff {baseline} {tmp_path / 'b'} -v" in said
    assert said.endswith("1 of 3 tensors differ")


def test_zero(baseline: Path, tmp_path: Path) -> None:
    _, _, hints = found(baseline, tmp_path / "b", [torch.zeros(6, 4)] * 2)
    assert hints == ["it is zero everywhere: never computed, or cleared too late"]


def test_one_wrong_element_and_where(baseline: Path, tmp_path: Path) -> None:
    other = G["w"].clone()
    other[4, 1] = 7.0
    report = compare(baseline, candidate(tmp_path / "b", [other, other]))
    (j,) = report.wrong
    assert (j.verdict.place, j.verdict.got) == ((4, 1), 7.0)
    assert j.verdict.want == pytest.approx(G["w"][4, 1].item())
    assert j.hints == []


def test_one_wrong_row_of_many_is_not_hidden_by_the_others(tmp_path: Path) -> None:
    g = torch.randn(100_000, 8)
    ones = torch.ones(100_000, 8)
    other = g.clone()
    other[777] *= 1.01
    write(tmp_path / "a", {"w": ones}, {"w": g})
    write(tmp_path / "b", {"w": ones}, {"w": other})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert wrong(report) == {"gradient of w": "differs"}
    assert report.wrong[0].verdict.place[0] == 777
    assert report.wrong[0].verdict.error < report.wrong[0].verdict.allowed


def test_what_is_not_finite(baseline: Path, tmp_path: Path) -> None:
    other = G["w"].clone()
    other[0, 0], other[1, 1] = float("nan"), float("inf")
    status, said, _ = found(baseline, tmp_path / "b", [other, other])
    assert (status, said) == ("nan", "2 of 24 elements are not finite")


@pytest.mark.parametrize("value", [float("nan"), 1e200])
@pytest.mark.parametrize("options", [{}, {"sketch": True}])
def test_a_baseline_that_is_not_finite_is_not_agreed_with(
    value: float, options: dict[str, Any], tmp_path: Path
) -> None:
    ones, other = torch.ones(100).double(), torch.ones(100).double()
    other[3] = value
    write(tmp_path / "a", {"w": ones}, {"w": other}, **options)
    write(tmp_path / "b", {"w": ones}, {"w": ones})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert wrong(report) == {"gradient of w": "nan"}
    assert report.wrong[0].verdict.text == (
        "of the baseline itself: its elements, or their squares, are not finite"
    )


def test_a_baseline_of_several_ranks(tmp_path: Path) -> None:
    ranks = [({"tp": i}, {"w": G["w"].chunk(2)[i]}) for i in range(2)]
    cut = write_all(tmp_path / "cut", ranks, layout={"w": {0: "tp"}})
    whole = write(tmp_path / "whole", ONES, G)
    assert not compare(cut, whole).wrong
    unsaid = write_all(tmp_path / "unsaid", ranks)
    assert not compare(whole, unsaid).wrong
    report = compare(unsaid, cut)
    text = report.wrong[1].verdict.text
    assert text.startswith("of the baseline itself: ranks 0 and 1 hold different copies (12 elem")
    assert text.endswith("; where these are parts, record it with a layout")


def test_a_sum_is_made_of_all_its_terms(baseline: Path, tmp_path: Path) -> None:
    """As DTensors that are Partial are recorded; here by the loss, which is declared so."""
    with recorder(tmp_path / "one", ONES) as recording:
        recording.loss(6.0)
    for rank in range(4):
        at = {"dp": rank // 2, "tp": rank % 2}
        with recorder(tmp_path / "four", ONES, rank, 4, at=at) as recording:
            recording.loss(2.0 + 2 * at["dp"], total="dp")
    report = compare(tmp_path / "one", tmp_path / "four")
    assert not report.wrong
    assert report.judged[0].verdict.copies == 1  # the sums that tp=0 and tp=1 make
    for rank in range(2):
        with recorder(tmp_path / "few", ONES, rank, 2, at={"dp": 0, "tp": rank}) as recording:
            recording.loss(6.0, total="dp")
    assert not compare(tmp_path / "one", tmp_path / "few").wrong


def test_a_sum_that_lacks_a_term(tmp_path: Path) -> None:
    for rank, folder in ((0, "one"), (0, "two"), (1, "two")):
        world = 1 if folder == "one" else 2
        recording = recorder(tmp_path / folder, ONES, rank, world, at={"dp": rank})
        if rank == 0:
            recording.loss(3.0, total="dp")
        recording.state()
    report = compare(tmp_path / "one", tmp_path / "two")
    assert wrong(report) == {"loss of loss": "hole"}
    assert report.wrong[0].verdict.text == "the sum over dp needs 2 ranks, 1 have it"


def test_a_baseline_with_a_hole(tmp_path: Path) -> None:
    ranks = [({"tp": i}, {"w": G["w"].chunk(2)[i]}) for i in range(2)]
    rank = write(tmp_path / "b", ONES, G)
    upper = Part("w", (6, 4), [Box((0, 0), torch.arange(12).view(3, 4))])
    hole = write_all(tmp_path / "hole", ranks, layout={"w": Held("w", (3, 4), [upper])})
    report = compare(hole, rank)
    assert wrong(report)["gradient of w"] == "hole"
    assert report.wrong[0].verdict.text == (
        "of the baseline itself: 12 of 24 elements are on no rank; record it on one process, or "
        "with a layout"
    )


def test_the_parameters_come_first_whatever_was_recorded_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with recorder(tmp_path / name, ONES) as recording:
            recording.loss(1.0)
            recording.gradients()
            recording.state()
    report = compare(tmp_path / "a", tmp_path / "b")
    assert [j.verdict.key.check for j in report.judged] == ["parameter", "loss", "state"]


def test_missing_and_extra(tmp_path: Path) -> None:
    write(tmp_path / "a", {"v": torch.ones(2), **ONES}, G)
    write(tmp_path / "b", {"u": torch.ones(3), **ONES}, {"u": torch.ones(3)})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert wrong(report) == {
        "parameter of v": "missing",
        "parameter of u": "extra",
        "gradient of w": "missing",
        "gradient of u": "extra",
        "state of v": "missing",
        "state of u": "extra",
    }
    said = {str(j.verdict.key): j.verdict.text for j in report.wrong}
    assert said["gradient of w"] == "the candidate did not record it; the baseline has (6, 4)"
    assert said["gradient of u"] == "the baseline did not record it; the candidate has (3,)"


def test_shapes_and_dtypes(baseline: Path, tmp_path: Path) -> None:
    write(tmp_path / "b", {"w": torch.ones(6, 5)}, {"w": torch.ones(6, 5)})
    report = compare(baseline, tmp_path / "b")
    assert set(wrong(report).values()) == {"shape"}
    assert report.wrong[0].verdict.text == "its shape is (6, 5), the baseline's (6, 4)"
    write(tmp_path / "c", {"w": torch.ones(6, 4, dtype=torch.int32)})
    report = compare(baseline, tmp_path / "c")
    assert wrong(report)["state of w"] == "dtype"
    assert report.wrong[0].verdict.text == (
        "its dtype is torch.int32, the baseline's torch.float32"
    )


def test_ranks_that_disagree(baseline: Path, tmp_path: Path) -> None:
    write(tmp_path / "b", ONES, G, 0, 2, at={"tp": 0})
    double = {"w": ONES["w"].double()}
    write(tmp_path / "b", double, {"w": G["w"].double()}, 1, 2, at={"tp": 1})
    report = compare(baseline, tmp_path / "b")
    assert set(wrong(report).values()) == {"dtype"}
    assert report.wrong[0].verdict.text == (
        "ranks disagree about the dtype: rank 0 holds float32, rank 1 float64"
    )


def test_a_finer_baseline_is_the_truth(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": ONES["w"].double()}, {"w": G["w"].double()})
    write(tmp_path / "b", ONES, {"w": G["w"] * (1 + 2**-20)})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert not report.wrong
    assert (
        "the baseline is in float64, the candidate in float32: the baseline is the truth, and a "
        "rounding is that of the coarser dtype of each tensor"
    ) in text(report)


def test_in_float64_it_is_a_bug(tmp_path: Path) -> None:
    g = G["w"].double()
    write(tmp_path / "a", {"w": ONES["w"].double()}, {"w": g})
    write(tmp_path / "b", {"w": ONES["w"].double()}, {"w": g * (1 + 1e-6)})
    assert wrong(compare(tmp_path / "a", tmp_path / "b")) == {"gradient of w": "bug"}


def test_a_gradient_that_is_nothing_but_rounding(tmp_path: Path) -> None:
    """It is zero in exact arithmetic: what is allowed is a rounding of its companions."""
    both = {"big": torch.ones(50), "none": torch.ones(6)}
    write(tmp_path / "a", both, {"big": torch.ones(50), "none": torch.full((6,), 1e-8)})
    write(tmp_path / "b", both, {"big": torch.ones(50), "none": torch.full((6,), -3e-8)})
    report = compare(tmp_path / "a", tmp_path / "b")
    assert not report.wrong
    (none,) = (j.verdict for j in report.judged if str(j.verdict.key) == "gradient of none")
    assert none.error < 1e-7  # of its companions; of itself it would be 4


def test_losses_of_parts_of_the_batch(tmp_path: Path) -> None:
    with recorder(tmp_path / "a", ONES) as recording:
        recording.loss(3.0)
    for name, mean in (("b", "dp"), ("c", "")):
        for rank, value in enumerate((2.0, 4.0)):
            with recorder(tmp_path / name, ONES, rank, 2, at={"dp": rank}) as recording:
                recording.loss(value, mean=mean)
    assert not compare(tmp_path / "a", tmp_path / "b").wrong
    report = compare(tmp_path / "a", tmp_path / "c")
    assert wrong(report) == {"loss of loss": "split"}
    assert report.wrong[0].hints == [
        "the mean over dp of what the ranks hold equals the baseline: an average over dp is "
        "missing",
        'if each rank has the loss of its own part of the batch: recorder.loss(loss, mean="dp")',
    ]


Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def nudged(folder: Path, run: Run, parameters: Mapping[str, Tensor] = ONES) -> list[Path]:
    """Recordings of `run`: parameters to gradients, each parameter moved by a rounding."""
    folders = []
    for number in range(9):
        recording = recorder(folder / str(number), parameters, nudge=number)
        model = recording._model
        gradients = run({n: p.detach() for n, p in model.named_parameters()})
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        recording.gradients()
        recording.state()
        folders.append(folder / str(number))
    return folders


@pytest.mark.parametrize("options", [{}, {"sketch": True}])
def test_nudged_recordings_measure_the_noise(options: dict[str, Any], tmp_path: Path) -> None:
    first, *moved = nudged(tmp_path / "n", lambda p: {"w": G["w"] * p["w"]})
    right, bad = {"w": G["w"] * (1 + 2**-22)}, {"w": G["w"] * (1 + 1e-4)}
    write(tmp_path / "right", ONES, right, **options)
    write(tmp_path / "bad", ONES, bad, **options)
    assert not compare(first, tmp_path / "bad").wrong  # beneath half of the digits
    for count in (4, 8):
        report = compare(first, tmp_path / "right", *moved[:count])
        assert not report.wrong
    report = compare(first, tmp_path / "bad", *moved)
    assert wrong(report) == {"gradient of w": "differs"}
    assert "bounds: 76 times the noise that 8 nudged recordings show" in text(report)
    assert f"--nudged {moved[0]} --nudged {moved[1]}" in text(report)


def test_noise_is_that_of_the_row(tmp_path: Path) -> None:
    """A row that is a thousand times as large, and as noisy, excuses no other."""
    large = G["w"] * torch.tensor([1e4, 1, 1, 1, 1, 1])[:, None]
    first, *moved = nudged(tmp_path / "n", lambda p: {"w": large * p["w"]})
    other = large.clone()
    other[3] += 1e-3
    write(tmp_path / "b", ONES, {"w": other})
    report = compare(first, tmp_path / "b", *moved)
    assert wrong(report) == {"gradient of w": "differs"}
    assert report.wrong[0].verdict.place[0] == 3


@pytest.mark.parametrize("options", [{}, {"sketch": True}])
def test_noise_of_a_finer_dtype_is_made_that_of_the_coarser(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The baseline and its noise in float64; what is a rounding in float32 is allowed there.

    Its terms cancel, so that the noise is far above a rounding of the result.
    """
    fine = torch.randn(6, 4).double()

    def cancelling(p: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"w": fine * (p["w"] * 1000 - 999)}

    double = {"w": ONES["w"].double()}
    first, *moved = nudged(tmp_path / "n", cancelling, double)
    write(tmp_path / "right", ONES, {"w": (fine * (1 + 1e-3)).float()}, **options)
    write(tmp_path / "bad", ONES, {"w": (fine * (1 + 1e-1)).float()}, **options)
    assert not compare(first, tmp_path / "right", *moved).wrong
    assert wrong(compare(first, tmp_path / "bad", *moved)) == {"gradient of w": "differs"}


def sketches(folder: Path, gradients: list[Tensor]) -> Path:
    ranks = [({"tp": i}, {"w": g}) for i, g in enumerate(gradients)]
    return write_all(folder, ranks, sketch=True, layout={"w": {}})


def test_sketches_are_held_against_tensors_and_sketches(baseline: Path, tmp_path: Path) -> None:
    small = write(tmp_path / "s", ONES, G, sketch=True)
    part = torch.randn(6, 4)
    right = sketches(tmp_path / "right", [G["w"]] * 2)
    split = sketches(tmp_path / "split", [part, G["w"] - part])
    scaled = sketches(tmp_path / "scaled", [2 * G["w"]] * 2)
    for truth in (baseline, small):
        report = compare(truth, right)
        assert not report.wrong
        assert report.judged[1].verdict.elements == 24
        assert "sketches: errors are estimates (give or take 9 percent), of whole tensors" in (
            text(report)
        )
        (j,) = compare(truth, split).wrong
        assert j.verdict.status == "split"
        assert j.hints[0].startswith("the sum over tp of what the ranks hold equals the baseline")
        (j,) = compare(truth, scaled).wrong
        assert j.hints == [
            "it is 2 (tp) times the baseline: summed over tp once too often, or not divided by it"
        ]
        assert j.verdict.error == pytest.approx(1.0, rel=0.3)
    assert not compare(small, write(tmp_path / "full", ONES, G)).wrong


def test_sketches_of_shards(tmp_path: Path) -> None:
    whole = torch.randn(40, 30)
    write(tmp_path / "a", {"w": whole}, {"w": whole})
    for rank in range(4):
        part = {"w": whole.chunk(4, 1)[rank].contiguous()} if rank < 4 else {}
        if part["w"].shape[1] != 8:  # 30 over 4 is uneven
            part = {"w": whole[:, 24:].contiguous()}
        positions = torch.arange(part["w"].numel()).view_as(part["w"])
        columns = Part("w", (40, 30), [Box((0, 8 * rank), positions)])
        boxes = Held("w", tuple(part["w"].shape), [columns])
        options: dict[str, Any] = {"at": {"tp": rank}, "sketch": True, "layout": {"w": boxes}}
        write(tmp_path / "b", part, part, rank, 4, **options)
    assert not compare(tmp_path / "a", tmp_path / "b").wrong


def test_sketches_of_what_a_layout_cuts_evenly(tmp_path: Path) -> None:
    whole = torch.randn(16, 30)
    write(tmp_path / "a", {"w": whole}, {"w": whole})
    sizes = {"dp": 2, "tp": 2, "cp": 3}
    for rank in range(12):
        at = {"dp": rank // 6, "tp": rank // 3 % 2, "cp": rank % 3}
        rows = whole.chunk(4)[2 * at["dp"] + at["tp"]]
        part = {"w": rows.chunk(3, 1)[at["cp"]].contiguous()}
        options: dict[str, Any] = {"at": at, "sizes": sizes, "sketch": True}
        layout = {"w": {0: ("dp", "tp"), 1: "cp"}}
        write(tmp_path / "b", part, part, rank, 12, layout=layout, **options)
    assert not compare(tmp_path / "a", tmp_path / "b").wrong


def test_sketches_that_are_not_finite(baseline: Path, tmp_path: Path) -> None:
    other = G["w"].clone()
    other[0, 0] = float("nan")
    report = compare(baseline, sketches(tmp_path / "b", [other, other]))
    assert wrong(report) == {"gradient of w": "nan"}


def test_json(baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = candidate(tmp_path / "b", [2 * G["w"]] * 2)
    target = tmp_path / "out.json"
    assert main(["diff", str(baseline), str(other), "--json", str(target)]) == 1
    document = json.loads(target.read_text())
    assert document["schema"] == 1
    assert document["compared"] == {"tensors": 3, "elements": 72, "copies": 3}
    (entry,) = document["wrong"]
    assert (entry["step"], entry["check"], entry["tensor"]) == (0, "gradient", "w")
    assert entry["status"] == "differs"
    assert entry["hints"][0].startswith("it is 2 (tp) times the baseline")
    assert document["exit_code"] == 1
    assert "FAIL   first divergence: step 0, gradient of w" in capsys.readouterr().out
    assert as_json(compare(baseline, other))["checks"]["gradient"]["wrong"] == 1


def test_exit_codes(baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = candidate(tmp_path / "b", [G["w"]])
    assert main(["diff", str(baseline), str(right)]) == 0
    assert main(["diff", str(baseline), str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"parity: {tmp_path / 'none'}: no such folder; expected one that parity.record wrote\n"
    )
    assert main(["diff", str(baseline), str(right), "--json", str(tmp_path / "x" / "y")]) == 2


def refused(*folders: Path) -> str:
    with pytest.raises(UsageError) as error:
        compare(*folders)
    return str(error.value)


def test_folders_that_hold_no_recording(baseline: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    assert refused(baseline, tmp_path / "b") == (
        f"{tmp_path / 'b'}: it holds no recording; expected rank0.json and so on, which "
        "parity.record writes; give the folder that was named there"
    )
    recorder(tmp_path / "c", ONES)
    assert refused(baseline, tmp_path / "c") == (
        f"{tmp_path / 'c'}: no step was recorded by all ranks; expected step0-rank0.safetensors "
        "and so on; did the run end before its first optimizer step?"
    )
    assert refused(baseline, baseline) == (
        f"{baseline}: compared with itself; expected two recordings; give another"
    )


def test_ranks_that_are_not_of_one_run(baseline: Path, tmp_path: Path) -> None:
    b = write(tmp_path / "b", ONES, G, 1, 3, at={"tp": 1})
    assert refused(baseline, b) == (
        f"{b}: the files of ranks 0, 2 are not there; expected 3, one per rank; copy those of all "
        "machines together"
    )
    c = write(tmp_path / "c", ONES, G, 0, 2, at={"tp": 0})
    write(c, ONES, G, 1, 3, at={"tp": 1})
    assert refused(baseline, c) == (
        f"{c}: ranks 0 and 1 are not of one run (world: 2 and 3); expected the files of one run; "
        "record each to a folder of its own"
    )
    d = write(tmp_path / "d", ONES, G, 0, 2, at={"tp": 0})
    write(d, ONES, G, 1, 2, at={"dp": 0})
    assert refused(baseline, d) == (
        f"{d}: rank 0 has the axes tp, rank 1 dp; expected the same on every rank; see mesh= and "
        "at= of parity.record"
    )
    e = write(tmp_path / "e", ONES, G, 0, 2, at={"tp": 0})
    write(e, ONES, G, 1, 2, at={"tp": 0})
    assert refused(baseline, e) == (
        f"{e}: ranks 0 and 1 are both at tp=0; expected coordinates that differ; give all axes to "
        "parity.record, by mesh= or at="
    )


def test_nothing_in_common(baseline: Path, tmp_path: Path) -> None:
    b = write(tmp_path / "b", {"v": torch.ones(2)}, {"v": torch.ones(2)})
    assert refused(baseline, b) == (
        f"nothing was compared: no tensor has the same name in both. {baseline} has w, w, w; {b} "
        "has v, v, v; expected the same names; give parity.record a `rename`"
    )
    c = write(tmp_path / "c", ONES, G, steps=3)
    (c / "step0-rank0.safetensors").unlink()
    assert refused(baseline, c) == (
        f"nothing was compared: {baseline} has steps 0, {c} steps 1, 2; expected steps that both "
        "have; record the same ones (steps=)"
    )


def test_steps_that_one_alone_has_are_named(baseline: Path, tmp_path: Path) -> None:
    b = write(tmp_path / "b", ONES, G, 0, 2, steps=3, at={"tp": 0})
    write(b, ONES, G, 1, 2, steps=2, at={"tp": 1})  # it crashed
    said = text(compare(baseline, b))
    assert f"not compared: step 2 of {b}, which ranks 1 did not record" in said
    assert f"not compared: steps 1, which only {b} has" in said


def test_nudged_recordings_that_are_none(baseline: Path, tmp_path: Path) -> None:
    b = write(tmp_path / "b", ONES, G)
    moved = [write(tmp_path / str(i), ONES, G, nudge=i) for i in range(1, 5)]
    assert refused(moved[0], b) == (
        f"{moved[0]}: the baseline was recorded with nudge 1; expected one that was not moved; "
        "record it without PARITY_NUDGE, or give it by --nudged"
    )
    same = write(tmp_path / "same", ONES, G, nudge=2)
    assert refused(baseline, b, *moved[:3], same) == (
        f"--nudged {same}: nudge 2, as {moved[1]}; expected another number for each; record it "
        "with PARITY_NUDGE=4"
    )
    plain = write(tmp_path / "plain", ONES, G)
    assert refused(baseline, b, *moved[:3], plain) == (
        f"--nudged {plain}: it was recorded with nudge 0; expected a recording of the baseline "
        "that was moved; record it with PARITY_NUDGE=1 (and 2, 3, ...)"
    )
    assert refused(baseline, b, *moved[:3]).startswith(
        "--nudged: 3 recordings; expected an even number, 4 or more (with 4 the bound is "
    )
    short = write(tmp_path / "short", ONES, G, nudge=6)
    (short / "step0-rank0.safetensors").rename(short / "step1-rank0.safetensors")
    assert refused(baseline, b, *moved[:3], short).startswith(
        f"--nudged {short}: it does not have what the baseline has of step 0; expected recordings"
    )
    other = write(tmp_path / "other", {"v": torch.ones(2)}, nudge=5)
    assert refused(baseline, b, *moved[:3], other) == (
        f"--nudged {other}: it does not have what the baseline has of step 0; expected recordings "
        "of one and the same program; record it anew"
    )


Break = Callable[[Path], None]


def header(folder: Path, **changes: Any) -> None:
    path = folder / "rank0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def metadata(folder: Path, said: object, **tensors: Tensor) -> None:
    path = folder / "step0-rank0.safetensors"
    save_file(tensors, path, metadata={"parity": json.dumps(said)})


RECORD = {
    "check": "state",
    "name": "w",
    "dtype": "float32",
    "size": [2],
    "shape": [2],
    "offset": [0],
    "cut": None,
    "total": [],
    "mean": [],
    "norm": 1.0,
}


def step(*records: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {"schema": 1, "step": 0, "rank": 0, "records": list(records), **changes}


BROKEN: dict[str, tuple[Break, str]] = {
    "no JSON": (lambda f: (f / "rank0.json").write_text("{") and None, "Invalid JSON"),
    "another schema": (lambda f: header(f, schema=2), "schema: Input should be 1"),
    "a key too many": (lambda f: header(f, more=1), "more: Extra inputs are not permitted"),
    "a rank that is none": (lambda f: header(f, rank=-1), "rank: Input should be greater than"),
    "cut short": (
        lambda f: (p := f / "step0-rank0.safetensors").write_bytes(p.read_bytes()[:-9]) and None,
        "Error while deserializing header",
    ),
    "a pickle": (
        lambda f: torch.save({"w": 1}, f / "step0-rank0.safetensors"),
        "Error while deserializing header",
    ),
    "of another program": (
        lambda f: save_file({"w": torch.ones(2)}, f / "step0-rank0.safetensors"),
        "Invalid JSON",
    ),
    "renamed": (lambda f: metadata(f, step(rank=3)), "it is of step 0, rank 3"),
    "no such tensor": (lambda f: metadata(f, step(RECORD)), "tensor 0, state of w, is not in it"),
    "of another size": (
        lambda f: metadata(f, step(RECORD), **{"0": torch.ones(3)}),
        "w is said to be of [2], and is of [3]",
    ),
    "nowhere": (
        lambda f: metadata(f, step({**RECORD, "offset": None}), **{"0": torch.ones(2)}),
        "w has a place that is none: None in [2]",
    ),
    "no dtype": (
        lambda f: metadata(f, step({**RECORD, "dtype": "nn"}), **{"0": torch.ones(2)}),
        "w has a dtype 'nn' that torch does not know",
    ),
    "cut where it is not": (
        lambda f: metadata(f, step({**RECORD, "cut": {"1": ["tp"]}}), **{"0": torch.ones(2)}),
        "w is cut along a dimension that it does not have",
    ),
}


@pytest.mark.parametrize(("break_it", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_or_foreign_file_is_named(
    break_it: Break, said: str, baseline: Path, tmp_path: Path
) -> None:
    b = write(tmp_path / "b", ONES, G)
    break_it(b)
    message = refused(baseline, b)
    assert len(message.splitlines()) == 1
    assert f"it is broken, or nothing that parity.record of this version wrote ({said}" in message
    assert message.startswith((str(b / "rank0.json"), str(b / "step0-rank0")))
    assert message.endswith("expected a file as it was written; copy it again, or record anew")


@pytest.mark.parametrize(("factor", "code"), [(1.0, 3), (0.9, 3), (0.1, 1)])
def test_what_cannot_be_judged_is_no_agreement(factor: float, code: int, tmp_path: Path) -> None:
    """In bfloat16, without nudged recordings, a tenth too little would pass."""
    ones = {"w": torch.ones(6, 4, dtype=torch.bfloat16)}
    slope = {"w": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()}
    a = write(tmp_path / "a", ones, slope, has_state=False)
    b = write(tmp_path / "b", ones, {"w": slope["w"] * factor}, has_state=False)
    report = compare(a, b)
    assert report.exit_code == code
    assert report.is_undecided
    undecided = (
        f"UNDECIDED  {b} against {a}: of most gradients nothing can be said in this precision"
    )
    assert text(report).splitlines()[-1].startswith(undecided if code == 3 else "FAIL")
