"""LeNet's gradient written out by hand: the plain step's numbers, 3.5 times as fast by AVX-512, 1.2 times on a GPU.

Convolutions, with their activations and pooling, are on a CPU the compiled ones if they can be had, else those of
torch's operations. The rest of the network is matrix products, with the image innermost as there. So a GPU adds up in
one order always: the same bits in every run. Told to do that, cuDNN's convolutions take this step 1.9 times as long.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lenet.compiled import CompiledConvolutions, library
from lenet.model import LeNet
from lenet.step import Gradient, GraphedGradient, PlainGradient, count, no_counts, views
from lenet.unfolded import UnfoldedConvolutions, in_place

# Larger batches are worked off in pieces: buffers stay small, and what is written is read while it is in the cache. A
# GPU wants much at a time, and takes 0.6 GB for this.
PIECE, GPU_PIECE = 128, 4096


class Convolutions(Protocol):
    """Both convolutional layers, of a model and for a number of images."""

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (b, side, side) to features (400, b)."""
        ...

    def backward(self, gradient: Tensor) -> None:
        """Write the parameters' gradients, from that of the features, (400, b), which may be used up."""
        ...


# Of a model, its parameters' gradients by id, the number of images and their side.
Kind = Callable[[LeNet, dict[int, Tensor], int, int], Convolutions]


def open_gradient(model: LeNet, flat: nn.Parameter, label_smoothing: float = 0.0, bfloat16: bool = False) -> Gradient:
    """The fastest there is for the model's device and type; in bfloat16 if asked for, on a GPU: compiled for AVX-512,
    float32 is 1.5 times as fast as that is on a CPU with products of bfloat16."""
    if flat.dtype != torch.float32 or flat.device.type not in {"cpu", "cuda"}:
        return PlainGradient(model, flat, label_smoothing)
    kind = exact_convolutions(flat.device)
    if bfloat16 and flat.is_cuda:
        kind = partial(UnfoldedConvolutions, dtype=torch.bfloat16)
    fused = FusedGradient(model, flat, label_smoothing, convolutions=kind)
    return GraphedGradient(fused) if flat.is_cuda else fused


def exact_convolutions(device: torch.device) -> Kind:
    """The fastest in float32."""
    return CompiledConvolutions if device.type == "cpu" and library() else UnfoldedConvolutions


class FusedGradient(Gradient):
    """What PlainGradient computes, for a float32 LeNet on a CPU or GPU, with convolutions of one of the two kinds."""

    model: LeNet

    def __init__(self, model: LeNet, flat: nn.Parameter, label_smoothing: float = 0.0, *, convolutions: Kind) -> None:
        super().__init__(model, flat, label_smoothing)
        self.convolutions = convolutions
        self.piece = torch.empty_like(self.total)
        parameters = list(model.parameters())
        self.gradients = {id(p): view for p, view in zip(parameters, views(self.piece, parameters), strict=True)}
        self.passes: dict[tuple[Kind, tuple[int, ...], torch.dtype], _Pass] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, *, global_batch: int) -> Tensor:
        self.total.zero_()
        counts = no_counts(images.device)
        for some, classes in _pieces(images, labels):
            counts += self._pass_for(some, self.convolutions).run(some, classes, global_batch, self.label_smoothing)
            self.total.add_(self.piece)
        return counts

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> Tensor:
        counts = no_counts(images.device)
        for some, classes in _pieces(images, labels):
            logits = self._pass_for(some, exact_convolutions(images.device)).forward(some).t()
            counts += count(logits, classes, F.cross_entropy(logits, classes.long(), reduction="sum"))
        return counts

    def _pass_for(self, images: Tensor, convolutions: Kind) -> "_Pass":
        # Slices differ by one image at most, and the last batch of an epoch is short: few shapes in a training.
        key = convolutions, tuple(images.shape), images.dtype
        if key not in self.passes:
            if tuple(images.shape[1:]) not in {(28, 28), (32, 32)} or images.dtype != torch.uint8:
                given = f"{images.dtype} {tuple(images.shape)}"
                raise ValueError(f"images are {given}, not uint8 (b, 28, 28) or (b, 32, 32)")
            size, side, _ = images.shape
            layers = convolutions(self.model, self.gradients, size, side)
            self.passes[key] = _Pass(self.model, self.gradients, size, layers)
        return self.passes[key]


def _pieces(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = GPU_PIECE if images.device.type == "cuda" else PIECE
    pieces = zip(torch.split(images, size), torch.split(labels, size), strict=True)
    return (piece for piece in pieces if len(piece[0]))


class _Pass:
    """One forward and backward pass for `size` images, in buffers of its own."""

    def __init__(self, model: LeNet, gradients: dict[int, Tensor], size: int, convolutions: Convolutions) -> None:
        self.convolutions = convolutions
        dense = [(model.fc1, model.act3), (model.fc2, model.act4), (model.fc3, None)]
        self.dense = [_Dense(layer, act, gradients, size) for layer, act in dense]

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (b, side, side) to logits (n_classes, b)."""
        x = self.convolutions.forward(images)
        for layer in self.dense:
            x = layer.forward(x)
        return x

    def run(self, images: Tensor, labels: Tensor, global_batch: int, label_smoothing: float) -> Tensor:
        """Write the parameters' gradients; uint8 (b, side, side) and (b,) to counts float64 (3,)."""
        x = self.forward(images)
        labels = labels.long()
        log_probabilities = x.log_softmax(dim=0)
        counts = count(x.t(), labels, -log_probabilities.gather(0, labels[None]).sum())
        # The gradient of the mean cross-entropy: the probabilities less the target.
        gradient = log_probabilities.exp_().sub_(label_smoothing / len(x))
        gradient.scatter_add_(0, labels[None], gradient.new_full((1, 1), label_smoothing - 1).expand(1, len(labels)))
        gradient.div_(global_batch)
        for layer in reversed(self.dense):
            gradient = layer.backward(gradient)
        self.convolutions.backward(gradient)
        return counts


class _Dense:
    """Linear layer and activation, if any, of (inputs, b)."""

    def __init__(self, layer: nn.Linear, act: nn.Module | None, gradients: dict[int, Tensor], b: int) -> None:
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_gradient, self.bias_gradient = gradients[id(layer.weight)], gradients[id(layer.bias)]
        self.activation = in_place(act) if act else None
        self.output, self.input_gradient = (self.weight.new_empty(n, b) for n in self.weight.shape)
        self.hidden_gradient = torch.empty_like(self.output)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, (outputs, b)."""
        self.x = x
        torch.addmm(self.bias.view(-1, 1), self.weight, x, out=self.output)
        if self.activation:
            self.activation[0](self.output)
        return self.output

    def backward(self, gradient: Tensor) -> Tensor:
        """From the output's gradient to those of weight, bias and, returned, input."""
        if self.activation:
            gradient = self.activation[1](gradient, self.output, grad_input=self.hidden_gradient)
        torch.mm(gradient, self.x.t(), out=self.weight_gradient)
        torch.sum(gradient, dim=1, out=self.bias_gradient)
        torch.mm(self.weight.t(), gradient, out=self.input_gradient)
        return self.input_gradient
