"""parallelize_module unties a tied embedding: two parameters, each with a part of the gradient."""

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import parity


def tied():
    model = nn.Sequential(nn.Embedding(36, 8), nn.Linear(8, 36, bias=False))
    model[1].weight = model[0].weight
    return model


def parallel(full, mesh):
    model = tied()
    model.load_state_dict(full)
    head = ColwiseParallel(output_layouts=Replicate())
    plan = {"0": RowwiseParallel(input_layouts=Replicate()), "1": head}
    return parallelize_module(model, mesh, plan)


@parity.matrix(tp=[1, 2])
def check_tied_weights(case):
    case.check(tied, parallel, [torch.randint(36, (3, 5))])


WRONG = "gradient of 0.weight"
WORDS = ("tied no more",)
