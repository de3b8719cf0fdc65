"""Proves that a run's recipe is the one it names with the values it gives, and that a wrong recipe file is refused."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from lenet.augment import Augment
from lenet.recipe import RECIPES, Recipe
from pipeline.recipe import RecipeConfig, TrainConfig, encode_recipe, find_recipe, varied


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_not_given_is_the_recipes_own(recipe: Recipe) -> None:
    assert TrainConfig(recipe=recipe.name).resolved() == recipe


def test_what_is_given_takes_the_place_of_the_recipes_own() -> None:
    given = TrainConfig(recipe="modern", epochs=3, lr=0.5, flip=0.5, momentum=0, activation="tanh", averaging=0)
    expected = varied(RECIPES["modern"], {"epochs": 3, "lr": 0.5, "momentum": 0, "activation": "tanh", "averaging": 0})
    assert given.resolved() == varied(expected, {"flip": 0.5})
    assert given.resolved().augment == Augment(flip=0.5, shift=2)


def test_every_value_of_a_recipe_can_be_given() -> None:
    fields = {*vars(RECIPES["seed"]), *vars(Augment())} - {"name", "augment"}
    assert fields <= RecipeConfig.model_fields.keys()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_comes_back_from_its_file(tmp_path: Path, recipe: Recipe) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(encode_recipe(recipe))
    assert find_recipe(str(file)) == recipe
    assert TrainConfig(recipe=str(file), lr=0.25).resolved() == varied(recipe, {"lr": 0.25})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a recipe (the file: Invalid JSON"),
        (b"[]", "not a recipe (the file: Input should be an object"),
        (json.dumps({"name": "x", "epochs": 1, "lr": 1}).encode(), "not a recipe (global_batch_size: Field required)"),
        (encode_recipe(varied(RECIPES["seed"], {"activation": "cosine"})), "not a recipe (activation='cosine': Input"),
        (
            encode_recipe(RECIPES["modern"]).replace(b'"shift": 2', b'"shift": 99'),
            "not a recipe (augment: Value error, ",
        ),
        (encode_recipe(varied(RECIPES["seed"], {"epochs": 0})), "not a recipe (epochs=0: Input should be greater"),
        (encode_recipe(varied(RECIPES["seed"], {"lr": -1.0})), "not a recipe (lr=-1.0: Input should be greater"),
        (encode_recipe(RECIPES["seed"]).replace(b"momentum", b"momentm"), "not a recipe (momentm=0.0: Unexpected"),
        (encode_recipe(RECIPES["seed"]).replace(b'"flip"', b'"flop"'), "not a recipe (augment.flop=0.0: Unexpected"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"; use one that lenet tune wrote$") as raised:
        find_recipe(str(file))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_recipe_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValidationError, match="no such recipe; use one of seed, classic, modern, or a recipe's"):
        TrainConfig(recipe="best")
