"""What a user's own data has in common, whatever its form: named files, labels by split, images a batch at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import DataError
from pipeline.idx import Pixels

MAX_CLASSES = 256  # labels are uint8
MAX_CLASS_NAME = 100
THREADS = min(8, os.cpu_count() or 1)
BATCH = 256  # images in memory at once, for each step from the source to the IDX file


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the source: its name relative to the source, slash-separated, and where it lies on this machine."""

    name: str
    path: Path
    _found: tuple[int, ...] = field(init=False, compare=False)  # before anything of it was read

    def __post_init__(self) -> None:
        object.__setattr__(self, "_found", self._stamp())

    def has_changed(self) -> bool:
        """Whether it is another file, or was written to, since it was found."""
        return self._stamp() != self._found

    def _stamp(self) -> tuple[int, ...]:
        now = self.path.stat()
        return now.st_size, now.st_mtime_ns, now.st_ino


class Batch(NamedTuple):
    """Some images in a row, uint8 (n, size, size), and for those of them that are none, by index, what they are."""

    images: Pixels
    bad: dict[int, str]


@dataclass(frozen=True)
class Found:
    """A source that was recognised. `labels` has uint8 (N,) for "train", and for "test" if the source has that split;
    `batches` gives a split's images in the same order, and raises DataError for what no option lets pass."""

    files: list[SourceFile]
    classes: tuple[str, ...]
    labels: dict[str, Pixels]
    batches: Callable[[str], Iterator[Batch]]
    conversion: dict[str, str | int | float]


def shown(name: str) -> str:
    """A name as it may stand in a line of text: file names can hold line breaks, escapes and broken UTF-8."""
    return name if name.isprintable() else ascii(name)[1:-1]


def walk(root: Path, suffixes: Sequence[str]) -> list[SourceFile]:
    """The regular files below `root` with one of the suffixes (small letters), in the order of their names' bytes.

    What is hidden is passed over. Raises DataError for a link out of `root`, or to a folder: neither is followed.
    """
    root = root.resolve()
    found = []
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(folder, name).is_symlink():
                raise DataError(f"{shown(f'{folder}/{name}')}: a link to a folder; put the folder there itself")
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in suffixes:
                continue
            check_inside(path, root)
            if path.is_file():
                found.append(SourceFile(path.relative_to(root).as_posix(), path))
    return sorted(found, key=lambda file: os.fsencode(file.name))


def check_inside(path: Path, root: Path) -> None:
    """DataError for a link that leads out of `root`."""
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{shown(str(path))}: a link out of the source; put the file there itself")


def check_classes(classes: Sequence[str], where: str) -> None:
    """DataError unless there are 2 to 256 classes with names that can be shown."""
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise DataError(f"{where}: classes found: {len(classes)}; between 2 and {MAX_CLASSES} can be told apart")
    for name in classes:
        if not name.strip() or not name.isprintable() or len(name) > MAX_CLASS_NAME:
            raise DataError(
                f"{where}: '{shown(name)[:MAX_CLASS_NAME]}' cannot be a class's name; "
                f"use up to {MAX_CLASS_NAME} printable characters"
            )


def check_no_class_is_empty(labels: Pixels, classes: Sequence[str], where: str) -> None:
    """DataError for the first class that none of the labels uint8 (N,) of the train split belongs to."""
    counts = np.bincount(labels, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count == 0:
            raise DataError(f"{where}: class {name!r} has no image to train on; add some, or leave the class out")


def _unreadable(error: OSError) -> None:
    raise DataError(f"{shown(str(error.filename))}: {error.strerror}; check its owner and mode")
