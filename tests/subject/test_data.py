"""What modules are called with: by name, in structures, and whole where the user says so."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import parity
from parity.errors import TraceError
from parity.subject.check import Differs, TestCase


class Attends(nn.Module):
    """Rows of tokens, of which a mask hides some, with a table of positions from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, *, mask: Tensor, table: Tensor) -> Tensor:
        x = self.tokens(ids) + table
        y = F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None, :])
        result: Tensor = self.out(y)
        return result


def loaded(full: dict[str, Tensor], module: nn.Module) -> nn.Module:
    module.load_state_dict(full)
    return module


def by_name() -> dict[str, Tensor]:
    mask = torch.rand(4, 6) < 0.7
    mask[:, 0] = True
    return {"ids": torch.randint(11, (4, 6)), "mask": mask, "table": torch.randn(6, 8)}


def test_by_name_and_one_of_them_whole(case: Callable[..., TestCase]) -> None:
    result = case(dp=2).check(
        Attends,
        lambda full, mesh: DistributedDataParallel(loaded(full, Attends())),
        by_name(),
        data={"dp": 0},
        whole=["table"],
        targets=[torch.randn(4, 6, 8)],
        loss=F.mse_loss,
    )
    assert result.status == "pass"


def test_gradients_of_inputs_have_their_names_but_for_the_whole_ones(
    case: Callable[..., TestCase],
) -> None:
    def summed(full: Any, mesh: Any) -> nn.Module:
        model = loaded(full, Attends())
        for p in model.parameters():
            p.register_hook(lambda g: _averaged(g, mesh["dp"].get_group()))
        return model

    result = case(dp=2).check(Attends, summed, by_name(), data={"dp": 0}, whole=["table"])
    names = [v.key.name for v in result.judged[0].verdicts if v.key.check == "gradient"]
    assert names == ["out.bias", "out.weight", "tokens.weight"]
    alone = case(tp=1).check(Attends, lambda full, _: loaded(full, Attends()), by_name())
    assert "input.table" in [v.key.name for v in alone.judged[0].verdicts]


def _averaged(gradient: Tensor, group: Any) -> Tensor:
    gradient = gradient.clone()
    torch.distributed.all_reduce(gradient, torch.distributed.ReduceOp.AVG, group=group)
    return gradient


def test_a_mask_of_another_rank_is_seen(case: Callable[..., TestCase]) -> None:
    class First(Attends):
        def forward(self, ids: Tensor, *, mask: Tensor, table: Tensor) -> Tensor:
            return super().forward(ids, mask=mask[:1].expand_as(mask), table=table)

    with pytest.raises(Differs, match="first divergence: forward of output"):
        case(dp=2).check(
            Attends,
            lambda full, mesh: DistributedDataParallel(loaded(full, First())),
            by_name(),
            data={"dp": 0},
            whole=["table"],
            targets=[torch.randn(4, 6, 8)],
            loss=F.mse_loss,
        )


def test_a_step_takes_names_after_targets(case: Callable[..., TestCase]) -> None:
    def step_of(full: Any, mesh: Any) -> parity.Program:
        model = DistributedDataParallel(loaded(full, Attends()))

        def step(target: Tensor, **inputs: Tensor) -> Tensor:
            y: Tensor = model(**inputs)
            F.mse_loss(y, target).backward()
            return y

        return parity.Program(model, step)

    case(dp=2).check(
        Attends,
        step_of,
        by_name(),
        data={"dp": 0},
        whole=["table"],
        targets=[torch.randn(4, 6, 8)],
        loss=F.mse_loss,
    )


def test_every_step_has_other_rows(case: Callable[..., TestCase]) -> None:
    """So that a step which keeps its first batch is seen."""

    def net() -> nn.Module:
        return nn.Linear(4, 4)

    def keeps(full: Any, mesh: Any) -> parity.Program:
        model, first = DistributedDataParallel(loaded(full, net())), []

        def step(x: Tensor, target: Tensor) -> Tensor:
            first.append(x)
            y: Tensor = model(first[0])
            F.mse_loss(y, target).backward()
            return y

        return parity.Program(model, step)

    def check(candidate: Any) -> None:
        case(dp=2).check(
            net,
            candidate,
            [torch.randn(8, 4)],
            targets=[torch.randn(8, 4)],
            loss=F.mse_loss,
            optimizer=torch.optim.AdamW,
            steps=3,
            data={"dp": 0},
        )

    check(lambda full, mesh: DistributedDataParallel(loaded(full, net())))
    with pytest.raises(Differs, match="first divergence: forward of step 2 of output"):
        check(keeps)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, pair: Pair) -> Tensor:
        result: Tensor = self.a(pair.x) * pair.y
        return result


def test_a_named_tuple_stays_one(case: Callable[..., TestCase]) -> None:
    pair = Pair(torch.randn(4, 4), torch.randn(4, 4))
    result = case(tp=1).check(Adds, lambda full, _: loaded(full, Adds()), [pair])
    assert result.status == "pass"


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.5, self.training)


def test_random_numbers_in_the_baseline_are_refused(case: Callable[..., TestCase]) -> None:
    with pytest.raises(TraceError) as caught:
        case(tp=1).check(Drops, lambda full, _: loaded(full, Drops()), [torch.randn(4, 4)])
    assert "leave out what is random (dropout: p=0) or seed it by run.seed alone" in str(
        caught.value
    )
    case(tp=1).check(
        lambda: Drops().eval(), lambda full, _: loaded(full, Drops()).eval(), [torch.randn(4, 4)]
    )


class Seeded(nn.Module):
    """Draws the same each time, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return self.a(x) * torch.rand(4, dtype=torch.float64).to(x.dtype)


def test_numbers_with_a_seed_of_their_own_are_not_random(case: Callable[..., TestCase]) -> None:
    case(tp=1).check(Seeded, lambda full, _: loaded(full, Seeded()), [torch.randn(4, 4)])


class Bag(nn.Module):
    """Its offsets must begin with 0 and ascend: other ones would be an error."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(11, 8, mode="sum"), nn.Linear(8, 4)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        assert offsets[0] == 0
        result: Tensor = self.out(self.bag(ids, offsets))
        return result


@pytest.mark.parametrize("whole", [["ids", "offsets"], []], ids=["whole", "cut"])
def test_inputs_that_must_stay_as_they_are(case: Callable[..., TestCase], whole: list[str]) -> None:
    """The second call, with other rows, is left out where the baseline cannot bear it."""
    inputs = {"ids": torch.randint(11, (12,)), "offsets": torch.tensor([0, 4, 7])}
    check = case(tp=1).check
    result = check(Bag, lambda full, _: loaded(full, Bag()), inputs, whole=whole)
    again = [v.key for v in result.judged[0].verdicts if v.key.name.endswith("in eval mode")]
    assert bool(again) == bool(whole)


class Named(OrderedDict[str, Tensor]):
    """As the outputs of transformers are."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, given: Named) -> Tensor:
        result: Tensor = self.a(given.x)
        return result


def test_a_mapping_stays_of_its_type(case: Callable[..., TestCase]) -> None:
    case(tp=1).check(Reads, lambda full, _: loaded(full, Reads()), [Named(x=torch.randn(4, 4))])


LISTED = (
    "inputs: expected a list of what the module is called with, as in [torch.randn(4)], or a dict"
)
PLACES = "whole='0': expected a list of places or names of inputs, as in [0]"
KEYS = "inputs: the keys of a dict are the names that the module takes them by"


@pytest.mark.parametrize(
    ("inputs", "whole", "said"),
    [
        ({"x": torch.randn(4)}, ["y"], "whole: there is no input 'y' (there are: 'x')"),
        ([torch.randn(4)], [1], "whole: there is no input 1 (there are: 0)"),
        (torch.randn(4), [], LISTED),
        ([torch.randn(4)], "0", PLACES),
        ({1: torch.randn(4)}, [], KEYS),
    ],
)
def test_what_cannot_be_meant_is_told(
    case: Callable[..., TestCase], inputs: Any, whole: Any, said: str
) -> None:
    with pytest.raises(parity.UsageError) as caught:
        case(tp=1).check(Adds, lambda full, _: loaded(full, Adds()), inputs, whole=whole)
    assert str(caught.value) == said
