"""How a recipe moves the weights: its optimizers, its schedule, and the average of the weights on the way."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from lenet.model import LeNet
from lenet.recipe import Recipe
from lenet.step import record

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


class Muon(torch.optim.Muon):
    """Torch's, of matrices that are views of one tensor. Ranks that share memory can deal its work out among them.

    On a CPU core a step of LeNet's takes 1.1 ms, where the gradient of a rank's 64 images takes 1.0 ms.
    """

    others: Sequence[tuple[Tensor, Tensor]] = ()
    whole: Callable[[], None] | None = None

    def deal(self, flat: Tensor, rank: int, ranks: int, add_up: Callable[[Tensor], object]) -> None:
        """Leave to each of so many ranks a part of the matrices, all of which have the same gradients.

        `flat`, float32 (parameters,), is what the matrices are views of, and `add_up` replaces such a tensor by the sum
        of all ranks' in it. To the bit what each would have computed alone: nothing but zeros is added to a number.
        """
        matrices = self.param_groups[0]["params"]
        mine = dealt([min(p.shape) ** 2 * (2 * max(p.shape) + min(p.shape)) for p in matrices], ranks)[rank]
        known, moved = torch.full_like(flat, rank == 0), torch.empty_like(flat)
        for index, p in enumerate(matrices):
            known[p.storage_offset() :][: p.numel()] = index in mine
        left = [p for index, p in enumerate(matrices) if index not in mine]
        self.others = [(p, p.grad) for p in left]
        for p in left:
            p.grad = None  # torch's step passes over it
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

        def whole() -> None:
            add_up(torch.mul(flat, known, out=moved))
            flat.copy_(moved)

        self.whole = whole

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move all matrices by their gradients."""
        group = self.param_groups[0]
        for p, gradient in self.others:  # a checkpoint is of one rank, and the next start may deal otherwise
            self.state[p]["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        super().step()  # type: ignore[no-untyped-call]
        if self.whole:
            self.whole()


def dealt(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """What to leave to each of so many ranks: the dearest first, to whoever has least to do (Graham, 1969)."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        min(hands, key=lambda hand: sum(costs[held] for held in hand)).append(index)
    return hands


class Recorded:
    """The step of optimizers on a CUDA device as a graph: Muon is hundreds of small kernels, 3 ms to launch one by one.

    A recording keeps the rates that it was made with. But each optimizer moves the weights by its rate times what does
    not depend on the rate, so to go a part of the way is to have that part of the rate.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], flat: nn.Parameter) -> None:
        self.optimizers, self.flat = optimizers, flat.detach()
        self.before = torch.empty_like(self.flat)
        self.graph: torch.cuda.CUDAGraph | None = None
        for optimizer in optimizers:
            optimizer.register_load_state_dict_post_hook(self._forget)

    def step(self, part: float) -> None:
        """Move the weights, at this part of the optimizers' rates."""
        if self.graph is None:
            self.graph = self._record()
        self.graph.replay()
        torch.lerp(self.before, self.flat, part, out=self.flat)

    def _record(self) -> torch.cuda.CUDAGraph:
        weights = self.flat.clone()
        kept = [(tensor, tensor.clone()) for tensor in self._state()]
        graph, _ = record(self._whole_step)
        # The step that recording takes is undone. What it brought into being begins at zero.
        for tensor in self._state():
            tensor.zero_()
        for tensor, value in [(self.flat, weights), *kept]:
            tensor.copy_(value)
        return graph

    def _whole_step(self) -> None:
        self.before.copy_(self.flat)
        for optimizer in self.optimizers:
            optimizer.step()

    def _state(self) -> list[Tensor]:
        return [
            value for optimizer in self.optimizers for slots in optimizer.state.values() for value in slots.values()
        ]

    def _forget(self, _: torch.optim.Optimizer) -> None:
        self.graph = None


class Optimization:
    """Updates `flat`, which is what `flatten` made of the model, from its gradient.

    `average`, float (parameters,), is the moving average of the weights, for recipes with one. All of the state is in
    `optimizers` and `average`: the rest follows from the number of the step.
    """

    def __init__(self, recipe: Recipe, model: LeNet, flat: nn.Parameter, steps: int) -> None:
        self.recipe, self.flat, self.steps = recipe, flat, steps
        self.optimizers: Sequence[torch.optim.Optimizer | Sgd]
        self.recorded: Recorded | None = None
        if recipe.optimizer == "muon":
            self.optimizers = both = _muon(recipe, model, flat)
            self.recorded = Recorded(both, flat) if flat.is_cuda else None
        else:
            self.optimizers = [Sgd(flat, recipe.lr, recipe.momentum, recipe.weight_decay)]
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.average: Tensor | None = flat.detach().clone() if recipe.averaging else None

    def deal(self, rank: int, ranks: int, add_up: Callable[[Tensor], object]) -> None:
        """Deal Muon's work, if there is any, out among ranks on CPUs that share memory."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.deal(self.flat.detach(), rank, ranks, add_up)

    def step(self, number: int) -> None:
        """Do update `number`, counted from 0 over all epochs, with the gradient as it is."""
        rate = self.recipe.lr_at(number, self.steps)
        if self.recorded:
            self.recorded.step(rate)
        else:
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
        Muon(matrices, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(
            rest,
            lr=recipe.lr * ADAMW_LR,
            betas=ADAMW_BETAS,
            weight_decay=0,
            capturable=flat.is_cuda,
            fused=None if flat.is_cuda else True,  # False would have a GPU take tensor by tensor
        ),
    ]
