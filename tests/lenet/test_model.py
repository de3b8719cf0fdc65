"""Proves that LeNet is the textbook's: its layers, its parameters, its logits, and which inputs it refuses."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lenet.model import LeNet, fold_standardise, layer_table

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


def reference_logits(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The textbook's formulas: padding inside the first convolution, no modules."""
    x = torch.sigmoid(F.conv2d(images, weights["conv1.weight"], weights["conv1.bias"], padding=2))
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


@pytest.mark.parametrize("side", [28, 32])
def test_standardisation_folds_into_the_first_layer(side: int) -> None:
    torch.manual_seed(0)
    model = LeNet(10, pixel_mean=0.286, pixel_std=0.353).double()
    images = torch.rand(16, 1, side, side, dtype=torch.float64)
    plain = fold_standardise(model.float()).double()
    torch.testing.assert_close(plain(images), model.double()(images), rtol=0, atol=1e-6)
    assert "Standardise" not in [row.kind for row in layer_table(plain.float())]
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_standardised_pixels_have_mean_0_and_deviation_1_and_the_border_stays_black() -> None:
    images = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    mean, std = images.mean().item(), images.std(correction=0).item()
    model = LeNet(10, mean, std)
    out = model.standardise(model.pad(images))
    assert out[:, :, 2:-2, 2:-2].mean().item() == pytest.approx(0, abs=1e-12)
    assert out[:, :, 2:-2, 2:-2].std(correction=0).item() == pytest.approx(1)
    assert torch.allclose(out[:, :, :2], torch.tensor(-mean / std, dtype=torch.float64))


def test_a_model_that_does_not_standardise_is_the_plain_one() -> None:
    torch.manual_seed(0)
    model = LeNet()
    assert [name for name, _ in model.named_children()][:2] == ["pad", "conv1"]
    folded = fold_standardise(model)
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in model.state_dict().items())


def test_pixels_that_are_all_the_same_cannot_be_standardised() -> None:
    with pytest.raises(ValueError, match="standard deviation is 0.0; it has to be above 0"):
        LeNet(10, 0.5, 0.0)
