"""Pictures as people have them, made into what a model was trained on; and what the model says of them.

A model knows light objects on black, upright, small and square. A photo may be none of that.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict

from pipeline.errors import DataError
from pipeline.idx import Pixels
from pipeline.own import BATCH, THREADS, Batch, shown
from pipeline.pictures import MAX_PIXELS, MIDDLE, decode_batch, open_picture, stretched

if TYPE_CHECKING:
    from pipeline.served import Served

Invert = Literal["auto", "yes", "no"]
# As pictures were made into what the model was trained on, if it was trained on pictures.
Form = Literal[Invert, "as trained", "as trained, inverted"]
Name = TypeVar("Name")
Probabilities = npt.NDArray[np.float64]
LONGEST = math.isqrt(MAX_PIXELS)


class Prepared(NamedTuple):
    """A picture as a model takes it, uint8 (size, size), and what was done to it: whether light and dark were
    exchanged, and its height and width before it was resized, None if it had the size."""

    image: Pixels
    inverted: bool
    resized_from: tuple[int, int] | None


class Prediction(BaseModel):
    """What a model says of one picture: the probabilities in the order of its classes."""

    model_config = ConfigDict(frozen=True)

    path: str
    probabilities: tuple[float, ...]
    inverted: bool
    resized_from: tuple[int, int] | None


def predict_pictures(served: "Served", paths: Sequence[Path], invert: Invert = "auto") -> list[Prediction]:
    """What the model says of pictures, PNG or JPEG of any size. Raises DataError naming the first that is none."""
    size, found = served.image_shape[0], []

    def prepare(path: Path) -> Prepared:
        try:
            return prepare_picture(path, size, served.form(invert))
        except DataError as error:
            raise DataError(f"{shown(str(path))}: {error}; give a whole PNG or JPEG") from None

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            prepared = list(pool.map(prepare, batch))
            logits = served.predict(np.stack([picture.image for picture in prepared]))
            for path, picture, row in zip(batch, prepared, probabilities(logits), strict=True):
                found.append(
                    Prediction(
                        path=str(path),
                        probabilities=tuple(row.tolist()),
                        inverted=picture.inverted,
                        resized_from=picture.resized_from,
                    )
                )
    return found


def probabilities(logits: npt.NDArray[np.float32]) -> Probabilities:
    """Probabilities (n, n_classes) of logits (n, n_classes), computed in float64."""
    from scipy.special import softmax

    return np.asarray(softmax(logits.astype(np.float64), axis=1))


def prepare_picture(encoded: Path | bytes, size: int, form: Form = "auto") -> Prepared:
    """A PNG or JPEG, in a file or in memory, as a model takes it. Raises DataError with the reason it cannot be read.

    It is turned as EXIF says, grey, padded to a square with its background and resized. What is on a light background
    has light and dark exchanged; `form` says yes or no to that for all. With "no", and the size of the model, a picture
    is what `pipeline.pictures.decode_picture` makes of it; with "as trained" it is that in any size.
    """
    grey = open_picture(encoded, lift=form == "auto")
    before = None if grey.size == (size, size) else (grey.height, grey.width)
    inverted = form in ("yes", "as trained, inverted")
    if form not in ("as trained", "as trained, inverted"):
        pixels = np.asarray(grey, np.uint8)
        background = float(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
        # A light border is a light background, but for 2 of Fashion-MNIST's 70,000 images.
        inverted = inverted or (form == "auto" and background > MIDDLE)
        grey = _squared(grey, round(background))
    image = stretched(grey, size)
    return Prepared(np.asarray(255 - image, np.uint8) if inverted else image, inverted, before)


def _squared(grey: Image.Image, background: int) -> Image.Image:
    """Padded to a square with the background."""
    if grey.width == grey.height:
        return grey
    if max(grey.size) > LONGEST:  # to square one that is 200,000 pixels long takes 40 GB
        width, height = (max(1, length * LONGEST // max(grey.size)) for length in grey.size)
        grey = grey.resize((width, height), Image.Resampling.BILINEAR)
    side = max(grey.size)
    square = Image.new("L", (side, side), background)
    square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
    return square


def prepare_batch(pool: Executor, names: Sequence[Name], read: Callable[[Name], bytes], size: int, form: Form) -> Batch:
    """Pictures uint8 (n, size, size), read and prepared side by side; those that are none are black, and named by index
    with the reason. As many as there are threads are in memory as they were read."""
    return decode_batch(pool, names, size, lambda name, size: prepare_picture(read(name), size, form).image)
