"""What one rank does with a batch, to train or to evaluate: tensors in, summable counts out.

Counts are a float64 tensor (3,): sum of the cross-entropy losses, correct predictions, images. They add up over
steps and over workers without rounding that anyone could see, and they stay on the device, so that no step
waits for the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Result = TypeVar("Result")


@dataclass(frozen=True)
class Metrics:
    """Mean loss (nats per image) and accuracy (0 to 1) over `images` images."""

    loss: float
    accuracy: float
    images: int


def no_counts(device: torch.device | str = "cpu") -> Tensor:
    """The counts of nothing."""
    return torch.zeros(3, dtype=torch.float64, device=device)


def metrics_of(counts: Tensor) -> Metrics:
    """Divide the sums. Raises ValueError when they cover no image."""
    loss, correct, images = counts.tolist()
    if images == 0:
        raise ValueError("no image was counted, so there is no mean")
    return Metrics(loss / images, correct / images, int(images))


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 28, 28) pixels 0..255 to float32 (B, 1, 28, 28) in 0..1, as torchvision's ToTensor does."""
    return images.unsqueeze(1).to(torch.float32) / 255.0


def flatten(model: nn.Module) -> nn.Parameter:
    """One float (parameters,) that holds all of a model's parameters, with a gradient, zero, that holds all of theirs.

    The model's own become views of it, in their order and memory format: one all-reduce and one update serve them all.
    """
    parameters = list(model.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    for parameter, data, gradient in zip(
        parameters, views(flat.data, parameters), views(flat.grad, parameters), strict=True
    ):
        parameter.data = data.copy_(parameter.data)
        parameter.grad = gradient
    return flat


def views(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Parts of `flat`, one after the other, with the shapes and strides of the parameters."""
    sizes = [parameter.numel() for parameter in parameters]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [flat.as_strided(p.shape, p.stride(), start) for p, start in zip(parameters, starts, strict=True)]


class Gradient:
    """Computes the part of a model's gradient that this rank's slice of a global batch gives.

    `flat` is what `flatten` made of the model. Called with uint8 (b, H, W) images and their labels (b,), H = W = 28 or
    32, b may be 0, and the number of images in the global batch, it replaces flat.grad and returns the slice's counts.
    It divides by the size of the global batch, so the ranks' gradients add up to that of the mean cross-entropy over
    the global batch, however unevenly that is sliced. With label smoothing (Szegedy et al., 2016) that part of the
    target is spread over all classes; the loss that is counted is without.
    """

    def __init__(self, model: nn.Module, flat: nn.Parameter, label_smoothing: float = 0.0) -> None:
        if flat.grad is None:
            raise ValueError("the parameter has no gradient to write to; make it by flatten")
        self.model, self.total, self.label_smoothing = model, flat.grad, label_smoothing

    def __call__(self, images: Tensor, labels: Tensor, *, global_batch: int) -> Tensor:
        raise NotImplementedError

    def evaluate(self, images: Tensor, labels: Tensor) -> Tensor:
        """Counts of the model as it is now, in its own type, on such images and labels."""
        return evaluate_step(self.model, images, labels)


class PlainGradient(Gradient):
    """As autograd does it, on any device."""

    def __call__(self, images: Tensor, labels: Tensor, *, global_batch: int) -> Tensor:
        labels = labels.long()
        logits = self.model(normalise(images))
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        smoothed = loss_sum
        if self.label_smoothing:
            smoothed = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        self.total.zero_()
        (smoothed / global_batch).backward()  # type: ignore[no-untyped-call]
        return count(logits, labels, loss_sum)


class GraphedGradient(Gradient):
    """Another on a CUDA device, recorded once for each shape and then replayed: the host launches one thing.

    A step of LeNet is some ninety small kernels, which take a GPU less time to run than Python takes to launch. The
    counts it returns are overwritten by the next call.
    """

    def __init__(self, gradient: Gradient) -> None:
        self.gradient, self.model, self.total = gradient, gradient.model, gradient.total
        self.recorded: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, images: Tensor, labels: Tensor, *, global_batch: int) -> Tensor:
        if not len(labels):
            return self.gradient(images, labels, global_batch=global_batch)
        key = (*images.shape, global_batch)
        if key not in self.recorded:
            its_images, its_labels = images.clone(), labels.clone()
            graph, counts = record(lambda: self.gradient(its_images, its_labels, global_batch=global_batch))
            self.recorded[key] = graph, its_images, its_labels, counts
        graph, its_images, its_labels, counts = self.recorded[key]
        its_images.copy_(images)
        its_labels.copy_(labels)
        graph.replay()
        return counts

    def evaluate(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.gradient.evaluate(images, labels)


def record(work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Work on a CUDA device as a graph that does it again, and what it returns. It is done once, to begin with."""
    # What libraries set up at their first call cannot be recorded, and has to happen beside the main stream.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


@torch.no_grad()
def evaluate_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Counts of `model` on uint8 (b, 28, 28) images and their labels (b,)."""
    labels = labels.long()
    logits = model(normalise(images))
    return count(logits, labels, F.cross_entropy(logits, labels, reduction="sum"))


@torch.no_grad()
def count(logits: Tensor, labels: Tensor, loss_sum: Tensor) -> Tensor:
    """Counts of logits (b, n_classes) whose losses have this sum, labels int64 (b,)."""
    correct = (logits.argmax(dim=1) == labels).sum()
    images = torch.full_like(loss_sum, labels.numel())
    return torch.stack([loss_sum.detach().double(), correct.double(), images.double()])
