"""The executor: runs one stage's list of actions, forward and backward, against its neighbours.

Per microbatch a stage keeps what it took in and what it put out, from F to B. Sends never block
(comm.py), so whatever `schedule.simulate` accepts runs to its end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from heiretsu.comm import StageLink
from heiretsu.model import GPT
from heiretsu.schedule import Action

Loss = Callable[[Tensor, int], Tensor]  # (what the last stage puts out, microbatch) -> scalar


class Executor:
    """Runs actions on `model`. `tokens` holds the microbatches (b, T) of this rank; `loss` is
    asked on the last stage only. Gradients accumulate in the parameters.
    """

    def __init__(self, model: GPT, tokens: list[Tensor], loss: Loss) -> None:
        self.model, self.tokens, self.loss = model, tokens, loss
        self.mesh, self.stage = model.mesh, model.mesh.at.pp
        self.dtype = next(model.parameters()).dtype
        self.link = StageLink(model.mesh)
        self.alive: dict[int, tuple[Tensor, Tensor]] = {}
        self.losses: list[Tensor] = []

    def run(self, actions: list[Action]) -> list[Tensor]:
        """The losses of the microbatches, in order of their forwards; empty off the last stage."""
        for op, mb in actions:
            if op == "F":
                self.forward(mb)
            else:
                self.backward(mb)
        assert not self.alive, f"no backward for microbatches {sorted(self.alive)}"
        self.link.flush()
        return self.losses

    def forward(self, mb: int) -> None:
        x = self.tokens[mb]
        if not self.mesh.is_first_stage:
            shape = (*x.shape, self.model.config.d_model)
            x = self.link.receive(shape, self.dtype, self.stage - 1).requires_grad_()
        y = self.model(x)
        if self.mesh.is_last_stage:
            y = self.loss(y, mb)
            self.losses.append(y.detach())
        else:
            self.link.send(y.detach(), self.stage + 1)
        self.alive[mb] = x, y

    def backward(self, mb: int) -> None:
        x, y = self.alive.pop(mb)
        if self.mesh.is_last_stage:
            torch.autograd.backward(y)
        else:
            grad = self.link.receive(tuple(y.shape), self.dtype, self.stage + 1)
            torch.autograd.backward(y, grad)
        if not self.mesh.is_first_stage:
            assert x.grad is not None
            self.link.send(x.grad, self.stage - 1)
