"""A dataset on this machine, ready to be sharded: four IDX files of uint8 in a folder, and the facts about them.

Whatever a dataset was published or kept as, `download.fetch` leaves it in this one form, so that all that follows
knows only this. The files are mapped, not read: memory stays small however large they are.
"""

import contextlib
import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError, DataError, first_line
from pipeline.idx import Pixels, open_idx

SPLITS = ("train", "test")
# The names that MNIST gave its files, and every reader of IDX knows.
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
FILES = [names[split] for split in SPLITS for names in (IMAGES, LABELS)]
FACTS = "source.json"
ATTEMPTS = 20  # to put a folder in its place, while other processes do the same


class SourceConfig(BaseModel):
    """Which dataset, where it comes from, and how data of the user's own is made into one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(
        "fashion-mnist",
        description="A published dataset (fashion-mnist, mnist, kmnist, qmnist, emnist-balanced, emnist-byclass, "
        "emnist-bymerge, emnist-digits, emnist-letters, emnist-mnist), or a name of your own for the data in source.",
        pattern=r"^[a-z0-9][a-z0-9-]{0,63}$",
    )
    source: str = Field(
        "auto",
        description="Where it comes from: auto (the local cache, the published mirrors, then Debian's package), a "
        "folder, or the http(s) URL of a mirror. For your own data: a folder of images or IDX files, or Parquet as a "
        "file, a folder or s3://bucket/prefix.",
        min_length=1,
    )
    image_size: Literal[28, 32] = Field(
        28, description="Height and width in pixels of your own data; pictures are resized to it."
    )
    image_column: str = Field("image", min_length=1, description="Column of your own Parquet that has the images.")
    label_column: str = Field("label", min_length=1, description="Column of your own Parquet that has the classes.")
    test_fraction: float = Field(
        1 / 6,
        gt=0,
        lt=1,
        description="Part of each class of your own data to keep for the test, when the source has no test split.",
    )
    bad_images: Literal["refuse", "skip"] = Field(
        "refuse", description="What to do about pictures of your own that cannot be read."
    )

    @property
    def path(self) -> Path:
        """`source` as a path on this machine. Raises ConfigError for the home of a user who is not known."""
        try:
            return Path(self.source).expanduser()
        except RuntimeError:
            raise ConfigError("source", self.source, "no such user", "write the path in full") from None


class SourceFacts(BaseModel):
    """What is known of a dataset before it is sharded.

    `made_of` names the published or the user's own files by checksum ("sha256:…", "md5:…") and with `conversion`
    decides every byte of the IDX files; `sha256` has those files' own digests (hex) by name. `homepage` and
    `citation` are empty for the user's own data.
    """

    model_config = ConfigDict(frozen=True)

    dataset: str
    classes: tuple[str, ...] = Field(min_length=2, max_length=256)
    image_shape: tuple[int, int]
    made_of: dict[str, str]
    conversion: dict[str, str | int | float]
    sha256: dict[str, str]
    licence: str
    homepage: str
    citation: str


@dataclass(frozen=True)
class Source:
    """A folder of verified IDX files. Small to pickle: a task on the same machine opens the files again."""

    folder: Path
    facts: SourceFacts

    def rows(self, split: str) -> int:
        """Number of images in a split."""
        return len(self.labels(split))

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all images."""
        return sum(self.rows(split) for split in SPLITS) * self.facts.image_shape[0] * self.facts.image_shape[1]

    def labels(self, split: str) -> Pixels:
        """Labels uint8 (N,)."""
        return np.asarray(open_idx(self.folder / LABELS[split], ndim=1))

    def read(self, split: str, rows: npt.NDArray[np.int64]) -> Pixels:
        """Images uint8 (n, height, width) of the given rows, copied out of the file."""
        return np.asarray(open_idx(self.folder / IMAGES[split], ndim=3)[rows])


def open_source(folder: Path) -> Source:
    """The dataset in `folder`, once all its files have the sha256 they were left with. Raises DataError if not."""
    facts = read_facts(folder)
    for name in FILES:
        try:
            found = file_sha256(folder / name)
        except FileNotFoundError:
            raise DataError(f"{folder / name}: missing; fetch the dataset again") from None
        if found != facts.sha256.get(name):
            raise DataError(f"{folder / name}: altered since it was fetched; delete it and fetch again")
    return Source(folder, facts)


def read_facts(folder: Path) -> SourceFacts:
    """The facts beside the IDX files. Raises DataError when they are not there, or damaged."""
    try:
        return SourceFacts.model_validate_json((folder / FACTS).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder}: holds no {FACTS}; fetch the dataset again") from None
    except ValidationError as error:
        raise DataError(f"{folder / FACTS}: {first_line(error)}; delete it and fetch again") from None


def file_sha256(file: Path) -> str:
    """Hex digest of a file's bytes, read a block at a time."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_facts(folder: Path, facts: SourceFacts) -> None:
    """Put the facts beside the IDX files, whole or not at all."""
    temporary = folder / f".{FACTS}.tmp"
    temporary.write_text(facts.model_dump_json(indent=2), encoding="utf-8")
    temporary.replace(folder / FACTS)


def leave(whole: Path, folder: Path) -> None:
    """Give the finished folder `whole` its name. What is there stays if it is as good, for others may be reading it;
    else it goes beside `whole`."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            whole.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == ATTEMPTS:
                raise
        else:
            return
        with contextlib.suppress(DataError):
            if open_source(folder).facts == read_facts(whole):
                return
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            folder.rename(whole.with_name(f"{whole.name}-dropped-{attempt}"))
