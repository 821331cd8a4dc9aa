"""loss_parallel makes the gradient of log_softmax the identity, for a second term of a loss too."""

import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.nn.functional import log_softmax, nll_loss

import parity


def model():
    return nn.Sequential(nn.Embedding(36, 8), nn.Linear(8, 36))


def loss(logits, t):
    logs = log_softmax(logits.flatten(0, 1), -1)
    return nll_loss(logs, t.flatten()) + 0.1 * logs.square().mean()


def parallel(full, mesh):
    whole = model()
    whole.load_state_dict(full)
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    whole = parallelize_module(whole, mesh, {"1": head})

    def step(x, t):
        with loss_parallel():
            loss(logits := whole(x), t).backward()
        return logits

    return parity.Program(whole, step)


@parity.matrix(tp=[1, 2])
def check_loss_parallel(case):
    x, t = torch.randint(36, (2, 3, 5))
    case.check(model, parallel, [x], targets=[t], loss=loss)


WRONG = "gradient of 1.bias"
WORDS = ()
