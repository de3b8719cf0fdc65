"""How a recipe moves the weights: its optimizers, its schedule, and the average of the weights on the way."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from lenet.model import LeNet
from lenet.recipe import Recipe

# Of the recipe's rate, for what Muon is not made for: biases, and the last layer, whose rows are the classes.
ADAMW_LR = 0.15
ADAMW_BETAS = (0.9, 0.98)
NO_GRADIENT = "the parameter has no gradient to go by; make it by flatten"


class Sgd:
    """`torch.optim.SGD` of one parameter, with Nesterov's momentum, number for number.

    Torch's own class imports its compiler at the first step: 1.3 s of a core, in every worker, before it trains.
    """

    def __init__(self, flat: nn.Parameter, lr: float, momentum: float, weight_decay: float) -> None:
        if flat.grad is None:
            raise ValueError(NO_GRADIENT)
        self.flat, self.gradient, self.momentum, self.weight_decay = flat, flat.grad, momentum, weight_decay
        self.param_groups: list[dict[str, Any]] = [{"lr": lr}]
        self.buffers: list[Tensor | None] = [None]

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameter by its gradient."""
        sgd(
            [self.flat],
            [self.gradient],
            self.buffers,
            foreach=False,
            lr=self.param_groups[0]["lr"],
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            dampening=0,
            weight_decay=self.weight_decay,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.SGD` has it."""
        [buffer] = self.buffers
        return {
            "state": {} if buffer is None else {0: {"momentum_buffer": buffer}},
            "param_groups": self.param_groups,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        buffer = state_dict["state"].get(0, {}).get("momentum_buffer")
        self.buffers = [None if buffer is None else buffer.to(self.flat).clone()]


class Optimization:
    """Updates `flat`, which is what `flatten` made of the model, from its gradient.

    `average`, float (parameters,), is the moving average of the weights, for recipes with one. All of the state is in
    `optimizers` and `average`: the rest follows from the number of the step.
    """

    def __init__(self, recipe: Recipe, model: LeNet, flat: nn.Parameter, steps: int) -> None:
        self.recipe, self.flat, self.steps = recipe, flat, steps
        self.optimizers: Sequence[torch.optim.Optimizer | Sgd] = (
            _muon(recipe, model, flat)
            if recipe.optimizer == "muon"
            else [Sgd(flat, recipe.lr, recipe.momentum, recipe.weight_decay)]
        )
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.average: Tensor | None = flat.detach().clone() if recipe.averaging else None

    def step(self, number: int) -> None:
        """Do update `number`, counted from 0 over all epochs, with the gradient as it is."""
        rate = self.recipe.lr_at(number, self.steps)
        for optimizer, lr in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
        if self.average is not None:
            # The first steps leave little behind in the average: it forgets faster while it is young.
            decay = min(self.recipe.averaging, (number + 1) / (number + 10))
            self.average.lerp_(self.flat.detach(), 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averaged weights for the time of the block, if the recipe averages."""
        if self.average is None:
            yield
            return
        kept = self.flat.detach().clone()
        self.flat.data.copy_(self.average)
        try:
            yield
        finally:
            self.flat.data.copy_(kept)


def _muon(recipe: Recipe, model: LeNet, flat: nn.Parameter) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, a filter bank being one with a row for each filter; AdamW for the rest."""
    if flat.grad is None:
        raise ValueError(NO_GRADIENT)
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    parts = zip(parameters, torch.split(flat.detach(), sizes), torch.split(flat.grad, sizes), strict=True)
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter, data, gradient in parts:
        # The order in which memory has a row's elements, whatever it is, is of no consequence.
        rows = nn.Parameter(data.view(parameter.shape[0], -1))
        rows.grad = gradient.view_as(rows)
        (matrices if parameter.ndim > 1 and parameter is not model.fc3.weight else rest).append(rows)
    return [
        torch.optim.Muon(matrices, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.lr * ADAMW_LR, betas=ADAMW_BETAS, weight_decay=0),
    ]
