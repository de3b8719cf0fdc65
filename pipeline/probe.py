"""How a model does on test images that were changed a little, and how fast it is."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from lenet.augment import turn
from pipeline.idx import Pixels
from pipeline.metrics import Predictor, wilson

SHIFTS = (1, 2, 4)  # pixels
ROTATIONS = (5, 15, 30)  # degrees
NOISES = (0.05, 0.1, 0.2)  # standard deviation, as part of white
BLURS = (0.5, 1.0, 1.5)  # standard deviation of the Gaussian, pixels
BATCHES = (1, 256)
WARM_UPS = 3
REPEATS, PATIENCE_S = 100, 0.25


class Robustness(BaseModel):
    """Accuracy (0 to 1), with its 95% interval, on images that were changed in one way."""

    model_config = ConfigDict(frozen=True)

    change: str
    strength: float
    unit: str
    images: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float


class Speed(BaseModel):
    """How long a batch takes, pixels to logits, in the process that evaluates: median and 95th percentile."""

    model_config = ConfigDict(frozen=True)

    batch: int
    images_per_second: float
    latency_ms: float
    latency_p95_ms: float


def robustness(predict: Predictor, images: Pixels, labels: Pixels) -> list[Robustness]:
    """Accuracy on images uint8 (N, H, W) of these labels (N,), changed in four ways at three strengths each.

    The direction of a shift or a turn goes by the image's place: up, right, down, left in turn. Noise is drawn from a
    fixed seed. What comes in from outside is black. `predict` is called in several threads at once.
    """

    def probe(change: str, unit: str, alter: Callable[..., Pixels], strength: float) -> Robustness:
        correct = int((predict(alter(images, strength)).argmax(axis=1) == labels).sum())
        interval = wilson(correct, len(labels))
        return Robustness(
            change=change,
            strength=strength,
            unit=unit,
            images=len(labels),
            accuracy=correct / len(labels),
            accuracy_low=interval.low,
            accuracy_high=interval.high,
        )

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(probe, *zip(*_changes(), strict=True)))


def speed(predict: Predictor, images: Pixels) -> list[Speed]:
    """Time to predict the first of images uint8 (N, H, W), alone and in a batch of its copies; half a second in all."""
    found = []
    for batch in BATCHES:
        copies = np.repeat(images[:1], batch, axis=0)
        for _ in range(WARM_UPS):
            predict(copies)
        seconds: list[float] = []
        while len(seconds) < REPEATS and sum(seconds) < PATIENCE_S:
            started = time.perf_counter()
            predict(copies)
            seconds.append(time.perf_counter() - started)
        median, late = np.quantile(seconds, [0.5, 0.95])
        found.append(
            Speed(
                batch=batch,
                images_per_second=batch / median,
                latency_ms=1000 * median,
                latency_p95_ms=1000 * late,
            )
        )
    return found


def shifted(images: Pixels, pixels: int) -> Pixels:
    """Moved by so many pixels: up, right, down, left in turn."""
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels)))
    moved = np.empty_like(images)
    for turn_, (down, right) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
        top, left = pixels - down * pixels, pixels - right * pixels
        moved[turn_::4] = padded[turn_::4, top : top + height, left : left + width]
    return moved


def rotated(images: Pixels, degrees: float) -> Pixels:
    """Turned about the centre by so many degrees, clockwise and back in turn."""
    count = len(images)
    angles = torch.full((count,), float(degrees))
    angles[1::2] *= -1
    return turn(torch.from_numpy(images.copy()), angles, torch.ones(count)).numpy()


def noisy(images: Pixels, part: float) -> Pixels:
    """With Gaussian noise of this standard deviation, as part of white, added to each pixel."""
    noise = np.random.default_rng(0).standard_normal(images.shape, np.float32)
    return (images + np.float32(255 * part) * noise).round().clip(0, 255).astype(np.uint8)


def blurred(images: Pixels, pixels: float) -> Pixels:
    """Blurred by a Gaussian of this standard deviation."""
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(images.astype(np.float32), (0, pixels, pixels), mode="constant")
    return np.asarray(smooth.round().clip(0, 255), np.uint8)


def _changes() -> Iterator[tuple[str, str, Callable[..., Pixels], float]]:
    changes: tuple[tuple[str, str, Callable[..., Pixels], tuple[float, ...]], ...] = (
        ("shift", "pixels", shifted, SHIFTS),
        ("rotation", "degrees", rotated, ROTATIONS),
        ("noise", "of white", noisy, NOISES),
        ("blur", "pixels", blurred, BLURS),
    )
    for name, unit, alter, strengths in changes:
        for strength in strengths:
            yield name, unit, alter, strength
