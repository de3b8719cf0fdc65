"""Proves that published archives of every kind come to the same plain files: without sha256, in a zip, transposed,
with labels from 1 or in a table. Real images, packed as the datasets that cannot all be fetched for a test are."""

import gzip
import hashlib
import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline import download
from pipeline.catalog import CATALOG, FASHION_MNIST, Dataset, IdxFile
from pipeline.download import SourceConfig, cache_folder, fetch
from pipeline.errors import DataError
from pipeline.idx import Pixels
from pipeline.source import FILES, IMAGES, LABELS, SPLITS, open_source

if TYPE_CHECKING:
    from tests.conftest import Splits
    from tests.pipeline.conftest import Loopback

TRAIN = IMAGES["train"]
Publish = Callable[[Dataset, dict[str, bytes]], Dataset]


def idx_bytes(array: Pixels) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the archives are published."""
    return tmp_path / "published"


@pytest.fixture
def publish(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Function that puts archives into the folder and, with their md5, an entry named "tiny" into the catalogue."""
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "RETRIES", 0)

    def put(entry: Dataset, archives: dict[str, bytes]) -> Dataset:
        for path in folder.iterdir():
            path.unlink()
        for name, data in archives.items():
            (folder / name).write_bytes(data)
        md5 = {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in archives.items()}
        made = replace(entry, name="tiny", mirrors=(), archives=md5, debian_package=None, debian_folder=None)
        monkeypatch.setitem(CATALOG, "tiny", made)
        return made

    return put


def as_kmnist(few: "Splits") -> tuple[Dataset, dict[str, bytes]]:
    """An archive for each file, nothing known but their md5."""
    arrays = {names[split]: few[split][kind] for kind, names in enumerate((IMAGES, LABELS)) for split in SPLITS}
    files = {name: IdxFile(archive=f"{name}.gz") for name in FILES}
    return replace(FASHION_MNIST, files=files), {
        f"{name}.gz": gzip.compress(idx_bytes(array)) for name, array in arrays.items()
    }


def as_emnist(few: "Splits", first_label: int) -> tuple[Dataset, dict[str, bytes]]:
    """One zip of .gz, images with rows and columns exchanged, labels from `first_label`."""
    files, packed = {}, io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for split, (images, labels) in few.items():
            for names, array in ((IMAGES, images.transpose(0, 2, 1)), (LABELS, labels + np.uint8(first_label))):
                member = f"gzip/emnist-tiny-{split}-{names[split]}.gz"
                archive.writestr(member, gzip.compress(idx_bytes(array)))
                files[names[split]] = IdxFile(archive="gzip.zip", member=member)
    entry = replace(FASHION_MNIST, files=files, transposed=True, first_label=first_label, variant="tiny")
    return entry, {"gzip.zip": packed.getvalue()}


def as_qmnist(few: "Splits") -> tuple[Dataset, dict[str, bytes]]:
    """Labels as int32 (N, 8), the class in column 0."""
    files, packed = {}, {}
    for split, (images, labels) in few.items():
        table = np.full((len(labels), 8), 70_000, ">i4")
        table[:, 0] = labels
        data = struct.pack(">BBBB2I", 0, 0, 12, 2, *table.shape) + table.tobytes()
        for names, content in ((IMAGES, idx_bytes(images)), (LABELS, data)):
            archive = f"qmnist-{split}-{names[split]}.gz"
            files[names[split]] = IdxFile(archive=archive)
            packed[archive] = gzip.compress(content)
    return replace(FASHION_MNIST, files=files, int_labels=True), packed


def fetch_tiny(source: str) -> Path:
    return fetch(SourceConfig(dataset="tiny", source=source))


def require_exactly(found: Path, splits: "Splits") -> None:
    source = open_source(found)
    for split, (images, labels) in splits.items():
        assert np.array_equal(source.read(split, np.arange(len(images))), images)
        assert np.array_equal(source.labels(split), labels)


def refusal(source: str) -> str:
    """The one-line message of a fetch that fails, which leaves nothing in the cache."""
    with pytest.raises(DataError) as raised:
        fetch_tiny(source)
    assert list(cache_folder().iterdir()) == []
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "pack",
    [as_kmnist, lambda few: as_emnist(few, 0), lambda few: as_emnist(few, 1), as_qmnist],
    ids=["kmnist", "emnist-digits", "emnist-letters", "qmnist"],
)
def test_every_kind_comes_to_the_same_files_from_a_folder_a_mirror_and_the_cache(
    few: "Splits",
    folder: Path,
    publish: Publish,
    serve: "Callable[[Path], Loopback]",
    pack: "Callable[[Splits], tuple[Dataset, dict[str, bytes]]]",
) -> None:
    entry = publish(*pack(few))
    for source in (str(folder), serve(folder).url, "auto"):
        found = fetch_tiny(source)
        require_exactly(found, few)
        facts = open_source(found).facts
        assert facts.made_of == entry.made_of == {name: f"md5:{md5}" for name, md5 in entry.archives.items()}
        assert facts.conversion == entry.conversion


def test_other_archives_are_refused_where_only_md5_is_known(
    few: "Splits", folder: Path, publish: Publish, serve: "Callable[[Path], Loopback]"
) -> None:
    publish(*as_kmnist(few))
    content = gzip.decompress((folder / f"{TRAIN}.gz").read_bytes())
    (folder / f"{TRAIN}.gz").write_bytes(gzip.compress(content, compresslevel=1))
    assert f"{TRAIN}.gz: md5 " in refusal(str(folder))
    assert "does not match the known hash" in refusal(serve(folder).url)


def test_decompressed_files_are_refused_where_only_md5_is_known(few: "Splits", folder: Path, publish: Publish) -> None:
    publish(*as_kmnist(few))
    for archive in list(folder.iterdir()):
        archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
        archive.unlink()
    expected = f"{TRAIN}.gz is missing in {folder}; it has to be that file, for nothing but its md5 is published"
    assert expected in refusal(str(folder))


def test_labels_outside_the_published_range_are_refused(few: "Splits", folder: Path, publish: Publish) -> None:
    entry, archives = as_emnist(few, 1)
    publish(replace(entry, first_label=2), archives)
    message = refusal(str(folder))
    assert "train-labels-idx1-ubyte: label 1 at row " in message
    assert " is outside 2..11; use the labels that belong to this dataset" in message


def test_a_zip_that_is_torn_or_lacks_a_file_is_refused(few: "Splits", folder: Path, publish: Publish) -> None:
    entry, archives = as_emnist(few, 1)
    publish(entry, {"gzip.zip": archives["gzip.zip"][:-30]})
    assert "gzip.zip: torn zip file" in refusal(str(folder))
    files = entry.files | {TRAIN: IdxFile(archive="gzip.zip", member="gzip/none.gz")}
    publish(replace(entry, files=files), archives)
    assert "gzip.zip: holds no gzip/none.gz; fetch it again" in refusal(str(folder))


def test_a_cache_made_otherwise_is_made_again(few: "Splits", folder: Path, publish: Publish) -> None:
    entry, archives = as_emnist(few, 0)
    publish(entry, archives)
    found = fetch_tiny(str(folder))
    publish(replace(entry, transposed=False), archives)
    with pytest.raises(DataError, match="no source could give it"):
        fetch_tiny("auto")  # no mirror to ask
    assert fetch_tiny(str(folder)) == found
    require_exactly(found, {split: (images.transpose(0, 2, 1), labels) for split, (images, labels) in few.items()})
