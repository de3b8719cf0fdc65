"""Proves that LeNet is the textbook's: its layers, its parameters, its logits, and which inputs it refuses.

And that a model that standardises pixels can be folded into one that does not, with the same logits.
"""

from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lenet.model import LeNet, fold_standardise, layer_table
from lenet.step import normalise

if TYPE_CHECKING:
    from tests.conftest import Splits

# (name, output shape for one image, parameters), as figure 7.6.1 of Dive into Deep Learning and LeCun's paper have it.
TEXTBOOK = [
    ("conv1", (6, 28, 28), 6 * (5 * 5 + 1)),
    ("pool1", (6, 14, 14), 0),
    ("conv2", (16, 10, 10), 16 * (6 * 5 * 5 + 1)),
    ("pool2", (16, 5, 5), 0),
    ("flatten", (400,), 0),
    ("fc1", (120,), 120 * (400 + 1)),
    ("fc2", (84,), 84 * (120 + 1)),
    ("fc3", (10,), 10 * (84 + 1)),
]


def reference_logits(weights: dict[str, Tensor], images: Tensor, padding: int = 2) -> Tensor:
    """The textbook's formulas: padding inside the first convolution, no modules."""
    x = torch.sigmoid(F.conv2d(images, weights["conv1.weight"], weights["conv1.bias"], padding=padding))
    x = F.avg_pool2d(x, 2)
    x = torch.sigmoid(F.conv2d(x, weights["conv2.weight"], weights["conv2.bias"]))
    x = F.avg_pool2d(x, 2).reshape(len(images), -1)
    x = torch.sigmoid(x @ weights["fc1.weight"].T + weights["fc1.bias"])
    x = torch.sigmoid(x @ weights["fc2.weight"].T + weights["fc2.bias"])
    return x @ weights["fc3.weight"].T + weights["fc3.bias"]


def random_images(count: int, side: int) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(1))


def test_logits_equal_the_textbook_formulas() -> None:
    model, images = LeNet(), random_images(7, 28)
    torch.testing.assert_close(model(images), reference_logits(model.state_dict(), images))


def test_lenet_has_61706_parameters() -> None:
    assert sum(p.numel() for p in LeNet().parameters()) == 61_706


@pytest.mark.parametrize("image_size", [28, 32])
def test_layers_have_the_textbook_shapes_and_counts(image_size: int) -> None:
    rows = {row.name: row for row in layer_table(LeNet(), image_size)}
    assert [(name, rows[name].output_shape, rows[name].parameters) for name, _, _ in TEXTBOOK] == TEXTBOOK
    assert sum(row.parameters for row in rows.values()) == 61_706


def test_layer_table_has_one_row_per_layer_in_the_order_they_run() -> None:
    kinds = [row.kind for row in layer_table(LeNet())]
    convolution = ["Conv2d", "Sigmoid", "AvgPool2d"]
    assert kinds == ["PadTo32", *convolution, *convolution, "Flatten", *["Linear", "Sigmoid"] * 2, "Linear"]


def test_28_pixels_give_the_logits_of_32_with_a_border_of_zeros() -> None:
    model, images = LeNet(), random_images(3, 28)
    framed = torch.zeros(3, 1, 32, 32)
    framed[:, :, 2:30, 2:30] = images
    assert torch.equal(model(images), model(framed))


@pytest.mark.parametrize("n_classes", [2, 10, 47])
def test_there_is_one_logit_per_class(n_classes: int) -> None:
    assert LeNet(n_classes)(random_images(5, 28)).shape == (5, n_classes)


@pytest.mark.parametrize("shape", [(1, 1, 27, 27), (1, 1, 28, 32), (1, 3, 28, 28), (1, 28, 28), (28, 28)])
def test_other_shapes_are_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="LeNet takes"):
        LeNet()(torch.zeros(shape))


@pytest.mark.parametrize("n_classes", [1, 0, -3])
def test_fewer_than_two_classes_are_refused(n_classes: int) -> None:
    with pytest.raises(ValueError, match=f"n_classes is {n_classes}; a classifier needs at least 2"):
        LeNet(n_classes)


def standardising(dtype: torch.dtype = torch.float32) -> LeNet:
    """Fashion-MNIST's mean and deviation, and Xavier's weights: larger than torch's, and so are errors."""
    torch.manual_seed(0)
    model = LeNet(10, pixel_mean=0.286, pixel_std=0.353)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
    return model.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("side", [28, 32])
def test_standardisation_folds_into_the_first_layer(
    small_splits: "Splits", side: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = standardising(dtype)
    images = normalise(torch.from_numpy(small_splits["test"][0])).to(dtype)
    images[0], images[1] = 1, 0  # up to the border, and nothing at all
    if side == 32:
        images = F.pad(images, (2, 2, 2, 2), value=1)
    plain = fold_standardise(model)
    logits = plain(images)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, model(images), rtol=0, atol=tolerance)
    # The border's share is right too, before sigmoids and pools make it small.
    hidden, expected = plain.conv1(plain.pad(images)), model.conv1(model.standardise(model.pad(images)))
    torch.testing.assert_close(hidden, expected, rtol=0, atol=10 * tolerance)


def test_folding_rounds_once_to_the_exact_values() -> None:
    model = standardising()
    plain = fold_standardise(model).conv1.state_dict()
    weight, bias = (value.tolist() for value in model.conv1.state_dict().values())
    mean, std = Fraction(0.286), Fraction(0.353)
    for filter_, (channel,) in enumerate(weight):
        exact = [[float(Fraction(value) / std) for value in line] for line in channel]
        assert torch.equal(plain["weight"][filter_, 0], torch.tensor(exact))
        shift = sum(Fraction(value) for line in channel for value in line) * mean / std
        assert plain["bias"][filter_] == torch.tensor(float(Fraction(bias[filter_]) - shift))


def test_a_folded_model_is_a_plain_one_and_the_model_stays_as_it_was() -> None:
    model = standardising()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    plain = fold_standardise(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [name for name, _ in plain.named_children()] == [name for name, _ in LeNet().named_children()]
    assert list(plain.state_dict()) == list(model.state_dict()) == list(LeNet().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "standardise" in dict(model.named_children())
    with torch.no_grad():
        plain.conv2.weight.zero_()
    assert torch.equal(model.conv2.weight, before["conv2.weight"])


def test_standardised_pixels_have_mean_0_and_deviation_1_and_the_border_stays_black() -> None:
    images = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    mean, std = images.mean().item(), images.std(correction=0).item()
    model = LeNet(10, mean, std)
    out = model.standardise(model.pad(images))
    assert out[:, :, 2:-2, 2:-2].mean().item() == pytest.approx(0, abs=1e-12)
    assert out[:, :, 2:-2, 2:-2].std(correction=0).item() == pytest.approx(1)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert torch.allclose(out[:, :, border], torch.tensor(-mean / std, dtype=torch.float64))


def test_a_standardising_model_gives_the_textbooks_logits_of_standardised_images() -> None:
    model, images = standardising(), random_images(5, 32)
    expected = reference_logits(model.state_dict(), (images - 0.286) / 0.353, padding=0)
    torch.testing.assert_close(model(images), expected)


def test_standardisation_is_a_row_of_the_layer_table_without_parameters() -> None:
    rows = layer_table(standardising())
    assert [(row.name, row.output_shape, row.parameters) for row in rows[:2]] == [
        ("pad", (1, 32, 32), 0),
        ("standardise", (1, 32, 32), 0),
    ]
    assert sum(row.parameters for row in rows) == 61_706


@pytest.mark.parametrize("model", [LeNet(), LeNet(10, 0.0, 1.0)])
def test_a_model_that_does_not_standardise_is_the_plain_one(model: LeNet) -> None:
    assert [name for name, _ in model.named_children()][:2] == ["pad", "conv1"]
    folded = fold_standardise(model)
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in model.state_dict().items())


def test_standardising_does_not_change_the_weights_that_a_seed_gives() -> None:
    torch.manual_seed(0)
    plain = LeNet().state_dict()
    torch.manual_seed(0)
    other = LeNet(10, 0.286, 0.353).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in plain.items())


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_pixels_without_a_deviation_cannot_be_standardised(std: float) -> None:
    with pytest.raises(ValueError, match=f"standard deviation is {std}; it has to be above 0"):
        LeNet(10, 0.5, std)
