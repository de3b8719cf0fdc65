"""Proves that the gradient written out by hand is autograd's, for every shape, size, activation and pooling."""

from collections.abc import Callable
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lenet
from lenet import compiled
from lenet.compiled import NEEDS, CompiledConvolutions, library_for
from lenet.fused import PIECE, Convolutions, FusedGradient, open_gradient
from lenet.model import ACTIVATIONS, POOLINGS, LeNet
from lenet.recipe import RECIPES
from lenet.step import Gradient, PlainGradient, evaluate_step, flatten, no_counts
from lenet.unfolded import UnfoldedConvolutions

if TYPE_CHECKING:
    from tests.conftest import Splits

Kind = Callable[[LeNet, nn.Parameter, float], Gradient]
COMPILED = partial(FusedGradient, convolutions=CompiledConvolutions)
UNFOLDED = partial(FusedGradient, convolutions=UnfoldedConvolutions)
ROUGH = partial(FusedGradient, convolutions=partial(UnfoldedConvolutions, dtype=torch.bfloat16))
BY_LANES = {
    f"compiled for {lanes}": partial(FusedGradient, convolutions=partial(CompiledConvolutions, code=code))
    for lanes in NEEDS
    if (code := library_for(lanes))
}
either = pytest.mark.parametrize("fused", [*BY_LANES.values(), UNFOLDED], ids=[*BY_LANES, "unfolded"])
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


@either
@settings(max_examples=40, deadline=None)
@given(
    size=st.one_of(st.integers(0, 3), st.integers(0, 300), st.sampled_from([PIECE - 1, PIECE, PIECE + 1, 2 * PIECE])),
    side=st.sampled_from([28, 32]),
    scaling=st.sampled_from([(0.0, 1.0), (0.286, 0.353)]),
    kind=st.tuples(st.sampled_from(list(ACTIVATIONS)), st.sampled_from(list(POOLINGS))),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_it_is_autograds(
    fused: Kind,
    images: Tensor,
    labels: Tensor,
    size: int,
    side: int,
    scaling: tuple[float, float],
    kind: tuple[str, str],
    smoothing: float,
) -> None:
    """Largest difference seen: 6e-7, where gradients go up to 0.2; and 2e-5 where one of two pixels that are nearly as
    large was taken for the larger, as happens to autograd beside its own float64."""
    batch = images[:size] if side == 28 else F.pad(images[:size], (2, 2, 2, 2))
    plain, plain_counts = computed(PlainGradient, batch, labels[:size], smoothing, *scaling, *kind)
    gradient, fused_counts = computed(fused, batch, labels[:size], smoothing, *scaling, *kind)
    torch.testing.assert_close(gradient, plain, rtol=0, atol=5e-5 if kind[1] == "max" else 2e-6)
    torch.testing.assert_close(fused_counts, plain_counts, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_bfloat16_it_is_no_further_off_than_torchs_own(
    images: Tensor, labels: Tensor, activation: str, pooling: str
) -> None:
    """As a GPU does it. Seen: 0.002 to 0.036, and autocast's 0.004 to 0.037."""

    def error(of: Tensor) -> float:
        return ((of - exact)[:OF_CONVOLUTIONS].norm() / exact[:OF_CONVOLUTIONS].norm()).item()

    kind = (0.286, 0.353, activation, pooling)
    exact, counts = computed(PlainGradient, images, labels, 0.1, *kind)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        theirs, _ = computed(PlainGradient, images, labels, 0.1, *kind)
    rough, rough_counts = computed(ROUGH, images, labels, 0.1, *kind)
    assert rough.dtype == torch.float32
    assert 1e-4 < error(rough) < 1.1 * error(theirs)  # none would mean that it was float32
    torch.testing.assert_close(rough_counts[0], counts[0], rtol=0.01, atol=0)
    assert rough_counts[2] == counts[2]


@either
def test_images_need_not_lie_in_rows(fused: Kind, images: Tensor, labels: Tensor) -> None:
    turned = images.transpose(1, 2)
    gradient, _ = computed(fused, turned, labels, 0.0)
    rows, _ = computed(fused, turned.contiguous(), labels, 0.0)
    assert torch.equal(gradient, rows)


@either
@pytest.mark.parametrize("shape", [(3, 60, 60), (3, 32, 28), (3, 28, 32), (3, 20, 20), (3, 30, 30)])
def test_other_shapes_are_refused_before_memory_is_touched(fused: Kind, labels: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not uint8"):
        computed(fused, torch.zeros(shape, dtype=torch.uint8), labels[:3], 0.0)


@either
def test_other_types_are_refused(fused: Kind, images: Tensor, labels: Tensor) -> None:
    model = LeNet()
    gradient = fused(model, flatten(model), 0.0)
    gradient(images, labels, global_batch=300)
    with pytest.raises(ValueError, match=r"float32 \(128, 28, 28\)"):
        gradient(images.float(), labels, global_batch=300)


@either
def test_sizes_that_alternate_do_not_disturb_each_other(fused: Kind, images: Tensor, labels: Tensor) -> None:
    model = RECIPES["seed"].build_model(10, seed=0)
    flat = flatten(model)
    gradient = fused(model, flat, 0.0)
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
    for kind in (PlainGradient, *BY_LANES.values(), UNFOLDED, ROUGH):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LeNet(activation="tanh")
        flat = flatten(model)
        gradient, optimizer = kind(model, flat), torch.optim.SGD([flat], lr=0.2)
        losses = []
        for step in range(80):
            rows = torch.arange(step * 128, (step + 1) * 128) % len(labels)
            losses.append(gradient(images[rows], labels[rows], global_batch=128)[0])
            optimizer.step()
        curves.append(torch.stack(losses) / 128)
        weights.append(flat.detach())
    assert curves[0][-1] < 1
    for curve, ends in zip(curves[1:-1], weights[1:-1], strict=True):
        torch.testing.assert_close(curve, curves[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(ends, weights[0], rtol=0, atol=1e-4)
    # In bfloat16: 6e-4 seen, and 3e-4 of the weights' norm.
    torch.testing.assert_close(curves[-1], curves[0], rtol=3e-3, atol=0)
    assert (weights[-1] - weights[0]).norm() < 2e-3 * weights[0].norm()


@pytest.mark.parametrize("kind", [PlainGradient, COMPILED, UNFOLDED, ROUGH])
def test_what_it_evaluates_is_the_model_as_it_is_now_in_float32(kind: Kind, images: Tensor, labels: Tensor) -> None:
    model = RECIPES["seed"].build_model(10, seed=0)
    gradient = kind(model, flatten(model), 0.0)
    gradient(images[:128], labels[:128], global_batch=128)
    with torch.no_grad():
        model.fc3.weight.mul_(5)
    counts = gradient.evaluate(images, labels)
    torch.testing.assert_close(counts, evaluate_step(model, images, labels), rtol=1e-6, atol=0)
    assert torch.equal(gradient.evaluate(images[:0], labels[:0]), no_counts())


@either
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_no_number_is_not_made_one(
    fused: Kind, images: Tensor, labels: Tensor, activation: str, pooling: str
) -> None:
    """Training stops at a loss that is not finite: no activation and no maximum may hide one."""
    model = LeNet(10, 0.0, 1.0, activation, pooling)  # type: ignore[arg-type]
    flat = flatten(model)
    with torch.no_grad():
        model.conv1.weight[3, 0, 2, 2] = torch.nan
    loss, _, _ = fused(model, flat, 0.0)(images, labels, global_batch=300)
    assert loss.isnan()


@either
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_activations_at_their_ends_are_as_flat_as_autograds(
    fused: Kind, images: Tensor, labels: Tensor, activation: str
) -> None:
    gradients = []
    for kind in (PlainGradient, fused):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = LeNet(activation=activation)  # type: ignore[arg-type]
        flat = flatten(model)
        with torch.no_grad():
            model.conv1.weight.mul_(1e6)
            model.conv1.bias[:3] = torch.tensor([1e30, -1e30, -torch.inf])
        kind(model, flat, 0.0)(images, labels, global_batch=300)
        gradients.append(flat.grad)
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=5e-6)


def test_the_compiled_ones_are_here() -> None:
    """Installing compiles them; where that failed, the tests would prove nothing of them."""
    processor = torch.cpu.get_capabilities()
    able = [lanes for lanes, needs in NEEDS.items() if all(processor.get(need) for need in needs)]
    assert able, "the compiled convolutions are for processors with AVX2"
    assert all(map(library_for, able)), "install with a C compiler at hand"
    assert compiled.library() is library_for(able[0])


@pytest.mark.parametrize("content", [None, b"no library"], ids=["absent", "for another system"])
def test_without_them_torchs_operations_do_it(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        for lanes in NEEDS:
            (tmp_path / f"_convolution{lanes}{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    monkeypatch.setattr(lenet, "__path__", [str(tmp_path)])
    compiled.library_for.cache_clear()
    try:
        model = LeNet()
        assert kind_of(open_gradient(model, flatten(model))) is UnfoldedConvolutions
        with pytest.raises(RuntimeError, match="not compiled"):
            CompiledConvolutions(model, {}, 8, 28)
    finally:
        compiled.library_for.cache_clear()


def test_it_is_chosen_for_what_the_processor_is_fast_at() -> None:
    model = LeNet()
    assert kind_of(open_gradient(model, flatten(model))) is CompiledConvolutions
    assert kind_of(open_gradient(model, flatten(model), bfloat16=True)) is CompiledConvolutions
    double = LeNet().double()
    assert type(open_gradient(double, flatten(double))) is PlainGradient


def kind_of(gradient: Gradient) -> Callable[..., Convolutions]:
    assert isinstance(gradient, FusedGradient)
    return gradient.convolutions
