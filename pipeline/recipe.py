"""The recipe of a run: one by name or from a file, and the values given in place of its own."""

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from lenet.augment import Augment
from lenet.model import Activation, Pooling
from lenet.recipe import RECIPES, Recipe

Hyperparameter = Literal[
    "lr", "global_batch_size", "momentum", "weight_decay", "label_smoothing", "warmup", "averaging",
    "flip", "shift", "rotate", "scale", "erase",
]  # fmt: skip
for _part in (Augment, Recipe):
    with_config(extra="forbid")(_part)  # a misspelt value in a file is not passed over
_RECIPE = TypeAdapter(Recipe)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or in that JSON file. ValueError, with what to do, if there is none."""
    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(".json"):
        raise ValueError(f"no such recipe; use one of {', '.join(RECIPES)}, or a recipe's .json file")
    try:
        recipe = _RECIPE.validate_json(Path(name).read_bytes())
        RecipeConfig.model_validate(_flat(recipe))  # which has the bounds
        return recipe
    except OSError as error:
        raise ValueError(f"the file cannot be read ({error.strerror}); use one that lenet tune wrote") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        where += f"={first['input']!r}" if isinstance(first["input"], str | int | float) and first["loc"] else ""
        raise ValueError(f"not a recipe ({where}: {first['msg']}); use one that lenet tune wrote") from None


def encode_recipe(recipe: Recipe) -> bytes:
    """A recipe as the JSON file that `find_recipe` reads."""
    return json.dumps(asdict(recipe), indent=2).encode()


def varied(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with some of its values, or its augmentation's, replaced; others among `values` are passed over."""
    augment = {field.name: values[field.name] for field in fields(Augment) if field.name in values}
    own = {field.name: values[field.name] for field in fields(Recipe) if field.name in values}
    return replace(recipe, **own, augment=replace(recipe.augment, **augment))


def _flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values as `RecipeConfig` names them."""
    values = asdict(recipe)
    return {name: value for name, value in (values | values["augment"]).items() if name in RecipeConfig.model_fields}


def _known_recipe(name: str) -> str:
    find_recipe(name)
    return name


class RecipeConfig(BaseModel):
    """What the weights become. A value that is not given is the recipe's own: it is one of `of_recipe`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    of_recipe: ClassVar[Set[str]] = {field.name for part in (Recipe, Augment) for field in fields(part)}

    recipe: Annotated[str, AfterValidator(_known_recipe)] = Field(
        "seed",
        description="Set of hyperparameters: seed (the textbook's), classic (1998's), modern (the most accurate), or "
        "the .json file of one's own.",
        json_schema_extra={"examples": list(RECIPES)},
    )
    epochs: int | None = Field(None, ge=1, le=10_000, description="Passes over the training set.")
    global_batch_size: int | None = Field(
        None, ge=1, le=1_000_000, description="Images in each optimizer step, over all workers together."
    )
    lr: float | None = Field(None, gt=0, le=100, description="Learning rate; the highest, if it changes.")
    seed: int = Field(
        0, ge=0, lt=2**63, description="Decides the initial weights, the order of the images and their augmentation."
    )
    activation: Activation | None = Field(None, description="What follows each layer but the last.")
    pooling: Pooling | None = Field(None, description="Keep the mean or the largest of 2x2 values.")
    weights: Literal["xavier", "kaiming"] | None = Field(None, description="How initial weights are drawn.")
    standardise: bool | None = Field(
        None, description="Shift and scale pixels to mean 0 and standard deviation 1 over the training images."
    )
    flip: float | None = Field(None, ge=0, le=1, description="Probability to mirror a training image left to right.")
    shift: int | None = Field(None, ge=0, le=16, description="Pixels by which to shift training images at most.")
    rotate: float | None = Field(None, ge=0, le=180, description="Degrees to turn training images by at most.")
    scale: float | None = Field(
        None, ge=0, lt=1, description="Part by which to grow or shrink training images at most."
    )
    erase: int | None = Field(None, ge=0, le=28, description="Side in pixels of a square to black out in each.")
    label_smoothing: float | None = Field(
        None, ge=0, lt=1, description="Part of each target that is spread evenly over all classes."
    )
    optimizer: Literal["sgd", "muon"] | None = Field(None, description="How gradients become updates.")
    momentum: float | None = Field(None, ge=0, lt=1, description="Part of the last update that is kept in the next.")
    weight_decay: float | None = Field(None, ge=0, le=10, description="Pull of the weights towards zero.")
    schedule: Literal["constant", "one-cycle"] | None = Field(
        None, description="Learning rate: always lr, or up to it and down again."
    )
    warmup: float | None = Field(None, ge=0, lt=1, description="Part of all steps in which one-cycle goes up.")
    averaging: float | None = Field(
        None, ge=0, lt=1, description="Decay of the moving average of the weights that becomes the model; 0 is none."
    )
    precision: Literal["float32", "bfloat16"] | None = Field(
        None, description="What to compute gradients in; bfloat16 is for GPUs."
    )

    def resolved(self) -> Recipe:
        """The recipe with the values given here in place of its own."""
        return varied(find_recipe(self.recipe), {name: value for name, value in self if value is not None})

    def spelled_out(self) -> dict[str, Any]:
        """The recipe's own values as if they had been given: what a name means, or a file, may change one day."""
        return _flat(self.resolved())


class TrainConfig(RecipeConfig):
    """What the weights become, and when what has come of them so far is kept."""

    checkpoint_steps: int | None = Field(
        None, ge=1, description="Keep a checkpoint after every so many steps too, not only after every epoch."
    )
    checkpoint_seconds: float = Field(
        60, gt=0, description="Keep a checkpoint after so many seconds in which there was none."
    )


class TuneConfig(BaseModel):
    """How to search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vary: tuple[Hyperparameter, ...] = Field(
        ("lr",),
        min_length=1,
        description=f"What to vary: {', '.join(get_args(Hyperparameter))}. Give it several times to vary several.",
    )
    trials: int = Field(16, ge=1, le=10_000, description="Combinations to try.")
    output: str = Field("tuned.json", pattern=r"\.json$", description="Recipe file to write.")
