"""Proves that what is done to test images is what it is called, and that speed is measured within bounds."""

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.idx import Pixels
from pipeline.metrics import Logits
from pipeline.probe import REPEATS, WARM_UPS, blurred, noisy, robustness, rotated, shifted, speed

if TYPE_CHECKING:
    from tests.conftest import Splits


def constant(images: Pixels) -> Logits:
    """Always says class 3."""
    return np.tile(np.eye(10, dtype=np.float32)[3], (len(images), 1))


def by_brightness(images: Pixels) -> Logits:
    """Says a class by the sum of the pixels: deterministic, and moved by what is done to them."""
    return np.eye(10, dtype=np.float32)[images.reshape(len(images), -1).sum(axis=1) // 977 % 10]


def test_twelve_changes_are_tried_and_come_out_the_same_every_time(small_splits: "Splits") -> None:
    images, labels = small_splits["test"]
    found = robustness(by_brightness, images, labels)
    assert [(one.change, one.strength) for one in found] == [
        *(("shift", s) for s in (1, 2, 4)), *(("rotation", s) for s in (5, 15, 30)),
        *(("noise", s) for s in (0.05, 0.1, 0.2)), *(("blur", s) for s in (0.5, 1.0, 1.5)),
    ]  # fmt: skip
    assert robustness(by_brightness, images, labels) == found
    assert all(one.images == 200 and one.accuracy_low <= one.accuracy <= one.accuracy_high for one in found)


def test_a_model_that_does_not_look_is_not_disturbed(small_splits: "Splits") -> None:
    images, labels = small_splits["test"]
    assert {one.accuracy for one in robustness(constant, images, labels)} == {(labels == 3).mean()}


def test_a_shift_goes_up_right_down_and_left_with_black_behind() -> None:
    image = np.arange(1, 17, dtype=np.uint8).reshape(4, 4)
    up, right, down, left = shifted(np.stack([image] * 4), 1)
    assert np.array_equal(up, np.pad(image[1:], ((0, 1), (0, 0))))
    assert np.array_equal(right, np.pad(image[:, :-1], ((0, 0), (1, 0))))
    assert np.array_equal(down, np.pad(image[:-1], ((1, 0), (0, 0))))
    assert np.array_equal(left, np.pad(image[:, 1:], ((0, 0), (0, 1))))


@pytest.mark.parametrize("degrees", [5, 15, 30])
def test_a_rotation_is_that_of_pillow(small_splits: "Splits", degrees: int) -> None:
    images = small_splits["test"][0][:10]
    found = rotated(images, degrees)
    for place, (image, turned) in enumerate(zip(images, found, strict=True)):
        clockwise = degrees if place % 2 == 0 else -degrees
        expected = np.asarray(Image.fromarray(image).rotate(-clockwise, Image.Resampling.BILINEAR))
        inside = np.s_[6:-6, 6:-6]  # at the edge the two mix in black differently
        assert np.abs(turned[inside].astype(int) - expected[inside]).mean() < 1.5
    assert np.array_equal(rotated(images, 0), images)


@pytest.mark.parametrize("part", [0.05, 0.2])
def test_noise_has_its_deviation(part: float) -> None:
    grey = np.full((100, 28, 28), 128, np.uint8)
    found = noisy(grey, part)
    assert found.std() / 255 == pytest.approx(part, rel=0.03)
    assert found.mean() == pytest.approx(128, abs=0.5)
    assert np.array_equal(noisy(grey, part), found)
    assert np.array_equal(noisy(grey, 0), grey)


def test_a_blur_keeps_the_light_and_is_near_pillows() -> None:
    dot = np.zeros((1, 28, 28), np.uint8)
    dot[0, 12:16, 12:16] = 255
    found = blurred(dot, 1.5)
    assert found.sum() == pytest.approx(dot.sum(), rel=0.02)
    expected = np.asarray(Image.fromarray(dot[0]).filter(ImageFilter.GaussianBlur(1.5)))
    assert np.abs(found[0].astype(int) - expected).max() < 12
    assert np.array_equal(blurred(dot, 0.0), dot)


def test_images_are_left_as_they_were(small_splits: "Splits") -> None:
    images = np.array(small_splits["test"][0])
    before = images.copy()
    robustness(constant, images, small_splits["test"][1])
    assert np.array_equal(images, before)


def test_speed_is_that_of_the_model_and_takes_half_a_second(
    small_splits: "Splits", monkeypatch: pytest.MonkeyPatch
) -> None:
    now, took = 0.0, [0.002, 0.004, 0.003]

    def model(images: Pixels) -> Logits:
        nonlocal now
        now += took[0] * len(images)
        took.append(took.pop(0))
        return constant(images)

    monkeypatch.setattr("pipeline.probe.time", SimpleNamespace(perf_counter=lambda: now))
    one, many = speed(model, small_splits["test"][0])
    assert (one.batch, many.batch) == (1, 256)
    assert one.latency_ms == pytest.approx(3)
    assert one.latency_p95_ms == pytest.approx(4)
    assert many.latency_ms == pytest.approx(512)  # PATIENCE_S was over after one
    assert many.images_per_second == pytest.approx(500)
    assert now < WARM_UPS * (0.004 + 1.024) + REPEATS * 0.004 + 1.024
