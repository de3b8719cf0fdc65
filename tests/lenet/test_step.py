"""Proves that a gradient is that of the mean cross-entropy of the global batch, however it is sliced or computed."""

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lenet.compiled import CompiledConvolutions
from lenet.fused import FusedGradient, open_gradient
from lenet.model import LeNet
from lenet.recipe import RECIPES
from lenet.step import (
    Gradient,
    GraphedGradient,
    PlainGradient,
    evaluate_step,
    flatten,
    metrics_of,
    no_counts,
    normalise,
)
from lenet.unfolded import UnfoldedConvolutions

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


def graphed(*args: Any) -> Gradient:
    return GraphedGradient(FusedGradient(*args, convolutions=UnfoldedConvolutions))


Kind = Callable[..., Gradient]
KINDS = {
    "plain": PlainGradient,
    "compiled": partial(FusedGradient, convolutions=CompiledConvolutions),
    "unfolded": partial(FusedGradient, convolutions=UnfoldedConvolutions),
    "graphed": graphed,
}
every = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
pytestmark = pytest.mark.usefixtures("recording")


def gradient_of(kind: Kind, model: LeNet, images: Tensor, labels: Tensor, global_batch: int) -> Tensor:
    model = copy.deepcopy(model)
    flat = flatten(model)
    assert flat.grad is not None
    flat.grad.fill_(torch.nan)  # what was there before is of no account
    kind(model, flat)(images, labels, global_batch=global_batch)
    return flat.grad


@every
def test_steps_equal_an_independent_plain_loop(kind: Kind, images: Tensor, labels: Tensor) -> None:
    model = fresh_model()
    plain = copy.deepcopy(model)
    flat = flatten(model)
    gradient, optimizer = kind(model, flat), torch.optim.SGD([flat], lr=0.9)
    for first in range(0, 200, 40):
        batch, classes = images[first : first + 40], labels[first : first + 40]
        gradient(batch, classes, global_batch=40)
        optimizer.step()
        loss = F.cross_entropy(plain(batch[:, None].float() / 255), classes.long())
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(plain.parameters(), gradients, strict=True):
                parameter -= 0.9 * slope
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("sizes", [[200], [100, 100], [199, 1], [67, 66, 67], [120, 0, 80], [0, 0, 0, 200]])
def test_the_gradients_of_any_slices_add_up_to_the_whole_batchs(
    kind: Kind, images: Tensor, labels: Tensor, sizes: list[int]
) -> None:
    model = fresh_model()
    whole = gradient_of(kind, model, images, labels, 200)
    ranks = [
        gradient_of(kind, model, batch, classes, 200)
        for batch, classes in zip(images.split(sizes), labels.split(sizes), strict=True)
    ]
    torch.testing.assert_close(torch.stack(ranks).sum(dim=0), whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("channels_last", [False, True])
def test_flat_is_the_model_and_its_gradient_is_the_models(channels_last: bool) -> None:
    model = fresh_model()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    flat = flatten(model)
    assert flat.shape == (61_706,)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.stride() == before[name].stride() for name, value in model.state_dict().items())
    with torch.no_grad():
        flat += 1
    assert flat.grad is not None
    flat.grad.fill_(2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, before[name] + 1)
        assert parameter.grad is not None
        assert (parameter.grad == 2).all()


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


@every
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_gradient_comes_with_the_counts_of_its_batch(
    kind: Kind, images: Tensor, labels: Tensor, smoothing: float
) -> None:
    model = fresh_model()
    counts = kind(model, flatten(model), smoothing)(images, labels, global_batch=200)
    torch.testing.assert_close(counts, evaluate_step(model, images, labels), rtol=1e-6, atol=0)


def test_metrics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no image was counted"):
        metrics_of(no_counts())


def test_pixels_become_zero_to_one_as_in_torchvision(images: Tensor) -> None:
    from torchvision.transforms.functional import to_tensor

    expected = torch.stack([to_tensor(image.numpy()) for image in images[:20]])
    assert torch.equal(normalise(images[:20]), expected)


def test_training_on_200_real_images_learns_them(images: Tensor, labels: Tensor) -> None:
    model = fresh_model()
    flat = flatten(model)
    gradient, optimizer = open_gradient(model, flat), torch.optim.Adam([flat], lr=0.01)
    for _ in range(60):
        gradient(images, labels, global_batch=200)
        optimizer.step()
    metrics = metrics_of(evaluate_step(model, images, labels))
    assert metrics.loss < 1.0  # ln 10 = 2.3 is what guessing costs
    assert metrics.accuracy > 0.6
