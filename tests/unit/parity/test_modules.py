"""Modules are recorded without being touched; a mask puts right what was recorded as wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parity import Trace, record_modules
from parity.modules import Placed, Seen
from parity.trace import Key, load_masks, save_masks


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 2))).double()


@pytest.fixture(autouse=True)
def no_masks() -> Iterator[None]:
    yield
    Trace.masks = {}


def records(trace: Trace) -> dict[tuple[str, str], Tensor]:
    return {
        (box.key.check, box.key.name): t for box, t in zip(trace.boxes, trace.tensors, strict=True)
    }


def test_what_modules_take_in_and_put_out_is_recorded(model: nn.Module) -> None:
    trace, x = Trace(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with record_modules(trace, model):
        y = model(x)
        y.square().sum().backward()
    model(x)  # nothing is recorded any more
    found = records(trace)
    assert list(name for check, name in found if check == "activation") == [
        "input of the model",
        "input of 0",
        "output of 0",
        "input of 1",
        "input of 1.0",
        "output of 1.0",
        "input of 1.1",
        "output of 1.1",
        "output of 1",
        "output of the model",
    ]
    assert torch.equal(found["activation", "output of 0"], model[0](x))  # type: ignore[operator]
    assert torch.equal(found["backward", "output of the model"], 2 * y)
    assert x.grad is not None
    assert torch.equal(found["backward", "input of the model"], x.grad)
    assert next(name for check, name in found if check == "backward") == "output of 1.1"


def test_pieces_lie_where_the_caller_says(model: nn.Module) -> None:
    def place(seen: Seen) -> Placed | None:
        if seen.path != "0" or seen.is_input:
            return None
        halves = [(0, 0), (3, 4)]  # where in the piece, where in the whole
        return Placed(
            (6, 7),
            [
                ((2 * seen.call, column), partial(Tensor.narrow, dim=1, start=own, length=3))
                for own, column in halves
            ],
        )

    trace = Trace(at={"tp": 1})
    xs = [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]
    with record_modules(trace, model, place):
        for x in xs:
            model(x).sum().backward()
    offsets = [box.offset for box in trace.boxes if box.key.check == "activation"]
    assert offsets == [(0, 0), (0, 4), (2, 0), (2, 4), (4, 0), (4, 4)]
    assert {box.shape for box in trace.boxes} == {(6, 7)}
    assert torch.equal(trace.tensors[1], model[0](xs[0])[:, 3:])  # type: ignore[operator]


def test_a_mask_takes_the_place_of_what_was_recorded(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    right = torch.randn(3, 6, dtype=torch.float64)
    slope = torch.randn(3, 6, dtype=torch.float64)
    masks = {
        Key("activation", "output of 0"): right,
        Key("backward", "output of 0"): slope,
        Key("gradient", "0.bias"): torch.zeros(6, dtype=torch.float64),
    }
    save_masks(masks, tmp_path / "masks")
    Trace.masks = load_masks(tmp_path / "masks")
    assert Trace.masks.keys() == masks.keys()
    trace = Trace()
    with record_modules(trace, model):
        y = model(x)
        y.sum().backward()
    found = records(trace)
    linear: nn.Linear = model[0]  # type: ignore[index, assignment]
    assert torch.equal(found["activation", "output of 0"], linear(x))  # as it was
    assert torch.equal(y, model[1](right))  # type: ignore[index, operator]
    assert linear.weight.grad is not None
    assert linear.bias.grad is not None
    assert torch.allclose(linear.weight.grad, slope.T @ x)
    before = linear.bias.grad.clone()
    trace.add("gradient", "0.bias", linear.bias.grad)
    assert torch.equal(trace.tensors[-1], before)
    assert not linear.bias.grad.any()


def test_a_mask_fits_a_piece() -> None:
    Trace.masks = {Key("gradient", "w"): torch.arange(6.0).view(3, 2)}
    piece = torch.zeros(2, 1)
    Trace().add("gradient", "w", piece, shape=(3, 2), offset=(1, 1))
    assert piece.tolist() == [[3.0], [5.0]]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_computed_again_is_put_right_again(use_reentrant: bool) -> None:
    """A checkpointed part runs twice: it is recorded once, and goes on from what is right twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, 4, dtype=torch.float64)
    Trace.masks = {Key("activation", "output of 1"): right}
    trace = Trace()
    with record_modules(trace, model):
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    names = [box.key.name for box in trace.boxes if box.key.check == "activation"]
    assert sorted(names) == sorted(set(names))
    assert "output of 2" in names
    gradients = [box.key.name for box in trace.boxes if box.key.check == "backward"]
    assert sorted(gradients) == sorted(set(gradients))
    assert "input of 2" in gradients
    weight = model[2].weight
    assert isinstance(weight, nn.Parameter)
    torch.testing.assert_close(weight.grad, right.sum(0).expand(4, 4))


class _Halves(torch.autograd.Function):
    """Works in place on the gradient that it is given, which others may have too: a mistake."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope.mul_(0.5)


class _Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Halves.apply(x)  # type: ignore[no-any-return]


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Inner()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_recording_does_not_hide_what_is_done_in_place() -> None:
    def gradient(model: nn.Module, context: AbstractContextManager[Any]) -> Tensor:
        x = torch.ones(3, requires_grad=True)
        with context:
            model(x).mul(4.0).sum().backward()
        assert x.grad is not None
        return x.grad

    plain = gradient(_Residual(), nullcontext())
    assert plain.tolist() != [6.0] * 3  # what it would be if the residual had its own
    model = _Residual()
    assert gradient(model, record_modules(Trace(), model)).equal(plain)


class _Forces(nn.Module):
    """Puts out the slope of what is in it: a gradient is taken in the forward, and one of that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)
        return slope


class _Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.inner)(x)


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.eye(2).to_sparse()) @ x


@pytest.mark.parametrize(
    "model",
    [_Forces(), _Mapped(), _Sparse(), nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))],
    ids=["forces", "vmap", "sparse", "inplace"],
)
@pytest.mark.parametrize("is_sound", [None, lambda gradient, of: True])
def test_recording_changes_nothing(model: nn.Module, is_sound: Any) -> None:
    def gradients(context: AbstractContextManager[Any]) -> list[Tensor]:
        x = torch.arange(6.0).view(2, 3).requires_grad_()
        model.zero_grad()
        with context:
            model(x).square().sum().backward()
        return [p.grad for p in (x, *model.parameters()) if p.grad is not None]

    plain, trace = gradients(nullcontext()), Trace()
    recorded = gradients(record_modules(trace, model, is_sound=is_sound))
    assert all(a.equal(b) for a, b in zip(plain, recorded, strict=True))
    names = {box.key.name for box in trace.boxes if box.key.check == "backward"}
    assert "output of the model" in names
    if isinstance(model, nn.Sequential):
        assert "input of 1" in names or "output of 0" in names
