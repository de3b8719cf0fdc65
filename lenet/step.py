"""One training step and one evaluation step: tensors in, summable counts out.

Counts are a float64 tensor (3,): sum of the cross-entropy losses, correct predictions, images. They add up over
steps and over workers without rounding that anyone could see, and they stay on the device, so that no step
waits for the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    return images.unsqueeze(1).to(torch.float32).div_(255.0)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    global_batch: int,
    world_size: int = 1,
) -> Tensor:
    """One optimizer step on this rank's slice of a global batch; returns the slice's counts.

    images: uint8 (b, 28, 28); labels: uint8 or int64 (b,); b may be 0 and may differ between ranks.
    `global_batch` is the number of images over all ranks. DDP averages gradients over the ranks, so the loss *sum*
    times world_size / global_batch makes that average the mean gradient over the true global batch, however
    unevenly it is sliced.
    """
    labels = labels.long()
    logits = model(normalise(images))
    loss_sum = F.cross_entropy(logits, labels, reduction="sum")
    optimizer.zero_grad(set_to_none=True)
    (loss_sum * (world_size / global_batch)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return _counts(logits, labels, loss_sum)


@torch.no_grad()
def evaluate_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Counts of `model` on uint8 (b, 28, 28) images and their labels (b,)."""
    labels = labels.long()
    logits = model(normalise(images))
    return _counts(logits, labels, F.cross_entropy(logits, labels, reduction="sum"))


@torch.no_grad()
def predict_step(model: nn.Module, images: Tensor) -> Tensor:
    """float64 probabilities (b, n_classes) for uint8 (b, 28, 28) images; each row sums to 1 to 15 digits."""
    logits: Tensor = model(normalise(images))
    return logits.double().softmax(dim=1)


@torch.no_grad()
def _counts(logits: Tensor, labels: Tensor, loss_sum: Tensor) -> Tensor:
    correct = (logits.argmax(dim=1) == labels).sum()
    images = torch.full_like(loss_sum, labels.numel())
    return torch.stack([loss_sum.detach().double(), correct.double(), images.double()])
