"""`make bench-scaling`: images/s by workers and global batch size, and a model of what a network would make of it; into
docs/scaling.md.

The model: a step takes the time of one worker's slice, measured in one process, and of adding up the gradients,
measured between processes of this machine by shared memory and by gloo. Between machines a ring takes 2 (W - 1)
messages, each for gloo's own time as measured and the wire's, and 2 (W - 1) / W of the gradient's bytes over the
bandwidth. The model is checked against what was measured here before it says anything about 64 machines.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cyclopts import App, Parameter

from lenet.recipe import RECIPES
from pipeline.cluster import LOCAL_RAY_SETTINGS
from pipeline.collective import BackendSum, SharedSum
from pipeline.download import SourceConfig, fetch
from pipeline.loader import LoadConfig
from pipeline.memory import keep_memory
from pipeline.placement import ClusterConfig
from pipeline.recipe import TrainConfig
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest, read_rows
from pipeline.source import open_source
from pipeline.storage import Store, open_store
from pipeline.train import fit
from pipeline.worker import open_learner

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))
WORKERS = tuple(workers for workers in (1, 2, 4, 8, 16) if workers <= max(4, CORES))
BATCHES, EPOCHS = (64, 256, 1024, 4096), 4
BITS_PER_S, WIRE_S, GRADIENT_BYTES = 10e9, 50e-6, 61_707 * 4
SUMS = 500
FAR = (1, 2, 4, 8, 16, 32, 64)
app = App(help=__doc__)


def measured(store: Store, manifest: Manifest, workers: int, batch: int) -> float:
    """Images/s of real training: the fastest epoch after the first."""
    config = TrainConfig(epochs=EPOCHS, global_batch_size=batch)
    cluster = ClusterConfig(workers=workers, gpu="no")
    history = fit(store, f"{workers}-{batch}", manifest, config, cluster, LoadConfig()).history
    return max(epoch.images_per_second for epoch in history[1:])


def seconds_of(act: Callable[[int], Any], times: int) -> float:
    """Of so many, each given its number, the least of three medians: what else the machine does comes and goes."""
    seconds = []
    for number in range(times):
        started = time.perf_counter()
        act(number)
        seconds.append(time.perf_counter() - started)
    return min(statistics.median(seconds[part * times // 3 : (part + 1) * times // 3]) for part in range(3))


class Steps:
    """A process's steps with a slice of so many images, on one thread."""

    def __init__(self, manifest: Manifest, images: torch.Tensor, labels: torch.Tensor) -> None:
        torch.set_num_threads(1)
        keep_memory()
        self.images, self.labels = images, labels
        _, self.gradient, self.optimization = open_learner(RECIPES["seed"], manifest, 0, torch.device("cpu"), 1000)

    def seconds(self, size: int, add_up: Callable[[torch.Tensor], Any] = lambda gradient: None) -> float:
        """Seconds of the gradient, the sum and the update."""

        def step(number: int) -> None:
            rows = torch.randint(len(self.labels), (size,))
            self.gradient(self.images[rows], self.labels[rows], global_batch=size)
            add_up(self.gradient.total)
            self.optimization.step(number)

        return seconds_of(step, min(3000, max(30, 30_000 // size)))


def rank_at_work(rank: int, workers: int, folder: Path, manifest: Manifest, *rows: torch.Tensor) -> None:
    """One of so many processes; rank 0 leaves the seconds of the sums alone, and of whole steps that add up by gloo."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous-{workers}", rank=rank, world_size=workers)
    steps, word = Steps(manifest, *rows), torch.zeros(())
    size = steps.gradient.total.numel()
    shared, backend = SharedSum(size), BackendSum(size, torch.device("cpu"))
    found: dict[str, Any] = {
        name: seconds_of(lambda number, add_up=add_up: add_up(torch.zeros(size), word), SUMS)  # type: ignore[misc]
        for name, add_up in (("shared", shared), ("gloo", backend))
    }
    found["steps"] = [
        steps.seconds(-(-batch // workers), lambda gradient: backend(gradient, word)) for batch in BATCHES
    ]
    if rank == 0:
        (folder / f"{workers}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@app.default
def main(
    output: Annotated[Path, Parameter(help="Where the tables go.")] = ROOT / "docs" / "scaling.md",
) -> None:
    """Measure and write the tables."""
    source = open_source(fetch(SourceConfig()))
    together: dict[int, dict[str, Any]] = {1: {"shared": 0.0}}
    with tempfile.TemporaryDirectory() as temporary:
        store = open_store(temporary)
        manifest = write_shards(store, source, ShardConfig())
        ray.init(
            address="local", num_cpus=max(WORKERS), include_dashboard=False, log_to_driver=False,
            _system_config=LOCAL_RAY_SETTINGS,
        )  # fmt: skip
        found = {}
        for batch in BATCHES:
            for workers in WORKERS:
                found[workers, batch] = measured(store, manifest, workers, batch)
                print(workers, batch, round(found[workers, batch]), flush=True)
        ray.shutdown()
        rows = [torch.from_numpy(array) for array in read_rows(store, manifest, "train")]
        for workers in WORKERS[1:]:
            mp.spawn(rank_at_work, (workers, Path(temporary), manifest, *rows), nprocs=workers)
            together[workers] = json.loads((Path(temporary) / f"{workers}.json").read_text())
            print(workers, together[workers], flush=True)
    alone = Steps(manifest, *rows)
    sizes = sorted({-(-batch // workers) for batch in BATCHES for workers in FAR})
    compute = {size: alone.seconds(size) for size in sizes}
    text = report(found, together, compute)
    output.write_text(text)
    print(text)


def report(found: dict[tuple[int, int], float], together: dict[int, dict[str, Any]], compute: dict[int, float]) -> str:
    """What was measured, beside what the model makes of its parts."""
    most = max(workers for workers in WORKERS if workers <= max(2, CORES))
    message_s = together[most]["gloo"] / (2 * (most - 1))

    def here(workers: int, batch: int, way: str) -> float:
        turns = max(1, workers / CORES)  # workers that share a core take turns
        return batch / (compute[-(-batch // workers)] * turns + together[workers][way])

    def ring_s(workers: int) -> float:
        messages = 2 * (workers - 1)
        return messages / workers * GRADIENT_BYTES * 8 / BITS_PER_S + messages * (message_s + WIRE_S)

    def far(workers: int, batch: int) -> float:
        return batch / (compute[-(-batch // workers)] + ring_s(workers))

    def row(batch: int, cells: list[str]) -> str:
        return f"| {batch} | {' | '.join(cells)} |"

    def beside(value: float, model: float) -> str:
        return f"{value:,.0f} ({value / model:.2f})"

    trained = [
        row(batch, [beside(found[workers, batch], here(workers, batch, "shared")) for workers in WORKERS])
        for batch in BATCHES
    ]
    by_gloo = [
        row(
            batch,
            [beside(batch / together[workers]["steps"][at], here(workers, batch, "gloo")) for workers in WORKERS[1:]],
        )
        for at, batch in enumerate(BATCHES)
    ]
    told = [row(batch, [f"{far(workers, batch):,.0f}" for workers in FAR]) for batch in BATCHES]
    sums = [
        f"| {workers} | {together[workers]['shared'] * 1e3:.2f} | {together[workers]['gloo'] * 1e3:.2f} |"
        for workers in WORKERS[1:]
    ]
    like = min(compute, key=lambda size: abs(compute[size] - ring_s(FAR[-1])))
    nl = "\n"
    return f"""\
# Workers and batches

Written by `make bench-scaling` on {CORES} cores, no GPU, torch {torch.__version__}: the seed recipe on 60,000 images,
{EPOCHS} epochs each, images/s of the fastest epoch after the first. In brackets: over what the model below says for
workers on one machine, where {CORES} can work at a time. For 60 thousand to 6 million images see [scale.md](scale.md).

| global batch | {" | ".join(f"{workers} workers" for workers in WORKERS)} |
| --- |{" --- |" * len(WORKERS)}
{nl.join(trained)}

## The model

A step takes the time of one worker's slice, as measured in one process, and of the sum of {GRADIENT_BYTES / 1e3:.0f} KB
of gradients, as measured here by itself, in milliseconds:

| processes | by shared memory | by gloo |
| --- | --- | --- |
{nl.join(sums)}

Workers on one machine add up by shared memory, as above. Processes that add up by gloo, as between machines, without
Ray, made so many images/s; in brackets, over the model:

| global batch | {" | ".join(f"{workers} processes" for workers in WORKERS[1:])} |
| --- |{" --- |" * (len(WORKERS) - 1)}
{nl.join(by_gloo)}

## What a network of 10 Gbit/s would make of it

Not measured, but computed: one core on each machine, and a ring's 2 (W - 1) messages, each {message_s * 1e6:.0f}
microseconds of gloo's, as measured with {most} processes, and {WIRE_S * 1e6:.0f} of the wire's. LeNet is so small that
messages, not bytes, set the limit: with {FAR[-1]} workers they take {ring_s(FAR[-1]) * 1e3:.1f} ms, as long as one
worker's gradient of {like} images.

| global batch | {" | ".join(map(str, FAR))} |
| --- |{" --- |" * len(FAR)}
{nl.join(told)}
"""


if __name__ == "__main__":
    app()
