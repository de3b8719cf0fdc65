"""Proves that a recipe's updates are those that its words say, and what becomes of the average."""

import copy
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lenet.model import LeNet
from lenet.optimize import ADAMW_BETAS, ADAMW_LR, Optimization, Recorded, dealt
from lenet.recipe import RECIPES, Recipe
from lenet.step import flatten

SEED, MODERN = RECIPES["seed"], RECIPES["modern"]
STEPS = 20


def open_optimization(recipe: Recipe) -> tuple[LeNet, Optimization]:
    # As the workers have it: a filter's elements lie in another order in memory.
    model = recipe.build_model(10, seed=0).to(memory_format=torch.channels_last)
    return model, Optimization(recipe, model, flatten(model), STEPS)


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def run(recipe: Recipe, steps: int = STEPS) -> tuple[LeNet, Optimization, list[dict[str, Tensor]]]:
    """So many updates with made-up gradients; the weights after each."""
    model, optimization = open_optimization(recipe)
    return model, optimization, list(updates(model, optimization, steps))


def updates(model: LeNet, optimization: Optimization, steps: int = STEPS) -> Iterator[dict[str, Tensor]]:
    """The weights after each update."""
    for step in range(steps):
        for name, value in gradients(model, step).items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            gradient.copy_(value)
        optimization.step(step)
        yield {name: value.clone() for name, value in model.state_dict().items()}


def test_the_seed_recipe_takes_the_steps_of_plain_gradient_descent() -> None:
    model = SEED.build_model(10, seed=0)
    expected = model.state_dict()
    for step in range(3):  # with momentum the second step would be longer
        for name, value in gradients(model, step).items():
            expected[name] -= SEED.lr * value
    found = run(SEED, 3)[2][-1]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 1e-3), (0.0, 1e-3)])
def test_sgd_is_torchs_own_number_for_number(momentum: float, weight_decay: float) -> None:
    recipe = replace(SEED, momentum=momentum, weight_decay=weight_decay)
    reference = nn.Parameter(flatten(recipe.build_model(10, seed=0)).detach().clone())
    theirs = torch.optim.SGD(
        [reference], lr=recipe.lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
    )
    model = recipe.build_model(10, seed=0)
    optimization = Optimization(recipe, model, flatten(model), STEPS)
    for step in range(STEPS):
        gradient = torch.randn(reference.shape, generator=torch.Generator().manual_seed(step))
        reference.grad = gradient
        assert optimization.flat.grad is not None
        optimization.flat.grad.copy_(gradient)
        theirs.param_groups[0]["lr"] = recipe.lr * recipe.lr_at(step, STEPS)
        theirs.step()
        optimization.step(step)
        assert torch.equal(optimization.flat, reference)
        if step == STEPS // 2:  # as a checkpoint is taken up: by whichever of the two wrote it
            state = theirs.state_dict()
            theirs.load_state_dict(optimization.optimizers[0].state_dict() | {"param_groups": state["param_groups"]})
            optimization.optimizers[0].load_state_dict(state)


def test_training_by_sgd_does_not_import_torchs_compiler() -> None:
    """It takes 1.3 s of a core, in each worker, before the first step."""
    script = """
import sys, torch
from lenet.fused import open_gradient
from lenet.optimize import Optimization
from lenet.recipe import RECIPES
from lenet.step import flatten
model = RECIPES["seed"].build_model(10, seed=0)
flat = flatten(model)
images, labels = torch.zeros(8, 28, 28, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
open_gradient(model, flat, 0.0, False)(images, labels, global_batch=8)
Optimization(RECIPES["seed"], model, flat, 1).step(0)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)


def test_muon_moves_every_matrix_but_the_last_by_its_own_rule_and_adamw_the_rest() -> None:
    """Against torch's optimizers on parameters of their own, filters as rows of 25 and 150 in the usual order."""
    model, _, _ = run(MODERN)
    reference = MODERN.build_model(10, seed=0)
    matrices = {
        name: nn.Parameter(value.flatten(1)) for name, value in reference.state_dict().items()
        if value.ndim > 1 and name != "fc3.weight"
    }  # fmt: skip
    rest = {name: nn.Parameter(value) for name, value in reference.state_dict().items() if name not in matrices}
    muon = torch.optim.Muon(matrices.values(), momentum=MODERN.momentum, weight_decay=MODERN.weight_decay)
    adamw = torch.optim.AdamW(rest.values(), betas=ADAMW_BETAS, weight_decay=0)
    for step in range(STEPS):
        for name, value in gradients(reference, step).items():
            (matrices | rest)[name].grad = value.view_as((matrices | rest)[name])
        rate = MODERN.lr * MODERN.lr_at(step, STEPS)
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = rate, rate * ADAMW_LR
        muon.step()
        adamw.step()
    assert len(matrices) == 4
    for name, value in (matrices | rest).items():
        # Muon works in bfloat16, where the order of a row's elements tells; 20 steps of up to 0.02.
        tolerance = 2e-3 if name in matrices else 1e-6
        torch.testing.assert_close(model.state_dict()[name], value.view_as(model.state_dict()[name]).data,
                                   rtol=0, atol=tolerance)  # fmt: skip


@given(costs=st.lists(st.integers(1, 100), max_size=8), ranks=st.integers(1, 5))
def test_all_work_is_dealt_once_and_no_rank_waits_for_more_than_one_piece(costs: list[int], ranks: int) -> None:
    hands = dealt(costs, ranks)
    assert len(hands) == ranks
    assert sorted(index for hand in hands for index in hand) == list(range(len(costs)))
    loads = [sum(costs[index] for index in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_that_share_muons_work_have_what_each_would_have_alone(ranks: int) -> None:
    """To the bit: weights after every step, average, and all state, as a checkpoint of any of them would keep it. In
    the middle, they start again from the state of one."""
    barrier, parts = threading.Barrier(ranks, timeout=60), dict[int, Tensor]()

    def add_up(rank: int, tensor: Tensor) -> None:
        parts[rank] = tensor.clone()
        barrier.wait()
        total = sum(parts[other] for other in range(ranks))
        barrier.wait()
        tensor.copy_(total)

    def at_work(rank: int, learner: tuple[LeNet, Optimization]) -> list[dict[str, Tensor]]:
        model, optimization = learner
        optimization.deal(rank, ranks, partial(add_up, rank))
        weights = []
        for step, after in enumerate(updates(model, optimization), start=1):
            weights.append(after)
            if step == STEPS // 2:
                for optimizer in optimization.optimizers:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return weights

    _, alone, expected = run(MODERN)
    opened = [open_optimization(MODERN) for _ in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        for (_, optimization), weights in zip(opened, pool.map(at_work, range(ranks), opened), strict=True):
            for step, after in enumerate(weights):
                assert all(torch.equal(after[name], value) for name, value in expected[step].items())
            assert optimization.average is not None
            assert alone.average is not None
            assert torch.equal(optimization.average, alone.average)
            for ours, theirs in zip(optimization.optimizers, alone.optimizers, strict=True):
                state, other = ours.state_dict()["state"], theirs.state_dict()["state"]
                assert state.keys() == other.keys()
                for index, slots in other.items():
                    assert all(torch.equal(state[index][name], value) for name, value in slots.items())


@pytest.mark.usefixtures("recording")
def test_a_step_recorded_once_is_that_of_every_rate() -> None:
    model, optimization = open_optimization(MODERN)
    optimization.recorded = Recorded(optimization.optimizers, optimization.flat)
    expected = run(MODERN)[2]
    for step in range(STEPS):
        for name, value in gradients(model, step).items():
            model.get_parameter(name).grad.copy_(value)  # type: ignore[union-attr]
        optimization.step(step)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[step][name], rtol=0, atol=1e-6)
        if step == STEPS // 2:  # as when a checkpoint is taken up: with state of its own, and to be recorded anew
            for optimizer in optimization.optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_rate_is_the_schedules(recipe: Recipe) -> None:
    _, optimization = open_optimization(recipe)
    for step in (0, 1, 10, 19):
        optimization.step(step)
        [first, *others] = [group["lr"] for optimizer in optimization.optimizers for group in optimizer.param_groups]
        assert first == pytest.approx(recipe.lr * recipe.lr_at(step, STEPS))
        assert others in ([], [pytest.approx(first * ADAMW_LR)])


def test_the_average_is_of_all_steps_the_latest_most() -> None:
    model, optimization, weights = run(replace(SEED, averaging=0.5))
    expected = {name: value.clone() for name, value in SEED.build_model(10, seed=0).state_dict().items()}
    for step, after in enumerate(weights):
        decay = min(0.5, (step + 1) / (step + 10))
        for name, value in after.items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    with optimization.averaged():
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name])
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[-1][name])


def test_without_an_average_the_model_stays_as_it_is() -> None:
    model, optimization, weights = run(SEED, 2)
    assert optimization.average is None
    with optimization.averaged():
        assert all(torch.equal(value, weights[-1][name]) for name, value in model.state_dict().items())
