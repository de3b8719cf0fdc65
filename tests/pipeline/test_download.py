"""Proves that only the published bytes are taken for the dataset, from any source, and that a failure says why."""

import gzip
import hashlib
import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline import download
from pipeline.catalog import CATALOG, FASHION_MNIST, Dataset, IdxFile
from pipeline.download import cache_folder, check_source, fetch
from pipeline.errors import ConfigError, DataError
from pipeline.idx import Pixels
from pipeline.source import FACTS, FILES, IMAGES, LABELS, SPLITS, SourceConfig, open_source

if TYPE_CHECKING:
    from tests.conftest import Splits
    from tests.pipeline.conftest import Loopback

TRAIN = IMAGES["train"]
UNREACHABLE = "http://127.0.0.1:9/mirror"


def idx_bytes(array: Pixels) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@dataclass
class Tiny:
    """A dataset of a few real images, catalogued under "tiny", and a folder with its archives as published."""

    dataset: Dataset
    contents: dict[str, bytes]
    folder: Path

    def fetch(self, source: str) -> Path:
        return fetch(SourceConfig(dataset="tiny", source=source))

    def spoil(self, name: str, data: bytes) -> None:
        (self.folder / f"{name}.gz").write_bytes(data)


@pytest.fixture
def tiny(few: "Splits", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    arrays = {names[split]: few[split][kind] for kind, names in enumerate((IMAGES, LABELS)) for split in SPLITS}
    contents = {name: idx_bytes(array) for name, array in arrays.items()}
    folder = tmp_path / "published"
    folder.mkdir()
    archives = {}
    for name, data in contents.items():
        packed = gzip.compress(data)
        (folder / f"{name}.gz").write_bytes(packed)
        archives[f"{name}.gz"] = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    dataset = replace(
        FASHION_MNIST,
        name="tiny",
        mirrors=(),
        archives=archives,
        files={
            name: IdxFile(archive=f"{name}.gz", sha256=hashlib.sha256(contents[name]).hexdigest()) for name in FILES
        },
        debian_package=None,
        debian_folder=None,
    )
    monkeypatch.setitem(CATALOG, "tiny", dataset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "RETRIES", 0)
    return Tiny(dataset, contents, folder)


@pytest.fixture
def mirror(tiny: Tiny, serve: "Callable[[Path], Loopback]") -> "Loopback":
    """A loopback server with the tiny dataset's .gz files."""
    return serve(tiny.folder)


def ask_only(monkeypatch: pytest.MonkeyPatch, *places: Path | str) -> None:
    """Make `places` the sources that source=auto asks."""
    asked = download._sources
    monkeypatch.setattr(
        download,
        "_sources",
        lambda _, dataset: [entry for place in places for entry in asked(SourceConfig(source=str(place)), dataset)],
    )


def cached_files() -> list[Path]:
    """All files of the cache but the facts."""
    return [path for path in cache_folder().rglob("*") if path.is_file() and path.name != FACTS]


def require_exactly(folder: Path, splits: "Splits") -> None:
    source = open_source(folder)
    for split, (images, labels) in splits.items():
        assert np.array_equal(source.read(split, np.arange(len(images))), images)
        assert np.array_equal(source.labels(split), labels)


def refusal(tiny: Tiny, source: str) -> str:
    """The one-line message of a fetch that fails, which leaves nothing in the cache."""
    with pytest.raises(DataError) as raised:
        tiny.fetch(source)
    assert list(cache_folder().iterdir()) == []
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("tiny: no source could give it (")
    assert "; connect to the network, or name a folder or mirror with source" in message
    return message


def test_the_real_files_pass_and_hold_what_was_published() -> None:
    folder = fetch(SourceConfig())
    source = open_source(folder)
    pairs = {split: (source.read(split, np.arange(source.rows(split))), source.labels(split)) for split in SPLITS}
    assert {split: images.shape for split, (images, _) in pairs.items()} == {
        "train": (60_000, 28, 28),
        "test": (10_000, 28, 28),
    }
    assert np.bincount(pairs["train"][1]).tolist() == [6000] * 10
    assert np.bincount(pairs["test"][1]).tolist() == [1000] * 10
    assert source.facts.made_of == FASHION_MNIST.made_of


@pytest.mark.parametrize("packed", [True, False])
def test_a_folder_gives_the_published_bytes(tiny: Tiny, packed: bool) -> None:
    if not packed:
        for name, data in tiny.contents.items():
            (tiny.folder / f"{name}.gz").unlink()
            (tiny.folder / name).write_bytes(data)
    folder = tiny.fetch(str(tiny.folder))
    assert {path.name: path.read_bytes() for path in cached_files()} == tiny.contents
    assert {path.parent for path in cached_files()} == {folder}


def test_a_mirror_gives_the_published_bytes(tiny: Tiny, mirror: "Loopback") -> None:
    tiny.fetch(mirror.url)
    assert {path.name: path.read_bytes() for path in cached_files()} == tiny.contents


def test_a_mirror_whose_files_come_unpacked_gives_the_published_bytes(tiny: Tiny, mirror: "Loopback") -> None:
    mirror.gzip_is_encoding = True
    tiny.fetch(mirror.url)
    assert {path.name: path.read_bytes() for path in cached_files()} == tiny.contents


def test_a_mirror_that_fails_twice_is_asked_again(
    tiny: Tiny, mirror: "Loopback", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RETRIES", 2)
    mirror.failures = 2
    tiny.fetch(mirror.url)
    assert mirror.failures == 0
    assert {path.name: path.read_bytes() for path in cached_files()} == tiny.contents


def test_one_flipped_bit_is_refused(tiny: Tiny) -> None:
    data = bytearray(tiny.contents[TRAIN])
    data[-1] ^= 1
    tiny.spoil(TRAIN, gzip.compress(bytes(data)))
    assert f"{TRAIN}: sha256 {hashlib.sha256(data).hexdigest()[:12]}… is not the published" in refusal(
        tiny, str(tiny.folder)
    )


def test_a_torn_archive_is_refused(tiny: Tiny, mirror: "Loopback") -> None:
    tiny.spoil(TRAIN, (tiny.folder / f"{TRAIN}.gz").read_bytes()[:-20])
    assert f"{TRAIN}.gz: torn gzip file" in refusal(tiny, str(tiny.folder))
    assert f"{TRAIN}.gz: torn gzip file" in refusal(tiny, mirror.url)


def test_a_page_in_place_of_an_archive_is_refused(tiny: Tiny) -> None:
    tiny.spoil(TRAIN, b"<html>please log in</html>")
    assert f"{TRAIN}.gz: torn gzip file" in refusal(tiny, str(tiny.folder))


def test_a_whole_archive_of_a_torn_file_is_refused(tiny: Tiny) -> None:
    tiny.spoil(TRAIN, gzip.compress(tiny.contents[TRAIN][:-1]))
    assert f"{TRAIN}: truncated, " in refusal(tiny, str(tiny.folder))


def test_a_missing_file_is_named(tiny: Tiny, mirror: "Loopback") -> None:
    (tiny.folder / f"{TRAIN}.gz").unlink()
    assert f"{TRAIN} (or .gz) is missing in {tiny.folder}" in refusal(tiny, str(tiny.folder))
    assert "404" in refusal(tiny, mirror.url)


def test_an_unreachable_mirror_is_named(tiny: Tiny) -> None:
    assert f"({UNREACHABLE}: cannot be reached)" in refusal(tiny, UNREACHABLE)


def test_the_reason_of_every_source_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.spoil(TRAIN, b"")
    ask_only(monkeypatch, UNREACHABLE, tiny.folder)
    message = refusal(tiny, "auto")
    assert f"{UNREACHABLE}: cannot be reached; {tiny.folder}: " in message


def test_the_next_source_is_asked_when_one_fails(
    tiny: Tiny, mirror: "Loopback", monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_only(monkeypatch, UNREACHABLE, mirror.url)
    tiny.fetch("auto")
    assert {path.name: path.read_bytes() for path in cached_files()} == tiny.contents


def test_a_good_cache_asks_nobody(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.fetch(str(tiny.folder))
    ask_only(monkeypatch)
    assert tiny.fetch("auto") == folder


@pytest.mark.parametrize("torn", [b"", b"garbage", None])
def test_a_torn_cache_is_dropped_and_fetched_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, torn: bytes | None
) -> None:
    folder = tiny.fetch(str(tiny.folder))
    (folder / TRAIN).unlink()
    if torn is not None:
        (folder / TRAIN).write_bytes(torn)
    ask_only(monkeypatch, tiny.folder)
    with caplog.at_level(logging.WARNING):
        assert tiny.fetch("auto") == folder
    assert "cached tiny dropped" in caplog.text
    assert {path.name: path.read_bytes() for path in cached_files()} == tiny.contents


def test_a_cache_that_cannot_be_made_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cache .* cannot be made \(Not a directory\); point XDG_CACHE_HOME"):
        tiny.fetch(str(tiny.folder))


def test_a_cache_that_cannot_be_written_to_is_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "leave", full)
    with pytest.raises(DataError, match=r"^tiny: .*: No space left on device; check the disk"):
        tiny.fetch(str(tiny.folder))


def test_auto_asks_the_published_mirrors_and_then_debian() -> None:
    names = [name for name, _ in download._sources(SourceConfig(), FASHION_MNIST)]
    assert names == [*FASHION_MNIST.mirrors, "Debian's dataset-fashion-mnist"]
    assert [name for name, _ in download._sources(SourceConfig(), CATALOG["mnist"])] == list(CATALOG["mnist"].mirrors)


def test_facts_say_what_it_was_made_of(tiny: Tiny) -> None:
    facts = open_source(tiny.fetch(str(tiny.folder))).facts
    assert facts.made_of == tiny.dataset.made_of
    assert (facts.dataset, facts.classes, facts.image_shape) == ("tiny", FASHION_MNIST.classes, (28, 28))
    assert (facts.conversion, facts.licence) == ({}, "MIT")
    assert facts.sha256 == {name: hashlib.sha256(data).hexdigest() for name, data in tiny.contents.items()}


def test_a_cache_without_facts_gets_them_once_it_is_verified(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.fetch(str(tiny.folder))
    facts = (folder / FACTS).read_bytes()
    (folder / FACTS).unlink()
    ask_only(monkeypatch)
    assert tiny.fetch("auto") == folder
    assert (folder / FACTS).read_bytes() == facts


def test_a_cache_of_other_files_is_not_trusted_for_its_own_facts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.fetch(str(tiny.folder))
    data = bytearray((folder / TRAIN).read_bytes())
    data[-1] ^= 1
    (folder / TRAIN).write_bytes(data)
    digest = tiny.dataset.files[TRAIN].sha256
    assert digest is not None
    forged = hashlib.sha256(data).hexdigest()
    made_of, digests = (folder / FACTS).read_text().split('"sha256": {')
    ask_only(monkeypatch)
    for text in (made_of, made_of.replace(digest, forged)):
        (folder / FACTS).write_text(text + '"sha256": {' + digests.replace(digest, forged))
        open_source(folder)
        with pytest.raises(DataError, match="no source could give it"):
            tiny.fetch("auto")


def test_a_source_is_checked_before_any_work(tiny: Tiny) -> None:
    for source in ("auto", UNREACHABLE, "https://example.org", str(tiny.folder)):
        check_source(SourceConfig(source=source))
    with pytest.raises(ConfigError, match=r"^source='/no/such': no such folder; use auto, a folder"):
        check_source(SourceConfig(source="/no/such"))
    with pytest.raises(ConfigError, match="no such folder"):
        tiny.fetch("/no/such")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (SourceConfig(dataset="nothing"), "dataset='nothing': not one of fashion-mnist, mnist, "),
        (SourceConfig(dataset="nothing"), "; use one, or name your own data with source"),
        (SourceConfig(source="/usr"), "source='/usr': holds no file of fashion-mnist; for data of your own, give it a"),
        (SourceConfig(dataset="mine", source="/no/such"), "source='/no/such': no such file or folder; a source is a "),
        (SourceConfig(dataset="mine", source=__file__), ": a file, but not a .parquet file; a source is a folder"),
        (SourceConfig(dataset="mine", source="https://example.org"), "is not fetched over HTTP; use a folder"),
        (SourceConfig(source="s3://bucket/prefix"), "fashion-mnist is not read from S3; use auto"),
        (SourceConfig(dataset="mine", source="s3://"), "source='s3://': "),
        (SourceConfig(source="http://me:secret@example.org"), "source='http://…@example.org': credentials"),
        (SourceConfig(source="http://me:sec/ret@example.org"), "source='http://…@example.org': credentials"),
        (SourceConfig(source="http://[example.org"), "source='http://[example.org': not a URL"),
        (SourceConfig(dataset="mine", source="s3://b/*.parquet"), "source='s3://b/*.parquet': '*' has"),
        (SourceConfig(source="a" * 5000), "a': File name too long; use a path that you may read"),
        (SourceConfig(dataset="mine", source="a" * 5000), "a': File name too long; use a path that you may read"),
        (SourceConfig(dataset="mine", source="s3://me:secret@bucket"), "source='s3://…@bucket': credentials"),
        (SourceConfig(image_size=32), "image_size=32: fashion-mnist has 28x28 pixels; leave it out"),
        (SourceConfig(dataset="mine", source="~no-such-user-here/data"), "no such user; write the path in full"),
    ],
)
def test_a_mistake_costs_a_line(config: SourceConfig, complaint: str) -> None:
    for refuse in (check_source, fetch):
        with pytest.raises(ConfigError) as raised:
            refuse(config)
        assert complaint in str(raised.value)
        assert "\n" not in str(raised.value)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize("dataset", ["mine", "mnist"])
def test_a_folder_that_one_may_not_look_into_costs_a_line(tmp_path: Path, dataset: str) -> None:
    tmp_path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may look everywhere
    try:
        with pytest.raises(ConfigError, match=r"x/y': Permission denied; use a path that you may read$"):
            check_source(SourceConfig(dataset=dataset, source=f"{tmp_path}/x/y"))
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


def test_what_killed_processes_have_left_is_removed_after_a_day(tiny: Tiny) -> None:
    old, young, other = (cache_folder() / name for name in (".mine-abc_defg", ".mine-01234567", ".kept"))
    for folder in (old, young, other):
        (folder / "whole").mkdir(parents=True)
    for folder in (old, other):
        os.utime(folder, (0, 0))
    tiny.fetch(str(tiny.folder))
    assert [folder.exists() for folder in (old, young, other)] == [False, True, True]
