"""Recipes: everything that decides what the weights become, as data under a name."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from lenet.augment import Augment
from lenet.model import LeNet


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of one way to train LeNet, and what it builds from them."""

    name: str
    epochs: int
    global_batch_size: int
    lr: float
    augment: Augment = field(default_factory=Augment)
    standardise: bool = False

    def build_model(self, n_classes: int, seed: int, pixel_mean: float = 0.0, pixel_std: float = 1.0) -> LeNet:
        """A LeNet with Xavier-uniform weights (Glorot and Bengio, 2010) and torch's default biases.

        It standardises pixels by their mean and standard deviation, if the recipe says so. The same seed gives the
        same weights in every process; the caller's random state is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LeNet(n_classes, pixel_mean, pixel_std) if self.standardise else LeNet(n_classes)
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
        return model

    def build_optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Plain SGD, no momentum."""
        return torch.optim.SGD(parameters, lr=lr)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in [Recipe(name="seed", epochs=10, global_batch_size=256, lr=0.9)]
}
