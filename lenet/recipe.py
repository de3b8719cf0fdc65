"""Recipes: everything that decides what the weights become, as data under a name."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from lenet.augment import Augment
from lenet.model import Activation, LeNet, Pooling


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of one way to train LeNet, and the model it starts from.

    `weights`: xavier is uniform (Glorot and Bengio, 2010) with torch's default biases; kaiming is normal, for ReLU
    (He et al., 2015), with biases of zero. `optimizer`: sgd is torch's, with Nesterov's momentum; muon orthogonalises
    the updates of all matrices but the last (Jordan et al., 2024) and leaves the rest to AdamW, without weight decay.
    `schedule`: one-cycle rises in a line over the part `warmup` of all steps and falls to zero along half a cosine.
    `averaging`: decay of the exponential moving average of the weights, which is then the model; 0 is none.
    `precision`: bfloat16 is that of the factors of convolutions, on a GPU; a CPU computes in float32, which is faster
    there. Weights and updates are float32, but torch's Muon orthogonalises in bfloat16, which magnifies the rounding
    by which sums over one worker and over two differ.
    """

    name: str
    epochs: int
    global_batch_size: int
    lr: float
    activation: Activation = "sigmoid"
    pooling: Pooling = "average"
    weights: Literal["xavier", "kaiming"] = "xavier"
    standardise: bool = False
    augment: Augment = field(default_factory=Augment)
    label_smoothing: float = 0.0
    optimizer: Literal["sgd", "muon"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "one-cycle"] = "constant"
    warmup: float = 0.0
    averaging: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def build_model(self, n_classes: int, seed: int, pixel_mean: float = 0.0, pixel_std: float = 1.0) -> LeNet:
        """A LeNet with the recipe's initial weights.

        It standardises pixels by their mean and standard deviation, if the recipe says so. The same seed gives the
        same weights in every process; the caller's random state is left as it was.
        """
        scaling = (pixel_mean, pixel_std) if self.standardise else (0.0, 1.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LeNet(n_classes, *scaling, activation=self.activation, pooling=self.pooling)
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    if self.weights == "xavier":
                        nn.init.xavier_uniform_(layer.weight)
                    else:
                        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # every layer here has one
        return model

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step 0.. of so many, as part of `lr`."""
        if self.schedule == "constant":
            return 1.0
        done = step / steps
        if done < self.warmup:
            return done / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in [
        # The textbook's: Zhang et al., "Dive into Deep Learning", section 7.6, with Xavier-uniform weights.
        Recipe(name="seed", epochs=10, global_batch_size=256, lr=0.9),
        # As in 1998: tanh, inputs of mean 0 and variance 1, 20 passes, plain SGD on small batches, a falling rate.
        Recipe(
            name="classic",
            epochs=20,
            global_batch_size=64,
            lr=0.1,
            activation="tanh",
            standardise=True,
            schedule="one-cycle",
        ),
        # The most accurate we know; docs/accuracy.md has what each part is worth.
        Recipe(
            name="modern",
            epochs=60,
            global_batch_size=128,
            lr=0.02,
            activation="relu",
            weights="kaiming",
            standardise=True,
            # No flips: nearly all shoes point one way.
            augment=Augment(shift=2),
            label_smoothing=0.05,
            optimizer="muon",
            momentum=0.95,
            weight_decay=0.05,
            schedule="one-cycle",
            warmup=0.1,
            averaging=0.999,
        ),
    ]
}
