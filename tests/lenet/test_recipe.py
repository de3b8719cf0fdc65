"""Proves that a recipe's weights follow Xavier's rule and are a function of the seed alone."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lenet.model import LeNet, fold_standardise
from lenet.recipe import RECIPES, Recipe

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


def test_kaimings_weights_have_his_variance_and_no_bias() -> None:
    for layer in weighted_layers(RECIPES["modern"].build_model(10, seed=0)):
        variance = 2 / layer.weight[0].numel()
        error = math.sqrt(2 / layer.weight.numel())  # of the variance of so many normal numbers
        assert layer.weight.var().item() == pytest.approx(variance, rel=5 * error)
        assert layer.bias is not None
        assert not layer.bias.any()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_ends_in_the_same_61706_parameters(recipe: Recipe) -> None:
    model = recipe.build_model(10, 0, 0.286, 0.353)
    assert sum(parameter.numel() for parameter in fold_standardise(model).parameters()) == 61_706
    assert (model.activation, model.pooling) == (recipe.activation, recipe.pooling)


def test_a_constant_rate_stays() -> None:
    assert {SEED_RECIPE.lr_at(step, 100) for step in range(100)} == {1.0}


def test_one_cycle_rises_to_the_rate_and_falls_to_zero() -> None:
    recipe = replace(SEED_RECIPE, schedule="one-cycle", warmup=0.1)
    rates = [recipe.lr_at(step, 1000) for step in range(1000)]
    assert rates[0] == 0
    assert rates[:101] == sorted(rates[:101])
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == 1
    assert rates[550] == pytest.approx(0.5)  # half way down
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] < 1e-5
    assert replace(recipe, warmup=0.0).lr_at(0, 1000) == 1
