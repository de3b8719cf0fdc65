"""Proves that a picture is classified as its image in the dataset is, however it was saved."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import softmax

from lenet.model import LeNet
from pipeline.errors import DataError
from pipeline.feed import find_feed
from pipeline.idx import Pixels
from pipeline.pictures import decode_picture
from pipeline.predict import predict_pictures, prepare_picture, probabilities
from pipeline.predictions import read_predictions
from pipeline.scorer import Job, Scorer
from pipeline.served import Served, open_model
from pipeline.sharding import ShardConfig, write_shards
from pipeline.source import Source
from pipeline.storage import Store, open_store
from pipeline.train import staging

if TYPE_CHECKING:
    from tests.conftest import Splits
    from tests.pipeline.conftest import Receipts


@pytest.fixture(scope="session")
def served(good_models: list[LeNet]) -> Served:
    classes = ("shirt", "trouser", "pullover", "dress", "coat", "sandal", "blouse", "sneaker", "bag", "boot")
    return Served("r", None, "r", classes, (28, 28), "0" * 64, good_models[-1].eval(), "runs/r")


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


@pytest.fixture
def boot(small_splits: "Splits") -> Pixels:
    """The first test image, an ankle boot on black."""
    return small_splits["test"][0][0]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def enlarged(image: Pixels, factor: int = 10) -> Image.Image:
    height, width = image.shape
    return Image.fromarray(image).resize((factor * width, factor * height), Image.Resampling.BICUBIC)


def assert_like(found: Pixels, image: Pixels) -> None:
    """As near to the image, enlarged and made small again, as JPEG comes."""
    plain = decode_picture(encoded(enlarged(image)), 28)
    assert np.abs(found.astype(int) - plain).mean() < 2


def test_what_was_trained_on_is_taken_as_it_is(small_splits: "Splits") -> None:
    for image in small_splits["test"][0]:
        prepared = prepare_picture(encoded(Image.fromarray(image)), 28)
        assert np.array_equal(prepared.image, image)
        assert (prepared.inverted, prepared.resized_from) == (False, None)


@pytest.mark.parametrize("on_white", [False, True])
def test_a_printers_photo_becomes_the_image(boot: Pixels, on_white: bool) -> None:
    photo = enlarged(255 - boot if on_white else boot).convert("CMYK")
    prepared = prepare_picture(encoded(photo, "JPEG", quality=95), 28)
    assert_like(prepared.image, boot)
    assert (prepared.inverted, prepared.resized_from) == (on_white, (280, 280))


def test_what_is_drawn_on_nothing_is_put_on_the_ground_that_shows_it(boot: Pixels) -> None:
    alpha = enlarged(np.where(boot > 0, 255, 0).astype(np.uint8))
    on_black = np.where(boot > 0, boot.clip(150), 0).astype(np.uint8)
    for drawn, inverted in ((boot.clip(150), False), (255 - boot.clip(150), True)):
        prepared = prepare_picture(encoded(Image.merge("LA", (enlarged(drawn), alpha))), 28)
        assert prepared.inverted is inverted
        assert_like(prepared.image, on_black)


def test_a_palette_with_a_transparent_colour_and_16_bits(boot: Pixels) -> None:
    drawn = Image.fromarray(np.where(boot > 0, 1, 0).astype(np.uint8), "P")
    drawn.putpalette([0, 0, 0, 255, 255, 255])
    assert np.array_equal(prepare_picture(encoded(drawn, transparency=0), 28).image, np.where(boot > 0, 255, 0))
    wide = Image.fromarray(boot.astype(np.uint16) * 257)
    assert np.array_equal(prepare_picture(encoded(wide), 28).image, boot)


@pytest.mark.parametrize("background", [0, 255])
def test_what_is_not_square_is_padded_with_its_background(boot: Pixels, background: int) -> None:
    lit = 255 - boot if background else boot
    cut = lit[5:23]  # the boot, wider than high, and a row or more of its ground on either side
    assert (cut[[0, -1]] == background).all()
    centred = np.zeros_like(boot)
    centred[5:23] = 255 - cut if background else cut
    lying, standing = (prepare_picture(encoded(enlarged(pixels)), 28) for pixels in (cut, cut.T))
    assert (lying.resized_from, standing.resized_from) == ((180, 280), (280, 180))
    assert_like(lying.image, centred)
    assert_like(standing.image, centred.T)


def test_a_photo_is_turned_as_its_camera_was_held(boot: Pixels) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter clockwise
    photo = enlarged(np.rot90(boot)).convert("RGB")
    assert_like(prepare_picture(encoded(photo, "JPEG", exif=exif, quality=95), 28).image, boot)


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([28, 32]), st.integers(0, 2**32 - 1))
def test_any_picture_gives_an_image_of_the_size(height: int, width: int, size: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    data = encoded(Image.fromarray(pixels))
    prepared = prepare_picture(data, size)
    assert prepared.image.shape == (size, size)
    assert prepared.image.dtype == np.uint8
    if height == width:  # but for light and dark, what a dataset would have been given
        plain = decode_picture(data, size)
        assert np.array_equal(prepared.image, 255 - plain if prepared.inverted else plain)


@pytest.mark.parametrize("shape", [(200_000, 20), (1, 300_000)])
def test_a_very_long_picture_takes_no_more_memory_than_a_large_one(shape: tuple[int, int]) -> None:
    data = encoded(Image.new("L", shape[::-1], 7))
    with pytest.MonkeyPatch.context() as patch:
        sizes: list[tuple[int, int]] = []
        new = Image.new
        patch.setattr(Image, "new", lambda mode, size, *rest: sizes.append(size) or new(mode, size, *rest))
        prepared = prepare_picture(data, 28)
    assert sizes == [(8000, 8000)]
    assert (prepared.image == 7).all()
    assert prepared.resized_from == shape


def test_photos_on_white_are_recognised_like_the_images(served: Served, small_splits: "Splits", tmp_path: Path) -> None:
    images, labels = (array[:100] for array in small_splits["test"])
    paths = [tmp_path / f"{row}.jpg" for row in range(100)]
    for image, path in zip(images, paths, strict=True):
        path.write_bytes(encoded(enlarged(255 - image, 8), "JPEG", quality=90))
    found = predict_pictures(served, paths)
    assert all(prediction.inverted for prediction in found)
    assert [prediction.path for prediction in found] == [str(path) for path in paths]
    right = sum(int(np.argmax(each.probabilities)) == label for each, label in zip(found, labels, strict=True))
    plain = int((served.predict(images).argmax(axis=1) == labels).sum())
    assert plain > 70
    assert right >= plain - 3


@pytest.mark.parametrize("wide", [True, False])
def test_a_model_of_pictures_takes_pictures_as_it_was_trained_and_evaluated_on_them(
    local_store: Store, trained: Callable[..., "Receipts"], bring: Callable[..., Source], good_models: list[LeNet],
    small_splits: "Splits", tmp_path: Path, wide: bool,
) -> None:  # fmt: skip
    for split, count in (("train", 60), ("test", 30)):
        for row, (image, label) in enumerate(zip(*small_splits[split], strict=True)):
            if row < count:
                path = tmp_path / "photos" / split / str(label) / f"{row:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(255 - image).resize((56 if wide else 28, 28)).save(path)
    manifest = write_shards(local_store, bring(tmp_path / "photos"), ShardConfig())
    left = trained(local_store, "r", model=good_models[-1], manifest=manifest)
    left.publish(local_store)
    served = open_model(f"{local_store.url}/runs/r")
    (kept,) = read_predictions(local_store, staging("r"), left.evaluation.predictions)
    paths = sorted((tmp_path / "photos" / "test").glob("*/*.png"))
    found = predict_pictures(served, paths)
    np.testing.assert_allclose([one.probabilities for one in found], probabilities(kept.logits), atol=1e-6)
    assert {(one.inverted, one.resized_from) for one in found} == {(False, (28, 56) if wide else None)}
    feed = find_feed(str(tmp_path / "photos" / "test"), "image", 28)
    job = Job(feed.store, open_store(str(tmp_path / "out")), served, "image", served.form("auto"), "0" * 16)
    (part,) = Scorer(job).answer(feed.units[0]).parts
    table = pq.read_table(pa.BufferReader(job.output.read(f"{job.folder}/{part.name}")))
    assert np.array_equal(table["predicted"], kept.predicted)
    turned = predict_pictures(served, paths, "yes")  # it can be overruled
    assert all(one.inverted for one in turned)
    logits = served.predict(np.stack([255 - decode_picture(path, 28) for path in paths]))
    np.testing.assert_allclose([one.probabilities for one in turned], probabilities(logits), atol=1e-6)


def test_probabilities_of_large_logits_are_finite() -> None:
    assert probabilities(np.array([[1e4, 0, -1e4]], np.float32)).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither PNG nor JPEG"),
        (encoded(Image.new("L", (300, 300)))[:-30], ""),
        (encoded(Image.new("L", (8001, 8000))), "8001x8000 pixels, more than 64000000"),
    ],
)
def test_a_torn_or_huge_picture_is_named_in_a_line(served: Served, tmp_path: Path, content: bytes, reason: str) -> None:
    bad = tmp_path / "bad\n.png"
    bad.write_bytes(content)
    with pytest.raises(DataError, match=rf"/bad\\n\.png: .*{reason}.*; give a whole PNG or JPEG$"):
        predict_pictures(served, [bad])
