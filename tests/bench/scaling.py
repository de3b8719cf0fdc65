"""`make bench-scaling`: images/s by workers and global batch size, and a model of what a network would make of it; into
docs/scaling.md.

The model: a step takes the time of one worker's slice, measured in one process, and of adding up the gradients. On one
machine that is measured; between machines it is a ring's 2 (W - 1) / W of the gradient's bytes over the bandwidth and
2 (W - 1) messages. It is checked against what was measured with 1, 2 and 4 workers before it says anything about 64.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import ray
import torch
from cyclopts import App, Parameter

from lenet.recipe import RECIPES
from pipeline.cluster import ClusterConfig
from pipeline.download import SourceConfig, fetch
from pipeline.loader import LoadConfig
from pipeline.recipe import TrainConfig
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest, read_rows
from pipeline.source import open_source
from pipeline.storage import Store, open_store
from pipeline.train import fit
from pipeline.worker import keep_memory, open_learner

ROOT = Path(__file__).parents[2]
WORKERS, BATCHES, EPOCHS = (1, 2, 4), (64, 256, 1024, 4096), 3
BITS_PER_S, LATENCY_S, GRADIENT_BYTES = 10e9, 50e-6, 61_707 * 4
SHARED_MEMORY_S = 0.12e-3  # adding up on one host, of pipeline/collective.py
FAR = (1, 2, 4, 8, 16, 32, 64)
app = App(help=__doc__)


def measured(store: Store, manifest: Manifest, workers: int, batch: int) -> float:
    """Images/s of real training: the median of the epochs after the first."""
    config = TrainConfig(epochs=EPOCHS, global_batch_size=batch)
    cluster = ClusterConfig(workers=workers, gpu="no")
    history = fit(store, f"{workers}-{batch}", manifest, config, cluster, LoadConfig()).history
    return statistics.median(epoch.images_per_second for epoch in history[1:])


def slice_seconds(manifest: Manifest, images: torch.Tensor, labels: torch.Tensor, size: int) -> float:
    """Seconds of one process, one thread, for the gradient and the update with a slice of that many images."""
    model, gradient, optimization = open_learner(RECIPES["seed"], manifest, 0, torch.device("cpu"), 1000)
    del model
    seconds = []
    for step in range(max(20, 20_000 // size)):
        rows = torch.randint(len(labels), (size,))
        started = time.perf_counter()
        gradient(images[rows], labels[rows], global_batch=size)
        optimization.step(step)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def ring_seconds(workers: int) -> float:
    """Seconds of adding up the gradients of so many machines on a 10 Gbit/s network."""
    return 2 * (workers - 1) / workers * GRADIENT_BYTES * 8 / BITS_PER_S + 2 * (workers - 1) * LATENCY_S


@app.default
def main(
    output: Annotated[Path, Parameter(help="Where the tables go.")] = ROOT / "docs" / "scaling.md",
) -> None:
    """Measure and write the tables."""
    cores = len(os.sched_getaffinity(0))
    source = open_source(fetch(SourceConfig()))
    with tempfile.TemporaryDirectory() as temporary:
        store = open_store(temporary)
        manifest = write_shards(store, source, ShardConfig())
        ray.init(address="local", num_cpus=max(WORKERS), include_dashboard=False, log_to_driver=False)
        found = {}
        for batch in BATCHES:
            for workers in WORKERS:
                found[workers, batch] = measured(store, manifest, workers, batch)
                print(workers, batch, round(found[workers, batch]), flush=True)
        ray.shutdown()
        torch.set_num_threads(1)
        keep_memory()
        images, labels = (torch.from_numpy(array) for array in read_rows(store, manifest, "train"))
        sizes = sorted({-(-batch // workers) for batch in BATCHES for workers in FAR})
        compute = {size: slice_seconds(manifest, images, labels, size) for size in sizes}

    def here(workers: int, batch: int) -> float:
        turns = max(1, workers / cores)  # workers that share a core take turns
        return batch / (compute[-(-batch // workers)] * turns + (SHARED_MEMORY_S if workers > 1 else 0))

    def far(workers: int, batch: int) -> float:
        return batch / (compute[-(-batch // workers)] + ring_seconds(workers))

    seen = [
        f"| {batch} | " + " | ".join(
            f"{found[workers, batch]:,.0f} ({found[workers, batch] / here(workers, batch):.2f})" for workers in WORKERS
        ) + " |"
        for batch in BATCHES
    ]  # fmt: skip
    told = [f"| {batch} | " + " | ".join(f"{far(workers, batch):,.0f}" for workers in FAR) + " |" for batch in BATCHES]
    text = f"""\
# Workers and batches

Written by `make bench-scaling` on {cores} cores, no GPU, torch {torch.__version__}: the seed recipe on 60,000 images,
{EPOCHS} epochs each, images/s of the median epoch after the first. In brackets: over what the model below says for
workers on one machine, where {cores} can work at a time. For 60 thousand to 6 million images see [scale.md](scale.md).

| global batch | {" | ".join(f"{workers} workers" for workers in WORKERS)} |
| --- |{" --- |" * len(WORKERS)}
{chr(10).join(seen)}

## What a network of 10 Gbit/s would make of it

Not measured, but computed: one core on each machine, the time of its slice as measured in one process here, and a
ring's time for {GRADIENT_BYTES / 1e3:.0f} KB of gradients with {LATENCY_S * 1e6:.0f} microseconds a message. LeNet is
so small that messages, not bytes, set the limit: with 64 workers they take {ring_seconds(64) * 1e3:.1f} ms, as long as
one worker's gradient of {min(sizes, key=lambda size: abs(compute[size] - ring_seconds(64)))} images.

| global batch | {" | ".join(map(str, FAR))} |
| --- |{" --- |" * len(FAR)}
{chr(10).join(told)}
"""
    output.write_text(text)
    print(text)


if __name__ == "__main__":
    app()
