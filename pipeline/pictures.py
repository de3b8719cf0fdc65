"""Pictures, PNG or JPEG, as grey uint8 of one size; and folders of them, one folder for each class."""

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import DataError, first_line
from pipeline.idx import Pixels
from pipeline.own import BATCH, Batch, Found, SourceFile, check_classes, shown, walk
from pipeline.source import SPLITS

SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # of what Pillow can read, these alone: fewer decoders that meet strangers' bytes
MAX_PIXELS = 64 * 10**6
LARGE = 16 * 10**6  # pixels, which take up to 20 bytes each while they become grey: one such picture at a time
STRETCHED = {"L;2": 85, "L;4": 17}  # grey of few bits: Pillow makes 255 of white, but not of what is transparent
MIDDLE = 127  # what is brighter is light

# What decode_picture does, for the record.
CONVERSION: dict[str, str | int | float] = {
    "grey": "ITU-R 601-2 luma, transparency on white, EXIF orientation applied",
    "resize": "bilinear with antialias, height and width each",
    "pillow": PIL.__version__,
}

_one_large = threading.Lock()


def decode_picture(encoded: Path | bytes, size: int) -> Pixels:
    """Grey pixels uint8 (size, size) of a PNG or JPEG, in a file or in memory. Raises DataError with the reason."""
    return stretched(open_picture(encoded), size)


def stretched(grey: Image.Image, size: int) -> Pixels:
    """Pixels uint8 (size, size) of a grey image, height and width resized each by itself."""
    if grey.size != (size, size):
        grey = grey.resize((size, size), Image.Resampling.BILINEAR)  # Pillow widens the filter when it shrinks
    return np.asarray(grey, dtype=np.uint8)


def open_picture(encoded: Path | bytes, lift: bool = False) -> Image.Image:
    """A PNG or JPEG as a grey image, upright, of the size it has. Raises DataError with the reason.

    What is transparent is put on white; with `lift` on black if it is light, for on white nobody would see it.
    """
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
            for tile in image.tile:
                if tile.args in STRETCHED and "transparency" in image.info:
                    image.info["transparency"] *= STRETCHED[tile.args]
            with _one_large if image.width * image.height > LARGE else contextlib.nullcontext():
                return _grey(ImageOps.exif_transpose(image), lift)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError("neither PNG nor JPEG") from None
    except OSError as error:
        raise DataError(error.strerror or first_line(error)) from None
    except Exception as error:  # Pillow has no common root for what broken files make it raise
        raise DataError(first_line(error)) from None


def decode_batch(
    pool: Executor, encoded: Sequence[Any], size: int, decode: Callable[[Any, int], Pixels] = decode_picture
) -> Batch:
    """The pictures, decoded side by side; those that cannot be are black, and named in `bad` with the reason."""
    bad: dict[int, str] = {}
    images = np.zeros((len(encoded), size, size), np.uint8)

    def fill(index: int) -> None:
        try:
            images[index] = decode(encoded[index], size)
        except DataError as error:
            bad[index] = str(error)

    list(pool.map(fill, range(len(encoded))))
    return Batch(images, dict(sorted(bad.items())))


def find_pictures(root: Path, size: int, pool: Executor) -> Found:
    """The classes and pictures in `root`: train/<class>/… and perhaps test/<class>/…, or <class>/… alone.

    Classes are in the order of their names, pictures in that of their paths' bytes. Raises DataError for a class
    without pictures, a class in test alone, and links that lead elsewhere.
    """
    parts = _splits(root) or {"train": root}
    if "train" not in parts:
        raise DataError(f"{shown(str(root))}: has test/ but no train/; name the folder that holds both")
    classes = tuple(sorted(_folders(parts["train"]), key=os.fsencode))
    where = shown(str(parts["train"]))
    check_classes(classes, where)
    numbers = {name: number for number, name in enumerate(classes)}
    files: dict[str, list[SourceFile]] = {}
    labels: dict[str, Pixels] = {}
    for split, folder in parts.items():
        strange = [name for name in _folders(folder) if name not in numbers]
        if strange:
            raise DataError(f"{shown(str(folder))}: class {shown(strange[0])!r} is not in train; add it there")
        prefix = "" if folder == root else f"{folder.name}/"
        files[split] = [SourceFile(prefix + file.name, file.path) for file in walk(folder, SUFFIXES)]
        owners = [file.name.removeprefix(prefix).split("/", 1)[0] for file in files[split]]
        loose = [name for name in owners if name not in numbers]
        if loose:
            raise DataError(f"{shown(str(folder / loose[0]))}: a picture outside the folders of classes; move it")
        present = set(owners)
        for name in _folders(folder):
            if name not in present:
                raise DataError(
                    f"{shown(str(folder / name))}: holds no {', '.join(SUFFIXES)}; add pictures or remove the folder"
                )
        labels[split] = np.array([numbers[name] for name in owners], np.uint8)

    def batches(split: str) -> Iterator[Batch]:
        for start in range(0, len(files[split]), BATCH):
            yield decode_batch(pool, [file.path for file in files[split][start : start + BATCH]], size)

    used = [file for split in parts for file in files[split]]
    return Found(used, classes, labels, batches, {"form": "pictures", "image_size": size, **CONVERSION})


def _grey(image: Image.Image, lift: bool) -> Image.Image:
    if image.mode.startswith("I"):
        image = _narrow(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = "black" if lift and _is_light(image) else "white"
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("L")


def _narrow(image: Image.Image) -> Image.Image:
    """16 bits as 8: Pillow would cut them off at 255, and not see which value is transparent."""
    pixels, clear = np.asarray(image), image.info.get("transparency")
    wide = pixels.clip(0, 65535).astype(np.uint32)  # and in place, for it may be large
    wide += 128
    wide //= 257
    grey = Image.fromarray(wide.astype(np.uint8))
    if clear is not None:
        grey.putalpha(Image.fromarray((pixels != clear).astype(np.uint8) * np.uint8(255)))
    return grey


def _is_light(image: Image.Image) -> bool:
    """Whether what can be seen of an RGBA image is light."""
    seen = np.asarray(image.convert("RGB").convert("L"))[np.asarray(image.getchannel("A")) > MIDDLE]
    return bool(seen.size and np.median(seen) > MIDDLE)


def _splits(root: Path) -> dict[str, Path]:
    """The folders of the splits. Train and TEST count too if they hold folders: otherwise they are classes."""
    found: dict[str, Path] = {}
    for name in sorted(_folders(root), reverse=True):  # the small letters first
        split = name.lower()
        if split in SPLITS and (name == split or _folders(root / name)):
            found.setdefault(split, root / name)
    if "train" not in found and (root / "test") not in found.values():
        return {}
    return {split: found[split] for split in SPLITS if split in found}


def _folders(root: Path) -> list[str]:
    """Names of the folders in `root` that are neither hidden nor links."""
    return [path.name for path in root.iterdir() if _is_folder(path)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
