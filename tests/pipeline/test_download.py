"""Proves that only the published bytes are taken for the dataset, from any source, and that a failure says why."""

import gzip
import hashlib
import logging
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline import download
from pipeline.catalog import CATALOG, FASHION_MNIST, Dataset, IdxFile
from pipeline.download import SourceConfig, cache_folder, check_source, fetch, read_verified
from pipeline.errors import ConfigError, DataError
from pipeline.idx import Pixels

if TYPE_CHECKING:
    from tests.conftest import Splits

IMAGES = "train-images"
UNREACHABLE = "http://127.0.0.1:9/mirror"


def idx_bytes(array: Pixels) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@dataclass
class Tiny:
    """A dataset of a few real images, catalogued under "tiny", and a folder with its files as .gz."""

    dataset: Dataset
    contents: dict[str, bytes]
    folder: Path

    def fetch(self, source: str) -> Path:
        return fetch(SourceConfig(dataset="tiny", source=source))

    def spoil(self, name: str, data: bytes) -> None:
        (self.folder / f"{name}.gz").write_bytes(data)


@pytest.fixture
def tiny(small_splits: "Splits", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    arrays = {
        f"{split}-{kind}": array[:12]
        for split, pair in small_splits.items()
        for kind, array in zip(("images", "labels"), pair, strict=True)
    }
    contents = {name: idx_bytes(array) for name, array in arrays.items()}
    files = {name: IdxFile(name=name, sha256=hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
    dataset = Dataset(
        name="tiny",
        classes=FASHION_MNIST.classes,
        images={split: files[f"{split}-images"] for split in small_splits},
        labels={split: files[f"{split}-labels"] for split in small_splits},
        torchvision_class="FashionMNIST",
        debian_package="no-such-package",
        debian_folder="no/such/folder",
        licence="MIT",
        homepage="",
    )
    monkeypatch.setitem(CATALOG, "tiny", dataset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "RETRIES", 0)
    made = Tiny(dataset, contents, tmp_path / "published")
    made.folder.mkdir()
    for name, data in contents.items():
        made.spoil(name, gzip.compress(data))
    return made


class Mirror(SimpleHTTPRequestHandler):
    """Serves a folder; the first `failures` answers are 500."""

    failures = 0

    def do_GET(self) -> None:
        if Mirror.failures > 0:
            Mirror.failures -= 1
            self.send_error(500)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(tiny: Tiny) -> Iterator[str]:
    """URL of a loopback server with the tiny dataset's .gz files."""
    Mirror.failures = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Mirror, directory=str(tiny.folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask_only(monkeypatch: pytest.MonkeyPatch, *places: Path | str) -> None:
    """Make `places` the sources that source=auto asks."""
    asked = download._sources
    monkeypatch.setattr(
        download, "_sources", lambda _, dataset: [entry for place in places for entry in asked(str(place), dataset)]
    )


def cached_files() -> list[Path]:
    return [path for path in cache_folder().rglob("*") if path.is_file()]


def refusal(tiny: Tiny, source: str) -> str:
    """The one-line message of a fetch that fails, which leaves nothing in the cache."""
    with pytest.raises(DataError) as raised:
        tiny.fetch(source)
    assert list(cache_folder().iterdir()) == []
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("tiny: no source could give it (")
    assert message.endswith("; connect to the network, or name a folder or mirror with source")
    return message


def test_the_real_files_pass_and_hold_what_was_published(fashion_mnist: Path) -> None:
    assert fetch(SourceConfig()) == fashion_mnist
    pairs = read_verified(FASHION_MNIST, fashion_mnist)
    assert {split: images.shape for split, (images, _) in pairs.items()} == {
        "train": (60_000, 28, 28),
        "test": (10_000, 28, 28),
    }
    assert np.bincount(pairs["train"][1]).tolist() == [6000] * 10
    assert np.bincount(pairs["test"][1]).tolist() == [1000] * 10


@pytest.mark.parametrize("packed", [True, False])
def test_a_folder_gives_the_published_bytes(tiny: Tiny, packed: bool) -> None:
    if not packed:
        for name, data in tiny.contents.items():
            (tiny.folder / f"{name}.gz").unlink()
            (tiny.folder / name).write_bytes(data)
    folder = tiny.fetch(str(tiny.folder))
    assert {path.name: path.read_bytes() for path in cached_files()} == tiny.contents
    assert {path.parent for path in cached_files()} == {folder}


def test_a_mirror_gives_the_published_bytes(tiny: Tiny, mirror: str) -> None:
    tiny.fetch(mirror)
    assert {path.name: path.read_bytes() for path in cached_files()} == tiny.contents


def test_a_mirror_that_fails_twice_is_asked_again(tiny: Tiny, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRIES", 2)
    Mirror.failures = 2
    tiny.fetch(mirror)
    assert Mirror.failures == 0
    assert {path.name: path.read_bytes() for path in cached_files()} == tiny.contents


def test_one_flipped_bit_is_refused(tiny: Tiny) -> None:
    data = bytearray(tiny.contents[IMAGES])
    data[-1] ^= 1
    tiny.spoil(IMAGES, gzip.compress(bytes(data)))
    assert f"{IMAGES}: sha256 {hashlib.sha256(data).hexdigest()[:12]}… is not the published" in refusal(
        tiny, str(tiny.folder)
    )


def test_a_torn_archive_is_refused(tiny: Tiny, mirror: str) -> None:
    tiny.spoil(IMAGES, (tiny.folder / f"{IMAGES}.gz").read_bytes()[:-20])
    assert f"{IMAGES}.gz: torn gzip file" in refusal(tiny, str(tiny.folder))
    assert f"{IMAGES}.gz: torn gzip file" in refusal(tiny, mirror)


def test_a_page_in_place_of_an_archive_is_refused(tiny: Tiny) -> None:
    tiny.spoil(IMAGES, b"<html>please log in</html>")
    assert f"{IMAGES}.gz: torn gzip file" in refusal(tiny, str(tiny.folder))


def test_a_whole_archive_of_a_torn_file_is_refused(tiny: Tiny) -> None:
    tiny.spoil(IMAGES, gzip.compress(tiny.contents[IMAGES][:-1]))
    assert f"{IMAGES}: truncated, " in refusal(tiny, str(tiny.folder))


def test_a_missing_file_is_named(tiny: Tiny, mirror: str) -> None:
    (tiny.folder / f"{IMAGES}.gz").unlink()
    assert f"{IMAGES} (or .gz) is missing in {tiny.folder}" in refusal(tiny, str(tiny.folder))
    assert "404" in refusal(tiny, mirror)


def test_an_unreachable_mirror_is_named(tiny: Tiny) -> None:
    assert f"({UNREACHABLE}: cannot be reached)" in refusal(tiny, UNREACHABLE)


def test_the_reason_of_every_source_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.spoil(IMAGES, b"")
    ask_only(monkeypatch, UNREACHABLE, tiny.folder)
    message = refusal(tiny, "auto")
    assert f"{UNREACHABLE}: cannot be reached; {tiny.folder}: " in message


def test_the_next_source_is_asked_when_one_fails(tiny: Tiny, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_only(monkeypatch, UNREACHABLE, mirror)
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
    (folder / IMAGES).unlink()
    if torn is not None:
        (folder / IMAGES).write_bytes(torn)
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


def test_auto_asks_the_published_mirrors_and_then_debian() -> None:
    names = [name for name, _ in download._sources("auto", FASHION_MNIST)]
    assert len(names) >= 2
    assert all(name.startswith("http") for name in names[:-1])
    assert names[-1] == "Debian's dataset-fashion-mnist"


def test_a_source_is_checked_before_any_work(tiny: Tiny) -> None:
    for source in ("auto", UNREACHABLE, "https://example.org", str(tiny.folder)):
        check_source(SourceConfig(source=source))
    with pytest.raises(ConfigError, match=r"^source='/no/such': no such folder; use auto, a folder"):
        check_source(SourceConfig(source="/no/such"))
    with pytest.raises(ConfigError, match="no such folder"):
        tiny.fetch("/no/such")
    with pytest.raises(ValidationError, match="no such dataset; use one of fashion-mnist"):
        SourceConfig(dataset="nothing")
