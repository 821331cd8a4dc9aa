"""parallelize_module: a plan says which linear layers are cut, and how."""

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard  # noqa: F401 (a mistake uses it)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import parity
from tests.subjects.models import GPT, WIDTH, Block, adamw, tokens


def tp(full, mesh):
    model = Block()
    model.load_state_dict(full)
    plan = {"attn.[qkv]": ColwiseParallel(), "attn.out": RowwiseParallel()}
    plan |= {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


@parity.matrix(tp=[1, 2, 3, 4])
def check_tp(case):
    """`parallelize_module`: attention and MLP."""
    case.check(Block, tp, [torch.randn(3, 5, WIDTH)])


def vocabulary(full, mesh):
    model = GPT()
    model.load_state_dict(full)
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    plan = {"embed": RowwiseParallel(input_layouts=Replicate()), "head": head}
    return parallelize_module(model, mesh, plan)


@parity.matrix(tp=[1, 2, 3, 4])
def check_vocabulary(case):
    """`parallelize_module`: embedding and head cut over the vocabulary, logits a DTensor."""
    case.check(GPT, vocabulary, [tokens()])


def sequence(full, mesh):
    model, cut, whole = GPT(), Shard(1), Replicate()
    model.load_state_dict(full)
    plan = {"embed": RowwiseParallel(input_layouts=whole, output_layouts=cut)}
    plan |= {"blocks.*.norm*": SequenceParallel(), "norm": SequenceParallel()}
    plan["blocks.*.[am]*"] = PrepareModuleInput(input_layouts=cut, desired_input_layouts=whole)
    plan |= {"blocks.*.*.[qkvu]*": ColwiseParallel(), "head": ColwiseParallel(output_layouts=whole)}
    plan["blocks.*.*.[od]*"] = RowwiseParallel(output_layouts=cut)
    return parallelize_module(model, mesh, plan)


@parity.matrix(tp=[1, 2, 3, 4])
def check_sequence(case):
    """`parallelize_module`: a GPT with sequence parallelism."""
    case.check(GPT, sequence, [tokens()])


def fsdp_tp(full, mesh):
    model = Block()
    model.load_state_dict(full)
    plan = {"attn.[qkv]": ColwiseParallel(), "attn.out": RowwiseParallel()}
    plan |= {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model.attn, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


@parity.matrix(dp=[1, 2], tp=[1, 2])
def check_fsdp_tp(case):
    """FSDP2 over tensor parallelism, AdamW."""
    x = torch.randn(4, 5, WIDTH)
    case.check(Block, fsdp_tp, [x], data={"dp": 0}, optimizer=adamw, steps=3)
