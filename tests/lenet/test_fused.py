"""Proves that the gradient written out by hand is autograd's, for every shape, size, activation and pooling."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lenet.fused import PIECE, FusedGradient, multiplies_bfloat16, open_gradient
from lenet.model import ACTIVATIONS, POOLINGS, LeNet
from lenet.recipe import RECIPES
from lenet.step import Gradient, PlainGradient, flatten

if TYPE_CHECKING:
    from tests.conftest import Splits

Kind = Callable[[LeNet, nn.Parameter, float], Gradient]
OF_CONVOLUTIONS = 6 * 25 + 6 + 16 * 150 + 16  # the first parameters


@pytest.fixture(scope="module")
def images(small_splits: "Splits") -> Tensor:
    return torch.from_numpy(small_splits["train"][0][:300])


@pytest.fixture(scope="module")
def labels(small_splits: "Splits") -> Tensor:
    return torch.from_numpy(small_splits["train"][1][:300])


def computed(kind: Kind, batch: Tensor, classes: Tensor, smoothing: float, *args: object) -> tuple[Tensor, Tensor]:
    """The gradient and the counts, by one of the two, of a model that is always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LeNet(10, *args).to(memory_format=torch.channels_last)  # type: ignore[arg-type]
    flat = flatten(model)
    counts = kind(model, flat, smoothing)(batch, classes, global_batch=256)
    assert flat.grad is not None
    return flat.grad, counts


@settings(max_examples=40, deadline=None)
@given(
    size=st.one_of(st.integers(0, 3), st.integers(0, 300), st.sampled_from([PIECE - 1, PIECE, PIECE + 1, 2 * PIECE])),
    side=st.sampled_from([28, 32]),
    scaling=st.sampled_from([(0.0, 1.0), (0.286, 0.353)]),
    kind=st.tuples(st.sampled_from(list(ACTIVATIONS)), st.sampled_from(list(POOLINGS))),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_it_is_autograds(
    images: Tensor,
    labels: Tensor,
    size: int,
    side: int,
    scaling: tuple[float, float],
    kind: tuple[str, str],
    smoothing: float,
) -> None:
    """Largest difference seen: 6e-7, where gradients go up to 0.2."""
    batch = images[:size] if side == 28 else F.pad(images[:size], (2, 2, 2, 2))
    plain, plain_counts = computed(PlainGradient, batch, labels[:size], smoothing, *scaling, *kind)
    fused, fused_counts = computed(FusedGradient, batch, labels[:size], smoothing, *scaling, *kind)
    torch.testing.assert_close(fused, plain, rtol=0, atol=5e-6)
    torch.testing.assert_close(fused_counts, plain_counts, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_bfloat16_it_is_no_further_off_than_torchs_own(
    images: Tensor, labels: Tensor, activation: str, pooling: str
) -> None:
    """Whether or not this processor is one it is chosen for. Seen: 0.002 to 0.036, and autocast's 0.004 to 0.037."""

    def autocast(model: LeNet, flat: nn.Parameter, smoothing: float) -> Gradient:
        gradient = PlainGradient(model, flat, smoothing)
        gradient.bfloat16 = True
        return gradient

    def error(of: Tensor) -> float:
        return ((of - exact)[:OF_CONVOLUTIONS].norm() / exact[:OF_CONVOLUTIONS].norm()).item()

    kind = (0.286, 0.353, activation, pooling)
    exact, counts = computed(PlainGradient, images, labels, 0.1, *kind)
    theirs, _ = computed(autocast, images, labels, 0.1, *kind)
    rough, rough_counts = computed(partial(FusedGradient, dtype=torch.bfloat16), images, labels, 0.1, *kind)
    assert rough.dtype == torch.float32
    assert 1e-4 < error(rough) < 1.1 * error(theirs)  # none would mean that it was float32
    torch.testing.assert_close(rough_counts[0], counts[0], rtol=0.01, atol=0)
    assert rough_counts[2] == counts[2]


def test_sizes_that_alternate_do_not_disturb_each_other(images: Tensor, labels: Tensor) -> None:
    model = RECIPES["seed"].build_model(10, seed=0)
    flat = flatten(model)
    gradient = FusedGradient(model, flat)
    assert flat.grad is not None
    first = gradient(images[:100], labels[:100], global_batch=256), flat.grad.clone()
    for size in (7, 0, 100, 130):
        gradient(images[:size], labels[:size], global_batch=256)
    again = gradient(images[:100], labels[:100], global_batch=256), flat.grad
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_training_by_it_follows_autograds_loss_curve(small_splits: "Splits") -> None:
    """Through the steep part of the curve, where differences grow, and which tanh reaches sooner than sigmoid."""
    images, labels = (torch.from_numpy(array) for array in small_splits["train"])
    curves, weights = [], []
    for kind in (PlainGradient, FusedGradient, partial(FusedGradient, dtype=torch.bfloat16)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LeNet(activation="tanh")
        flat = flatten(model)
        gradient, optimizer = kind(model, flat), torch.optim.SGD([flat], lr=0.2)
        losses = []
        for step in range(80):
            rows = torch.arange(step * 256, (step + 1) * 256) % len(labels)
            losses.append(gradient(images[rows], labels[rows], global_batch=256)[0])
            optimizer.step()
        curves.append(torch.stack(losses) / 256)
        weights.append(flat.detach())
    assert curves[0][-1] < 1
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-4)
    # In bfloat16: 6e-4 seen, and 3e-4 of the weights' norm.
    torch.testing.assert_close(curves[2], curves[0], rtol=3e-3, atol=0)
    assert (weights[2] - weights[0]).norm() < 2e-3 * weights[0].norm()


def test_it_is_chosen_for_what_the_processor_is_fast_at() -> None:
    model = LeNet()
    assert isinstance(open_gradient(model, flatten(model)), FusedGradient)
    rough = open_gradient(model, flatten(model), bfloat16=True)
    assert getattr(rough, "dtype", None) == (torch.bfloat16 if multiplies_bfloat16() else None)
    double = LeNet().double()
    assert type(open_gradient(double, flatten(double))) is PlainGradient
