"""LeNet-5 as the textbook gives it: two sigmoid convolutions, average pooling, three linear layers.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition", 1998,
in the simplified form of Zhang et al., "Dive into Deep Learning", section 7.6.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["sigmoid", "tanh", "relu"]
Pooling = Literal["average", "max"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
POOLINGS: dict[str, type[nn.Module]] = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}


class PadTo32(nn.Module):
    """Bring (B, 1, 28, 28) to (B, 1, 32, 32) with a border of 2 zeros; pass (B, 1, 32, 32) through."""

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images have shape {tuple(images.shape)}; LeNet takes (B, 1, 28, 28) or (B, 1, 32, 32)")
        side = images.shape[-1]
        if side == 32:
            return images
        if side == 28:
            return F.pad(images, (2, 2, 2, 2))
        raise ValueError(f"images are {side}x{side}; LeNet takes 28x28 or 32x32")


class Standardise(nn.Module):
    """Pixels to mean 0 and standard deviation 1, given their own, in the pixels' unit: (x - mean) / std.

    Constants, so not in the state dict. Raises ValueError unless std is above 0.
    """

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(f"the pixels' standard deviation is {std}; it has to be above 0")
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def pixel_scaling(model: "LeNet") -> tuple[float, float]:
    """Scale and shift: a pixel p of 0..255 comes to the first convolution as p * scale - shift."""
    mean, std = (model.standardise.mean, model.standardise.std) if hasattr(model, "standardise") else (0.0, 1.0)
    return 1 / (255 * std), mean / std


class LeNet(nn.Module):
    """Float images (B, 1, 28, 28) or (B, 1, 32, 32), pixels 0 to 1, to float logits (B, n_classes).

    Given the mean and standard deviation of such pixels it standardises them first; its parameters and their names
    are the same. The textbook's activation and pooling are sigmoid and average. Raises ValueError for any other shape,
    for fewer than two classes, and for pixel_std not above 0.
    """

    def __init__(
        self,
        n_classes: int = 10,
        pixel_mean: float = 0.0,
        pixel_std: float = 1.0,
        activation: Activation = "sigmoid",
        pooling: Pooling = "average",
    ) -> None:
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes is {n_classes}; a classifier needs at least 2")
        self.n_classes, self.activation, self.pooling = n_classes, activation, pooling
        self.pad = PadTo32()
        if (pixel_mean, pixel_std) != (0.0, 1.0):
            # After the border, which is black like the rest of the background.
            self.standardise = Standardise(pixel_mean, pixel_std)
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5)
        self.act1 = ACTIVATIONS[activation]()
        self.pool1 = POOLINGS[pooling](2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.act2 = ACTIVATIONS[activation]()
        self.pool2 = POOLINGS[pooling](2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.act3 = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(120, 84)
        self.act4 = ACTIVATIONS[activation]()
        self.fc3 = nn.Linear(84, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        # The layers are registered in the order they run, so the layer table is this loop with a print.
        x = images
        for layer in self.children():
            x = layer(x)
        return x


def fold_standardise(model: LeNet) -> LeNet:
    """A LeNet that takes pixels 0 to 1 as they are and gives the logits, up to rounding, of one that standardises them.

    The first convolution takes it over: w * (x - mean) / std + b is (w / std) * x + b - sum(w) * mean / std. That holds
    at the border too, because it is put on before pixels are standardised. Computed in float64 and rounded once to the
    model's own type; the copy is on the model's device, and the model stays as it is.
    """
    plain = copy.deepcopy(model)
    if hasattr(plain, "standardise"):
        mean, std = plain.standardise.mean, plain.standardise.std
        del plain.standardise
        weights = plain.state_dict()
        weight, bias = weights["conv1.weight"].double(), weights["conv1.bias"].double()
        folded = {"conv1.weight": weight / std, "conv1.bias": bias - weight.sum(dim=(1, 2, 3)) * (mean / std)}
        plain.load_state_dict(weights | folded)
    return plain


@dataclass(frozen=True)
class LayerRow:
    """One line of the layer table: the layer's name and kind, its output shape for one image, its parameters."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int


def layer_table(model: LeNet, image_size: int = 28) -> list[LayerRow]:
    """Run one blank image through `model` and describe every layer on the way."""
    x = torch.zeros(1, 1, image_size, image_size)
    rows = []
    with torch.no_grad():
        for name, layer in model.named_children():
            x = layer(x)
            count = sum(p.numel() for p in layer.parameters())
            rows.append(LayerRow(name, type(layer).__name__, tuple(x.shape[1:]), count))
    return rows
