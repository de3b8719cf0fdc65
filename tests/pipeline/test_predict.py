"""Proves that a picture is classified as its image in the dataset is, however it was saved."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from lenet.model import LeNet
from pipeline.errors import DataError
from pipeline.idx import Pixels
from pipeline.predict import predict_pictures, prepare_picture
from pipeline.registry import Served

if TYPE_CHECKING:
    from tests.conftest import Splits


@pytest.fixture(scope="session")
def served(good_models: list[LeNet]) -> Served:
    classes = ("shirt", "trouser", "pullover", "dress", "coat", "sandal", "blouse", "sneaker", "bag", "boot")
    return Served("r", None, "r", classes, (28, 28), "0" * 64, good_models[-1].eval())


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(pixels: Pixels, name: str = "picture.png", mode: str = "L", **options: object) -> Path:
        Image.fromarray(pixels).convert(mode).save(tmp_path / name, **options)  # type: ignore[arg-type]
        return tmp_path / name

    return write


def test_pictures_of_dataset_images_are_classified_as_those_images(
    served: Served, small_splits: "Splits", save: Callable[..., Path]
) -> None:
    images = small_splits["test"][0][:20]
    found = predict_pictures(served, [save(image, f"{n}.png") for n, image in enumerate(images)], "no")
    expected = softmax(served.predict(images).astype(np.float64), axis=1)
    np.testing.assert_allclose([one.probabilities for one in found], expected, atol=1e-6)
    assert [one.name for one in found] == [served.classes[row.argmax()] for row in expected]
    assert found[0].probability == max(found[0].probabilities)
    assert sum(found[0].probabilities) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_dark_on_light_is_turned_round_and_colour_does_not_matter(
    small_splits: "Splits", save: Callable[..., Path], mode: str
) -> None:
    image = small_splits["test"][0][0]
    pixels, inverted, size = prepare_picture(save(255 - image, mode=mode), 28, "auto")
    assert inverted
    assert size is None
    assert np.abs(pixels.astype(int) - image).max() <= 1
    again, inverted, _ = prepare_picture(save(image, mode=mode), 28, "auto")
    assert not inverted
    assert np.abs(again.astype(int) - image).max() <= 1


def test_a_light_border_can_be_overruled(small_splits: "Splits", save: Callable[..., Path]) -> None:
    image = small_splits["test"][0][0]
    assert np.array_equal(prepare_picture(save(255 - image), 28, "no")[0], 255 - image)
    assert np.array_equal(prepare_picture(save(image), 28, "yes")[0], 255 - image)


def test_larger_and_oblong_pictures_are_not_stretched(small_splits: "Splits", save: Callable[..., Path]) -> None:
    image = small_splits["test"][0][1]
    large = image.repeat(10, axis=0).repeat(10, axis=1)
    pixels, _, size = prepare_picture(save(large, "large.jpg", quality=95), 28, "auto")
    assert size == (280, 280)
    assert np.abs(pixels.astype(int) - image).mean() < 15  # the filter widens edges by half a pixel
    wide = np.pad(255 - large, ((0, 0), (200, 200)), constant_values=255)
    pixels, inverted, size = prepare_picture(save(wide, "wide.png"), 28, "auto")
    assert (size, inverted) == ((280, 680), True)
    inside = np.zeros_like(image)
    assert pixels[:8].max() < 4  # what was added above is background
    assert pixels[:, :8].max() < 4
    assert pixels[9:19, 9:19].mean() > inside.mean()


def test_what_is_no_picture_is_named(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no picture")
    with pytest.raises(DataError, match=r"notes\.txt: neither PNG nor JPEG; give a whole PNG or JPEG"):
        predict_pictures(served, [file])
    with pytest.raises(DataError, match=r"nowhere\.png: "):
        predict_pictures(served, [tmp_path / "nowhere.png"])


def test_no_pictures_are_no_predictions(served: Served) -> None:
    assert predict_pictures(served, []) == []
