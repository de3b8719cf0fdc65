"""`make bench-scale`: millions of images sharded and streamed for an epoch on two workers, in bounded memory; writes
docs/scale.md.

The images are the real ones, each copy deformed a little and always the same way, as "infinite MNIST" does (Loosli,
Canu and Bottou, 2007). They are made as they are sharded, so nothing but the shards is ever stored.
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
from cyclopts import App, Parameter

from lenet.augment import Augment, augment
from pipeline.cluster import run_on_ray
from pipeline.download import SourceConfig, fetch
from pipeline.loader import LoadConfig
from pipeline.placement import ClusterConfig
from pipeline.recipe import TrainConfig
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest
from pipeline.source import Source, open_source
from pipeline.storage import Store, open_store
from pipeline.train import fit

ROOT = Path(__file__).parents[2]
DEFORM = Augment(shift=2, rotate=10, scale=0.1)
WORKERS = 2
app = App(help=__doc__)


@dataclass(frozen=True)
class Deformed(Source):
    """The images of one split again and again, all but the first time deformed."""

    images: int
    of: str = "train"

    def labels(self, split: str) -> np.ndarray:
        labels = super().labels(split)
        return np.resize(labels, self.images) if split == self.of else labels

    def read(self, split: str, rows: np.ndarray) -> np.ndarray:
        copy, original = np.divmod(rows, len(super().labels(split)))
        images = super().read(split, original)
        for number in np.unique(copy[copy > 0]):
            mine = np.flatnonzero(copy == number)
            args = torch.from_numpy(images[mine]), torch.from_numpy(original[mine])
            images[mine] = augment(*args, DEFORM, seed=0, epoch=int(number)).numpy()
        return images


@dataclass
class Memory:
    """Most memory of its own (USS, bytes) of this process and each below it, above what it had when first seen; and, at
    each look, of whichever below had most."""

    first: dict[int, int] = field(default_factory=dict)
    grown: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    largest: list[int] = field(default_factory=list)

    @property
    def most(self) -> tuple[str, float]:
        """The process that grew most, and by how many MB."""
        pid = max(self.grown, key=self.grown.__getitem__)
        return self.names[pid], self.grown[pid] / 1e6

    def look(self) -> None:
        """Look once at every process."""
        me = psutil.Process()
        self.largest.append(0)
        for process in [me, *me.children(recursive=True)]:
            try:
                used, name = process.memory_full_info().uss, " ".join(process.cmdline()).strip()[:40]
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            self.largest[-1] = max(self.largest[-1], used if process != me else 0)
            self.first.setdefault(process.pid, used)
            self.names[process.pid] = "driver" if process == me else name
            self.grown[process.pid] = max(self.grown.get(process.pid, 0), used - self.first[process.pid])


@contextmanager
def watched() -> Iterator[Memory]:
    """Look at all processes every second while the block runs."""
    memory, ended = Memory(), threading.Event()

    def look() -> None:
        while not ended.wait(1):
            memory.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def train(store: Store, run_id: str, manifest: Manifest) -> float:
    """Stream one epoch; microseconds per image."""
    config, cluster = TrainConfig(epochs=1), ClusterConfig(workers=WORKERS, gpu="no")
    training = fit(store, run_id, manifest, config, cluster, LoadConfig(loading="streaming"))
    return 1e6 * training.history[0].seconds / manifest.rows("train")


@app.default
def main(
    images: Annotated[int, Parameter(help="Training images.")] = 6_000_000,
    output: Annotated[Path, Parameter(help="Where the figures go.")] = ROOT / "docs" / "scale.md",
) -> None:
    """Measure and write the figures."""
    source = open_source(fetch(SourceConfig()))
    facts = source.facts.model_copy(update={"made_of": {**source.facts.made_of, "images": str(images)}})
    large = Deformed(source.folder, facts, images)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        started = time.perf_counter()
        with watched() as sharding:
            run = partial(run_on_ray, ClusterConfig(workers=1, gpu="no"))
            manifest = write_shards(store, large, ShardConfig(), run)
        seconds = time.perf_counter() - started
        print(f"sharded {images:,} images in {seconds:.0f} s; grew most: {sharding.most}", flush=True)
        small = train(store, "small", write_shards(store, source, ShardConfig()))
        print(f"60,000 images: {small:.1f} microseconds each", flush=True)
        with watched() as training:
            each = train(store, "large", manifest)
        print(f"{images:,} images: {each:.1f} microseconds each; grew most: {training.most}", flush=True)
        size = sum(shard.bytes for shard in manifest.splits["train"])
    text = f"""\
# Millions of images

Written by `make bench-scale`: {images:,} images made of Fashion-MNIST's 60,000 by small deformations, sharded by Ray
tasks and then streamed for one epoch of the seed recipe on two workers, on {psutil.cpu_count()} cores.

| | {images:,} images | 60,000 images |
| --- | --- | --- |
| shards | {len(manifest.splits["train"])}, {size / 1e9:.2f} GB | |
| making and sharding them, s | {seconds:.0f} | |
| most that any process grew by meanwhile, MB | {sharding.most[1]:.0f} ({sharding.most[0]}) | |
| training, microseconds per image | {each:.1f} | {small:.1f} |
| most that any process grew by meanwhile, MB | {training.most[1]:.0f} ({training.most[0]}) | |

A process's growth is its own memory (USS) above what it had when first seen, looked at once a second, so it has the
imports of PyTorch in it.
"""
    output.write_text(text)
    print(text)


if __name__ == "__main__":
    app()
