"""Proves that a recipe's weights follow Xavier's rule and are a function of the seed alone."""

import math

import pytest
import torch
from torch import nn

from lenet.model import LeNet
from lenet.recipe import RECIPES

SEED_RECIPE = RECIPES["seed"]


def weighted_layers(model: LeNet) -> list[nn.Conv2d | nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def test_the_seed_recipe_is_the_published_one() -> None:
    assert (SEED_RECIPE.epochs, SEED_RECIPE.global_batch_size, SEED_RECIPE.lr) == (10, 256, 0.9)


def test_weights_fill_xaviers_interval() -> None:
    layers = weighted_layers(SEED_RECIPE.build_model(10, seed=0))
    assert len(layers) == 5
    for layer in layers:
        weight = layer.weight
        field = weight[0, 0].numel() if weight.ndim == 4 else 1
        bound = math.sqrt(6 / (field * (weight.shape[0] + weight.shape[1])))
        assert 0.9 * bound < weight.abs().max().item() <= bound


def test_weights_have_xaviers_mean_and_variance() -> None:
    weight = SEED_RECIPE.build_model(10, seed=0).fc1.weight
    variance = 2 / (400 + 120)
    # Five standard errors of the mean and of the variance of 48,000 uniform numbers.
    assert abs(weight.mean().item()) < 5 * math.sqrt(variance / weight.numel())
    assert weight.var().item() == pytest.approx(variance, rel=5 * math.sqrt(0.8 / weight.numel()))


def test_the_same_seed_gives_the_same_weights() -> None:
    torch.manual_seed(1)
    first = SEED_RECIPE.build_model(10, seed=7).state_dict()
    torch.manual_seed(2)
    second = SEED_RECIPE.build_model(10, seed=7).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights() -> None:
    first, second = (SEED_RECIPE.build_model(10, seed).state_dict() for seed in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_building_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    SEED_RECIPE.build_model(10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_optimizer_takes_the_steps_of_plain_gradient_descent() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = SEED_RECIPE.build_optimizer([parameter], lr=0.5)
    for _ in range(2):  # with momentum the second step would be longer
        parameter.grad = torch.tensor([1.0, 1.0])
        optimizer.step()
    torch.testing.assert_close(parameter.data, torch.tensor([0.0, -3.0]))
