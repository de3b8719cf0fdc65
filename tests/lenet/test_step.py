"""Proves that a step is mean cross entropy and SGD on the global batch, however it is sliced, and that it learns."""

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lenet.model import LeNet
from lenet.recipe import RECIPES
from lenet.step import evaluate_step, metrics_of, no_counts, normalise, predict_step, train_step

if TYPE_CHECKING:
    from tests.conftest import Splits


@pytest.fixture
def images(small_splits: "Splits") -> Tensor:
    return torch.from_numpy(small_splits["train"][0][:200])


@pytest.fixture
def labels(small_splits: "Splits") -> Tensor:
    return torch.from_numpy(small_splits["train"][1][:200])


def fresh_model() -> LeNet:
    return RECIPES["seed"].build_model(10, seed=3)


def gradient_of(model: LeNet, images: Tensor, labels: Tensor, *, global_batch: int, world_size: int) -> list[Tensor]:
    """What train_step leaves in .grad, with a learning rate of 0 so that the weights stay."""
    train_step(
        model,
        torch.optim.SGD(model.parameters(), lr=0),
        images,
        labels,
        global_batch=global_batch,
        world_size=world_size,
    )
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_steps_equal_an_independent_plain_loop(images: Tensor, labels: Tensor) -> None:
    model = fresh_model()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.9)
    for first in range(0, 200, 40):
        batch, classes = images[first : first + 40], labels[first : first + 40]
        train_step(model, optimizer, batch, classes, global_batch=40)
        loss = F.cross_entropy(plain(batch[:, None].float() / 255), classes.long())
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                parameter -= 0.9 * gradient
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[200], [100, 100], [199, 1], [67, 66, 67], [120, 0, 80], [0, 0, 0, 200]])
def test_averaged_gradients_of_any_slices_are_the_whole_batchs(
    images: Tensor, labels: Tensor, sizes: list[int]
) -> None:
    """DDP averages over ranks: done here by hand, on slices as uneven as can be."""
    model = fresh_model()
    world = len(sizes)
    whole = gradient_of(model, images, labels, global_batch=200, world_size=1)
    ranks = [
        gradient_of(model, batch, classes, global_batch=200, world_size=world)
        for batch, classes in zip(images.split(sizes), labels.split(sizes), strict=True)
    ]
    averaged = [torch.stack(gradients).mean(dim=0) for gradients in zip(*ranks, strict=True)]
    assert len(averaged) == 10
    torch.testing.assert_close(averaged, whole, rtol=1e-4, atol=1e-7)


def test_counts_of_slices_add_up_to_the_counts_of_the_whole(images: Tensor, labels: Tensor) -> None:
    model = fresh_model()
    whole = evaluate_step(model, images, labels)
    parts = no_counts()
    for batch, classes in zip(images.split([150, 0, 50]), labels.split([150, 0, 50]), strict=True):
        parts += evaluate_step(model, batch, classes)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    assert parts[2] == 200


def test_metrics_are_the_mean_loss_and_the_share_of_hits(images: Tensor, labels: Tensor) -> None:
    model = fresh_model()
    metrics = metrics_of(evaluate_step(model, images, labels))
    with torch.no_grad():
        logits = model(images[:, None].float() / 255)
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels.long()).item(), rel=1e-6)
    assert metrics.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert metrics.images == 200


def test_a_train_step_counts_before_it_moves_the_weights(images: Tensor, labels: Tensor) -> None:
    model = fresh_model()
    before = evaluate_step(model, images, labels)
    counts = train_step(model, torch.optim.SGD(model.parameters(), lr=0.9), images, labels, global_batch=200)
    assert torch.equal(counts, before)
    assert not torch.equal(evaluate_step(model, images, labels), before)


def test_metrics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no image was counted"):
        metrics_of(no_counts())


def test_pixels_become_zero_to_one_as_in_torchvision(images: Tensor) -> None:
    from torchvision.transforms.functional import to_tensor

    expected = torch.stack([to_tensor(image.numpy()) for image in images[:20]])
    assert torch.equal(normalise(images[:20]), expected)


def test_probabilities_are_the_softmax_of_the_logits(images: Tensor) -> None:
    model = fresh_model()
    probabilities = predict_step(model, images)
    with torch.no_grad():
        exponentials = model(normalise(images)).double().exp()
    torch.testing.assert_close(probabilities, exponentials / exponentials.sum(dim=1, keepdim=True))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(200, dtype=torch.float64), rtol=0, atol=1e-14)


def test_training_on_200_real_images_learns_them(images: Tensor, labels: Tensor) -> None:
    model = fresh_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        train_step(model, optimizer, images, labels, global_batch=200)
    metrics = metrics_of(evaluate_step(model, images, labels))
    assert metrics.loss < 1.0  # ln 10 = 2.3 is what guessing costs
    assert metrics.accuracy > 0.6
