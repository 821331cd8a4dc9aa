"""Features of a module are placed as the parameters that make them are, however they are cut."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from parity.modules import Seen
from parity.subject.alignment import Held, Wholes, align
from parity.subject.features import features_of
from parity.subject.places import Places
from parity.subject.placing import Axes

PATHS = {"mine": "net"}


def kept(model: nn.Module, own: Mapping[str, Tensor], name: str, dim: int) -> list[Held]:
    """Alignment of what keeps, of the whole `net.{name}`, elements `own[name]` along `dim`."""

    def build(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"mine.{name}": full[f"net.{name}"].index_select(dim, own[name])}

    full = model.state_dict()
    return align(build, full, Wholes(full))


@st.composite
def indices(draw: st.DrawFn) -> tuple[int, Tensor]:
    """How many there are, and which of them a rank has, in its order: slices of a few blocks."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=6))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    blocks = [torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)]
    chosen = draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))
    return sum(sizes), torch.cat([blocks[i] for i in chosen[: len(sizes) - 1]])


def net(width: int, out: int) -> nn.Module:
    return nn.ModuleDict({"net": nn.Linear(width, out, dtype=torch.float64)})


@given(indices(), st.booleans(), st.integers(1, 2))
def test_pieces_lie_where_the_parameters_say(
    drawn: tuple[int, Tensor], is_input: bool, rows: int
) -> None:
    size, own = drawn
    model = net(size, 3) if is_input else net(3, size)
    held = kept(model, {"weight": own}, "weight", int(is_input))
    features = features_of(held, PATHS, model)
    name = "input of net" if is_input else "output of net"
    axes = Axes({"dp": 2, "tp": 2}, {"dp": 1, "tp": 0})
    shapes = {("activation", name): (2 * rows, size)}
    whole = torch.randn(2 * rows, size)
    placed = Places(axes, shapes, {0: "dp"}, features=features).of_seen(
        Seen("net", is_input, 0, whole[rows:, own])
    )
    assert placed is not None
    told = torch.full_like(whole, torch.nan)
    for (i, j), part in placed.boxes:
        piece = part(whole[rows:, own])
        told[i : i + len(piece), j : j + piece.shape[1]] = piece
    assert told[rows:, own].equal(whole[rows:, own])
    assert told.isnan().sum() == whole.numel() - rows * len(own)


def test_whoever_has_all_features_is_not_asked() -> None:
    model = net(2, 6)
    held = kept(model, {"weight": torch.tensor([0, 1, 4])}, "weight", 0)
    places = Places(
        Axes({"tp": 2}, {"tp": 1}),
        {("activation", "output of net"): (4, 6)},
        features=features_of(held, PATHS, model),
    )
    gathered = places.of_seen(Seen("net", False, 0, torch.ones(4, 6)))
    assert gathered is not None
    assert [offset for offset, _ in gathered.boxes] == [(0, 0)]
    elsewhere = places.of_seen(Seen("net", False, 1, torch.ones(4, 3)))
    assert elsewhere is None  # it was called before


def test_a_weight_that_is_kept_in_another_order_says_nothing() -> None:
    model = net(3, 4)

    def build(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mine.weight": full["net.weight"][:2].T}

    full = model.state_dict()
    held = align(build, full, Wholes(full))
    assert features_of(held, PATHS, model) == {}


def test_a_bias_tells_it_where_no_weight_does() -> None:
    model = net(3, 6)
    held = kept(model, {"bias": torch.tensor([4, 5, 0])}, "bias", 0)
    found = features_of(held, PATHS, model)
    assert found == {("net", False): [(0, 2, 1), (4, 0, 2)]}


def test_what_is_held_twice_has_no_one_place() -> None:
    model = net(3, 4)
    held = kept(model, {"weight": torch.tensor([0, 1, 1])}, "weight", 0)
    assert features_of(held, PATHS, model) == {("net", True): [(0, 0, 3)]}


@pytest.mark.parametrize(
    "module", [nn.Conv1d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)], ids=lambda m: str(m)[:6]
)
def test_channels_are_not_the_last_dim(module: nn.Module) -> None:
    model = nn.ModuleDict({"net": module.double()})
    held = kept(model, {"bias": torch.tensor([2, 3])}, "bias", 0)
    assert features_of(held, PATHS, model) == {}
