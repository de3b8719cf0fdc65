"""`make bench-data`: the data plane against Ray Data, Hugging Face datasets and torchvision's DataLoader, alternating,
in one run; writes docs/data-benchmarks.md.

All work on the same real Fashion-MNIST. The others are used the way that was fastest of those we tried.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import datasets as huggingface
import numpy as np
import ray
import ray.data
import ray.train
import torch
from cyclopts import App, Parameter
from ray.train.torch import TorchTrainer
from textbook import BATCH, link_raw_files
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from pipeline.cluster import RAY_TRAIN_SETTINGS
from pipeline.download import SourceConfig, fetch
from pipeline.loader import LoadConfig, Loading, Place, open_loader
from pipeline.placement import ClusterConfig
from pipeline.recipe import TrainConfig
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest, read_rows
from pipeline.source import Source, open_source
from pipeline.storage import open_store
from pipeline.train import fit

ROOT = Path(__file__).parents[2]
IMAGES, WORKERS, EPOCHS = 60_000, 2, 3
app = App(help=__doc__)


def shard_ours(source: Source, folder: Path) -> None:
    """All 70,000 images: shards, digests of every image, data report, read-back check, manifest."""
    write_shards(open_store(str(folder)), source, ShardConfig())


def shard_huggingface(source: Source, folder: Path) -> None:
    """The 60,000 training images as arrays, as its documentation has them."""
    images = source.read("train", np.arange(IMAGES))
    folder.mkdir()
    table = {"image": list(images), "label": source.labels("train").tolist()}
    huggingface.Dataset.from_dict(table).to_parquet(folder / "train.parquet")


def shard_huggingface_bytes(source: Source, folder: Path) -> None:
    """The same, every image packed into bytes by hand, so that its shape is lost."""
    images = source.read("train", np.arange(IMAGES))
    folder.mkdir()
    table = {"image": [image.tobytes() for image in images], "label": source.labels("train").tolist()}
    huggingface.Dataset.from_dict(table).to_parquet(folder / "train.parquet")


def shard_ray_data(source: Source, folder: Path) -> None:
    """The 60,000 training images as arrays, in eight blocks."""
    images = source.read("train", np.arange(IMAGES)).reshape(IMAGES, -1)
    ray.data.from_numpy(np.array_split(images, 8)).write_parquet(str(folder))


SHARDERS = {
    "sharding, ours": shard_ours,
    "sharding, Hugging Face": shard_huggingface,
    "sharding, Hugging Face from bytes": shard_huggingface_bytes,
    "sharding, Ray Data": shard_ray_data,
}


def read_ours(config: dict[str, Any]) -> None:
    """A worker of ours: the seconds of every epoch of reading alone."""
    context = ray.train.get_context()
    place = Place(
        open_store(config["store"]), config["manifest"], "train", 0, BATCH,
        context.get_world_rank(), context.get_world_size(), torch.device("cpu"),
    )  # fmt: skip
    started = time.perf_counter()
    loader = open_loader(config["loading"], place)
    loading = time.perf_counter() - started
    _leave(config, {"seconds": _epochs(lambda epoch: loader.batches(epoch)), "loading": loading})


def read_ray_data(config: dict[str, Any]) -> None:
    """A worker of Ray Data: the same shards, a local shuffle."""
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None

    def batches(_: int) -> Any:
        return shard.iter_torch_batches(batch_size=BATCH // WORKERS, local_shuffle_buffer_size=10_000)

    _leave(config, {"seconds": _epochs(batches)})


def _leave(config: dict[str, Any], found: dict[str, Any]) -> None:
    """Ray Train hands out metrics with checkpoints only, so rank 0 leaves them in a file."""
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["result"]).write_text(json.dumps(found))
    ray.train.report({})


def _epochs(batches: Callable[[int], Any]) -> list[float]:
    seconds = []
    for epoch in range(1, EPOCHS + 1):
        started, total = time.perf_counter(), 0
        for batch in batches(epoch):
            labels = batch.labels if hasattr(batch, "labels") else batch["label"]
            total += int(labels.long().sum())
        seconds.append(time.perf_counter() - started)
        assert total > 0
    return seconds


def unpacked(batch: dict[str, Any]) -> dict[str, Any]:
    """Arrow's bytes as arrays (n, 28, 28)."""
    image = batch["image"].combine_chunks()
    pixels = np.frombuffer(image.buffers()[1], np.uint8, len(image) * 784, image.offset * 784)
    return {"image": pixels.reshape(-1, 28, 28), "label": batch["label"].to_numpy()}


def on_workers(loop: Callable[[dict[str, Any]], None], config: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Run a reading loop on two Ray Train workers; rank 0's figures."""
    trainer = TorchTrainer(
        loop, train_loop_config=config, datasets=data, scaling_config=ray.train.ScalingConfig(num_workers=WORKERS)
    )
    trainer.fit()
    found: dict[str, Any] = json.loads(Path(config["result"]).read_text())
    return found


def read_back(store: str, manifest: Manifest) -> list[float]:
    """Seconds of reading, checking and decoding all training shards, five times."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        read_rows(open_store(store), manifest, "train")
        seconds.append(time.perf_counter() - started)
    return seconds


def read_torchvision(root: Path) -> list[float]:
    """torchvision's dataset, ToTensor, a DataLoader with two processes."""
    data = datasets.FashionMNIST(root, train=True, transform=transforms.ToTensor())
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=2)
    seconds = []
    for _ in range(EPOCHS):
        started = time.perf_counter()
        assert sum(int(labels.sum()) for _, labels in loader) > 0
        seconds.append(time.perf_counter() - started)
    return seconds


def train(store: str, manifest: Manifest, loading: Loading, name: str) -> list[float]:
    """Images/s of each epoch of the seed recipe on two workers."""
    config, cluster = TrainConfig(epochs=EPOCHS), ClusterConfig(workers=WORKERS, gpu="no")
    training = fit(open_store(store), name, manifest, config, cluster, LoadConfig(loading=loading))
    return [epoch.images_per_second for epoch in training.history]


@app.default
def main(
    rounds: Annotated[int, Parameter(help="Rounds of all.")] = 3,
    output: Annotated[Path, Parameter(help="Where the table goes.")] = ROOT / "docs" / "data-benchmarks.md",
) -> None:
    """Measure and write the table."""
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    source = open_source(fetch(SourceConfig()))
    # Room for Ray Data's own tasks beside the two workers: without it they wait for each other for ever.
    ray.init(address="local", num_cpus=2 * WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    measured: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        measured.setdefault(name, []).append(value)
        print(f"{name}: {value:,.3f}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        link_raw_files(source.folder, root)
        store = str(root / "store")
        manifest = write_shards(open_store(store), source, ShardConfig())
        shards = [f"{store}/{manifest.folder}/{shard.name}" for shard in manifest.splits["train"]]
        for number in range(rounds):
            for name, sharder in SHARDERS.items():
                started = time.perf_counter()
                sharder(source, root / f"{sharder.__name__}-{number}")
                note(f"{name}, s", time.perf_counter() - started)
            note("read back, GB/s", manifest.pixel_bytes("train") / 1e9 / statistics.median(read_back(store, manifest)))
            for loading in ("resident", "streaming"):
                config = {"store": store, "manifest": manifest, "loading": loading, "result": str(root / "result")}
                found = on_workers(read_ours, config, {})
                note(f"reading, {loading}, images/s", IMAGES / statistics.median(found["seconds"]))
                if loading == "resident":
                    note("reading, resident, the load before, s", found["loading"])
            table = ray.data.read_parquet(shards, columns=["image", "label"])
            decoded = table.map_batches(unpacked, batch_format="pyarrow", zero_copy_batch=True)
            found = on_workers(read_ray_data, {"result": str(root / "result")}, {"train": decoded})
            note("reading, Ray Data, images/s", IMAGES / statistics.median(found["seconds"]))
            note("reading, DataLoader, images/s", IMAGES / statistics.median(read_torchvision(root)))
            for loading in ("resident", "streaming"):
                rates = train(store, manifest, loading, f"{loading}-{number}")
                note(f"training, {loading}, images/s", statistics.median(rates))
    text = report(measured, rounds)
    output.write_text(text)
    print(text)


def report(measured: dict[str, list[float]], rounds: int) -> str:
    """The figures as Markdown: median and range of each, and of the ratios round by round."""

    def row(name: str, values: list[float]) -> str:
        digits = 0 if statistics.median(values) >= 100 else 2
        low, middle, high = (f"{v:,.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
        return f"| {name} | {middle} | {low} to {high} |"

    def ratio(above: str, *below: str) -> list[float]:
        return [a / max(b) for a, *b in zip(measured[above], *(measured[name] for name in below), strict=True)]

    faster = [
        min(pair) for pair in zip(measured["sharding, Hugging Face, s"], measured["sharding, Ray Data, s"], strict=True)
    ]
    readers = ("reading, Ray Data, images/s", "reading, DataLoader, images/s")
    sharding = [theirs / ours for theirs, ours in zip(faster, measured["sharding, ours, s"], strict=True)]
    lines = [row(name, values) for name, values in measured.items()]
    lines += [
        row("sharding: the faster of Hugging Face and Ray Data over ours", sharding),
        row(
            "sharding: Hugging Face from bytes packed by hand over ours",
            ratio("sharding, Hugging Face from bytes, s", "sharding, ours, s"),
        ),
        row("reading: resident over the faster of the two", ratio("reading, resident, images/s", *readers)),
        row("reading: streaming over the faster of the two", ratio("reading, streaming, images/s", *readers)),
        row(
            "training: streaming over resident", ratio("training, streaming, images/s", "training, resident, images/s")
        ),
    ]
    return f"""\
# The data plane's speed

Written by `make bench-data`: {rounds} rounds, everything once in each, on {platform.machine()} with
{torch.get_num_threads()} cores and no GPU, torch {torch.__version__}, ray {ray.__version__}, datasets
{huggingface.__version__}. Higher is better, but for seconds.

- Sharding: ours is all 70,000 images with digests, report and read-back check; the others' are the 60,000 training
  images, and nothing else; from arrays, and for Hugging Face also from bytes.
- Reading alone, no model: two Ray Train workers, {EPOCHS} epochs of 60,000 images in batches of {BATCH}, the median
  of the epochs. Ray Data reads the same shards and shuffles 10,000 rows; the DataLoader has two processes.
- Training: the seed recipe on two workers, {EPOCHS} epochs, their median.

| n = {rounds} | median | range |
| --- | --- | --- |
{chr(10).join(lines)}
"""


if __name__ == "__main__":
    app()
