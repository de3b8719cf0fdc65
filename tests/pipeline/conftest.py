"""What the tests of sources share: a few real images, and a loopback server that can fail."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.download import SourceConfig, cache_folder, fetch
from pipeline.errors import DataError
from pipeline.source import Source, open_source

if TYPE_CHECKING:
    from tests.conftest import Splits


class Loopback:
    """Serves a folder over HTTP; the next `failures` answers are 500."""

    def __init__(self, folder: Path) -> None:
        self.failures = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, loopback: Loopback, *args: object, directory: str) -> None:
        self.loopback = loopback
        super().__init__(*args, directory=directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if self.loopback.failures > 0:
            self.loopback.failures -= 1
            self.send_error(500)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Loopback]]:
    """Function that serves a folder until the test is over."""
    started: list[Loopback] = []

    def start(folder: Path) -> Loopback:
        started.append(Loopback(folder))
        return started[-1]

    yield start
    for loopback in started:
        loopback.server.shutdown()
        loopback.server.server_close()


@pytest.fixture(scope="session")
def few(small_splits: "Splits") -> "Splits":
    """The first 12 images and labels of each split."""
    return {split: (images[:12], labels[:12]) for split, (images, labels) in small_splits.items()}


@pytest.fixture
def bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Source]:
    """Function that fetches data of the user's own, named "mine", into a cache of the test's own, and opens it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fetched(source: Path | str, **options: object) -> Source:
        return open_source(fetch(SourceConfig.model_validate({"dataset": "mine", "source": str(source), **options})))

    return fetched


@pytest.fixture
def refused(bring: Callable[..., Source]) -> Callable[..., str]:
    """Function that does so in vain: the one-line message of the DataError, which leaves nothing in the cache."""

    def message(source: Path | str, **options: object) -> str:
        with pytest.raises(DataError) as raised:
            bring(source, **options)
        assert list(cache_folder().iterdir()) == []
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return message


@pytest.fixture
def contents() -> Callable[[Source, str], list[tuple[str, bytes]]]:
    """Function that gives a split's (class, pixels) pairs, sorted: what it holds, whatever the order."""

    def pairs(source: Source, split: str) -> list[tuple[str, bytes]]:
        labels = source.labels(split)
        images = source.read(split, np.arange(len(labels)))
        return sorted(
            (source.facts.classes[label], image.tobytes()) for label, image in zip(labels, images, strict=True)
        )

    return pairs
