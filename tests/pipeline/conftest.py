"""What tests share: a few real images, a loopback server that can fail, runs that are ready to publish."""

import copy
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lenet.model import LeNet
from lenet.recipe import RECIPES
from lenet.step import normalise
from pipeline.artifacts import ONNX, PT2, SAFETENSORS, artifact_of, encode_onnx, encode_pt2
from pipeline.checkpoint import EpochMetrics, encode_model
from pipeline.download import SourceConfig, cache_folder, fetch
from pipeline.errors import DataError
from pipeline.evaluate import Evaluation, Exported, evaluate, exported_key
from pipeline.idx import Pixels
from pipeline.metrics import Logits, Tally, Verdict
from pipeline.promotion import Comparison
from pipeline.publish import Published, publish
from pipeline.registry import promote_by_hand, register
from pipeline.shards import Manifest
from pipeline.source import Source, open_source
from pipeline.storage import Store, open_store, sha256
from pipeline.train import Training, staging

if TYPE_CHECKING:
    from tests.conftest import Splits


# After an epoch of 235 steps, weights differ by the order in which float32 gradients were added up. Seen: 3e-6.
TOLERANCE = 5e-5


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = TOLERANCE) -> None:
    """Weights of the same names, none of which differ by more."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol, msg=name)


def judge(logits: Logits, labels: Pixels, names: tuple[str, ...]) -> Verdict:
    """The verdict on logits (N, n_classes) against labels (N,)."""
    tally = Tally(len(names))
    tally.add(logits, labels, 0)
    return tally.verdict(names)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A Ctrl-C is heard: tests that run in the background of a shell would ignore it, as they should."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Loopback:
    """Serves a folder over HTTP; the next `failures` answers are 500. It may take .gz for how a file is sent."""

    def __init__(self, folder: Path) -> None:
        self.failures, self.gzip_is_encoding = 0, False
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

    def end_headers(self) -> None:
        if self.loopback.gzip_is_encoding and self.path.endswith(".gz"):
            self.send_header("Content-Encoding", "gzip")
        super().end_headers()

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


class Page(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.text = " ".join(self.text.split())
        self.links = [attributes["href"] or "" for tag, attributes in self.tags if tag == "a"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


FINISHED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass(frozen=True)
class Receipts:
    """What the steps before publishing left for a run."""

    run_id: str
    manifest: Manifest
    training: Training
    exported: Exported
    evaluation: Evaluation

    def publish(self, store: Store, **parameters: object) -> Published:
        given, versions = {"lr": 0.9, "seed": 0, "recipe": "seed", **parameters}, {"code": "abc", "torch": "2"}
        comparison = Comparison(promoted=False, reasons=["promote is off for this run"])
        return publish(store, self.run_id, given, versions, {"lock": "l", "hardware": "h"}, self.manifest,
                       self.training, self.evaluation, comparison)  # fmt: skip


@pytest.fixture(scope="session")
def forms() -> Callable[[LeNet], dict[str, bytes]]:
    """Function that gives a model's ONNX and torch.export forms, made once for each seed: the former takes 2 s."""
    made: dict[bytes, dict[str, bytes]] = {}

    def of(model: LeNet) -> dict[str, bytes]:
        key = encode_model(model)
        if key not in made:
            made[key] = {ONNX: encode_onnx(model, 28), PT2: encode_pt2(model, 28)}
        return made[key]

    return of


@pytest.fixture(scope="session")
def trained(
    small_manifest: Callable[[Store], Manifest], forms: Callable[[LeNet], dict[str, bytes]]
) -> Callable[..., Receipts]:
    """Function that leaves the receipts of a run in a store, its weights untrained or those of a model given."""

    def make(
        store: Store, run_id: str, finished: datetime = FINISHED, seed: int = 0, model: LeNet | None = None,
        manifest: Manifest | None = None,
    ) -> Receipts:  # fmt: skip
        manifest = manifest or small_manifest(store)
        model = model or RECIPES["seed"].build_model(10, seed)
        candidate = encode_model(model)
        key = f"{staging(run_id)}/candidate.safetensors"
        store.put(key, candidate)
        epoch = EpochMetrics(epoch=1, train_loss=2.3, train_accuracy=0.1, held_out_loss=2.3, held_out_accuracy=0.1,
                             seconds=1.0, images_per_second=600.0, world_size=2)  # fmt: skip
        training = Training(history=[epoch], candidate=key, candidate_sha256=sha256(candidate),
                            world_size=2, device="cpu", wall_seconds=1.0, finished=finished)  # fmt: skip
        every_form = {SAFETENSORS: candidate, **forms(model)}
        for name, data in every_form.items():
            store.put(exported_key(run_id, name), data)
        exported = Exported(
            candidate_sha256=sha256(candidate), forms={name: artifact_of(data) for name, data in every_form.items()}
        )
        store.put(f"{staging(run_id)}/export.json", exported.model_dump_json().encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.probe.PATIENCE_S", 0.01)  # how fast a model is, is not what is tested
            return Receipts(run_id, manifest, training, exported, evaluate(store, run_id, manifest, exported))

    return make


@pytest.fixture(scope="session")
def good_models(small_splits: "Splits") -> list[LeNet]:
    """Four models, each better on the small test split than the one before, after 0 to 60 passes of training."""
    model = RECIPES["modern"].build_model(10, 0, 0.0, 1.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.002)
    images, labels = (torch.from_numpy(array) for array in small_splits["train"])
    found, generator = [copy.deepcopy(model)], torch.Generator().manual_seed(0)
    for passes in (1, 2, 60):
        for _ in range(passes):
            for batch in torch.randperm(len(labels), generator=generator).split(60):
                optimizer.zero_grad()
                F.cross_entropy(model(normalise(images[batch])), labels[batch].long()).backward()
                optimizer.step()
        found.append(copy.deepcopy(model))
    return found


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Store, Callable[[Store], object]], Store]:
    """Function that fills an empty store with what `make`, named for that, once left in another: to train and publish
    a run takes a second on a disk, and three on S3."""
    made: dict[str, dict[str, bytes]] = {}

    def fill(name: str, store: Store, make: Callable[[Store], object]) -> Store:
        if name not in made:
            first = open_store(str(tmp_path_factory.mktemp("prepared")))
            make(first)
            made[name] = {key: first.read(key) for key in first.keys("")}
        store.fs.pipe({store.path(key): data for key, data in made[name].items()})
        return store

    return fill


@pytest.fixture
def model(
    tmp_path: Path, prepared: Callable[..., Store], trained: Callable[..., Receipts], good_models: list[LeNet]
) -> str:
    """URL of a store with a champion."""

    def make(first: Store) -> None:
        trained(first, "good-run", model=good_models[3].eval()).publish(first)
        promote_by_hand(first, "lenet", register(first, "lenet", "good-run").version)

    return prepared("a good run", open_store(str(tmp_path / "models")), make).url


@pytest.fixture
def published(
    store: Store, prepared: Callable[..., Store], trained: Callable[..., Receipts], good_models: list[LeNet]
) -> list[str]:
    """Runs r0 to r3 in a store, each better than the one before."""

    def make(first: Store) -> None:
        for number, model in enumerate(good_models):
            trained(first, f"r{number}", model=model).publish(first)

    prepared("four runs", store, make)
    return [f"r{number}" for number in range(len(good_models))]
