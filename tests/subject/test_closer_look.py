"""What a closer look records of modules: nothing that a right candidate would have otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import parity
from parity.diagnose import diagnose
from parity.evidence import Evidence
from parity.modules import record_modules
from parity.subject.alignment import Box, Held, Part
from parity.subject.check import Differs, TestCase
from parity.subject.paths import paths_of
from parity.subject.program import make_generic
from parity.trace import Key, Piece, Trace
from parity.whole import join


def test_constants_get_the_same_values_in_every_dtype() -> None:
    norms = []
    for dtype in (torch.float32, torch.float64):
        norm = nn.LayerNorm(5)
        torch.set_default_dtype(dtype)
        try:
            make_generic(norm, torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)
        norms.append(norm)
    assert len(norms[0].weight.unique()) == 5
    assert norms[0].weight.equal(norms[1].weight)
    assert norms[0].bias.equal(norms[1].bias)


def held(name: str, whole: str) -> Held:
    return Held(name, (1,), [Part(whole, (1,), [Box((0,), torch.zeros(1, dtype=torch.long))])])


def test_a_wrapper_is_the_model_and_a_wrapped_stage_is_not() -> None:
    wrapped = [held("module.0.weight", "0.weight"), held("module.1.weight", "1.weight")]
    assert paths_of(wrapped, is_whole=True) == {"module": "", "module.0": "0", "module.1": "1"}
    assert paths_of(wrapped, is_whole=False) == {"module.0": "0", "module.1": "1"}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)


def gradients(**more: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, trace = Both(), Trace()
    x = torch.randn(2, 3, requires_grad=True)
    with record_modules(trace, model, **more):  # type: ignore[arg-type]
        model(x).sum().backward()
    whole = x.grad
    assert whole is not None
    records = zip(trace.boxes, trace.tensors, strict=True)
    found = {box.key.name: t for box, t in records if box.key.check == "backward"}
    ones = torch.ones(2, 3)
    return {**found, "a": ones @ model.a.weight, "b": ones @ model.b.weight, "whole": whole}


def test_the_gradient_of_an_input_may_be_what_its_module_adds() -> None:
    apart = gradients(is_sound=lambda gradient, of: True)
    torch.testing.assert_close(apart["input of a"], apart["a"])
    torch.testing.assert_close(apart["input of b"], apart["b"])
    torch.testing.assert_close(apart["whole"], apart["a"] + apart["b"])
    together = gradients()
    torch.testing.assert_close(together["input of a"], together["whole"])


def test_what_is_not_sound_is_not_recorded() -> None:
    assert "input of a" not in gradients(is_sound=lambda gradient, of: False)


def test_a_tied_weight_that_is_tied_no_more_is_named() -> None:
    want = torch.randn(4, 2, dtype=torch.float64)
    pieces = [Piece(0, (0, 0), want * 0.25), Piece(0, (0, 0), want * 0.75)]
    [finding] = join(pieces, [(4, 2), (4, 2)]).findings
    assert finding.text.startswith("rank 0 holds two copies that differ")
    e = Evidence(
        Key("gradient", "embed.weight"),
        pieces[0].tensor,
        want,
        pieces=pieces,
        at=[{"tp": 0}],
        axes={"tp": 1},
    )
    assert diagnose(e)[0].kind == "untied"
    shared = [Piece(rank, (0, 0), want * part) for rank, part in enumerate((0.25, 0.75))]
    e = e._replace(pieces=shared, at=[{"tp": 0}, {"tp": 1}], axes={"tp": 2})
    assert diagnose(e)[0].kind == "not reduced"


def siblings() -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


def scaled(full: Any, mesh: Any) -> nn.Module:
    """Another mistake in the gradient of each child's bias."""
    model = siblings()
    model.load_state_dict(full)
    factors = {"0.bias": 3.0, "1.weight": -1.0, "2.bias": 5.0}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: g * factors.get(name, 1.0))
    return model


def test_children_of_one_module_are_not_layers_of_a_kind() -> None:
    torch.manual_seed(0)
    with pytest.raises(Differs) as caught:
        TestCase(parity.Case({"tp": 1})).check(siblings, scaled, [torch.randn(4, 4)])
    for name in ("0.bias", "1.weight", "2.bias"):
        assert f": gradient of {name}\n" in str(caught.value)
