"""From published archives to the IDX files that all else reads: unpacked, proven, converted and described."""

import contextlib
import gzip
import hashlib
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from pipeline.catalog import Dataset
from pipeline.errors import DataError
from pipeline.idx import IdxWriter, open_idx, open_int_idx, read_pair
from pipeline.source import FILES, IMAGES, LABELS, SPLITS, SourceFacts, file_sha256, write_facts

ROWS = 4096  # images converted at a time, 3 MiB


def unpack(dataset: Dataset, brought: Path, raw: Path) -> None:
    """Decompress the published files to their names here. Raises DataError for a torn archive, and one that has not
    the published md5 if that is all there is to go by."""
    if not dataset.pinned:
        for archive, published in dataset.archives.items():
            with (brought / archive).open("rb") as stream:
                found = hashlib.file_digest(stream, "md5").hexdigest()
            if found != published:
                raise DataError(
                    f"{archive}: md5 {found[:12]}… is not the published {published[:12]}…; "
                    "the file was altered, fetch it again"
                )
    for name, file in dataset.files.items():
        archived, plain = brought / file.archive, brought / file.archive.removesuffix(".gz")
        if file.sha256 and not file.member and not plain.is_file() and _begins_as_idx(archived):
            plain = archived  # of a mirror that takes gzip for how it is sent, so it came unpacked
        if file.member is None and plain.is_file():
            plain.replace(raw / name)
            continue
        try:
            with contextlib.ExitStack() as opened:
                packed: Any = opened.enter_context(archived.open("rb"))
                if file.member:
                    packed = opened.enter_context(zipfile.ZipFile(packed).open(file.member))
                with gzip.open(packed) as stream, (raw / name).open("wb") as target:
                    shutil.copyfileobj(stream, target)
        except KeyError:
            raise DataError(f"{file.archive}: holds no {file.member}; fetch it again") from None
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
            kind = "gzip" if file.member is None else "zip"
            raise DataError(f"{file.archive}: torn {kind} file ({error}); fetch it again") from None


def _begins_as_idx(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"\0\0"


def check_published(dataset: Dataset, raw: Path) -> None:
    """DataError unless the decompressed files are well-formed and, where it is known, have the published sha256."""
    for name in FILES:
        if not (raw / name).is_file():
            raise DataError(f"{name} is missing in {raw}; fetch it again")
    # The structure is looked at first: "truncated" says more than "another sha256".
    for split in SPLITS:
        if dataset.int_labels or dataset.first_label:
            open_idx(raw / IMAGES[split], 3)
        else:
            read_pair(raw / IMAGES[split], raw / LABELS[split], len(dataset.classes))
    for name, file in dataset.files.items():
        found = file_sha256(raw / name)
        if file.sha256 and found != file.sha256:
            raise DataError(
                f"{name}: sha256 {found[:12]}… is not the published {file.sha256[:12]}…; "
                "the file was altered, fetch it again"
            )


def convert(dataset: Dataset, raw: Path, whole: Path) -> None:
    """What has to be done to the published files until they are as all others."""
    for split in SPLITS:
        images, labels = IMAGES[split], LABELS[split]
        if dataset.transposed:
            pixels = open_idx(raw / images, 3)
            count, height, width = pixels.shape
            with IdxWriter(whole / images, (count, width, height)) as writer:
                for start in range(0, count, ROWS):
                    writer.append(pixels[start : start + ROWS].transpose(0, 2, 1))
        else:
            (raw / images).replace(whole / images)
        if dataset.int_labels or dataset.first_label:
            _convert_labels(dataset, raw / labels, whole / labels)
        else:
            (raw / labels).replace(whole / labels)
        read_pair(whole / images, whole / labels, len(dataset.classes))


def _convert_labels(dataset: Dataset, raw: Path, whole: Path) -> None:
    table = open_int_idx(raw, 2)[:, 0] if dataset.int_labels else open_idx(raw, 1)
    numbers = table.astype("int64") - dataset.first_label
    wrong = (numbers < 0) | (numbers >= len(dataset.classes))
    if wrong.any():
        row = int(wrong.argmax())
        first = dataset.first_label
        raise DataError(
            f"{raw.name}: label {table[row]} at row {row} is outside {first}..{len(dataset.classes) - 1 + first}; "
            "use the labels that belong to this dataset"
        )
    with IdxWriter(whole, (len(numbers),)) as writer:
        writer.append(numbers.astype("uint8"))


def describe(dataset: Dataset, folder: Path) -> None:
    """Write the facts beside the IDX files."""
    _, height, width = open_idx(folder / IMAGES["train"], 3).shape
    facts = SourceFacts(
        dataset=dataset.name,
        classes=dataset.classes,
        image_shape=(height, width),
        made_of=dataset.made_of,
        conversion=dataset.conversion,
        sha256={name: file_sha256(folder / name) for name in FILES},
        licence=dataset.licence,
        homepage=dataset.homepage,
        citation=dataset.citation,
    )
    write_facts(folder, facts)
