"""`make gpu-check`: what only a machine with a GPU can show; writes docs/gpu.md.

Results are compared with the CPU's, and with themselves: a training again, with its worker killed on the way. Then
rounds of the textbook loop on the GPU, its steps on images that are there already, and `lenet train`, alternating.
"""

import itertools
import os
import re
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import psutil
import torch
from cyclopts import App, Parameter
from speed import IMAGES, Ours, run_ours
from textbook import BATCH, link_raw_files, tensor_loop, textbook_loop

from lenet.augment import Augment, augment, draws
from lenet.recipe import RECIPES, Recipe
from lenet.step import GraphedGradient
from pipeline.checkpoint import EpochMetrics
from pipeline.download import SourceConfig, fetch
from pipeline.loader import LoadConfig, Loading, Place, augmented, open_loader
from pipeline.placement import ClusterConfig
from pipeline.recipe import TrainConfig
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest, read_rows
from pipeline.source import open_source
from pipeline.storage import Store, open_store
from pipeline.train import Training, fit
from pipeline.worker import open_learner

ROOT = Path(__file__).parents[2]
STEPS, SEEDS = 100, 5
EVERYTHING = Augment(flip=0.5, shift=2, rotate=15, scale=0.1, erase=6)
app = App(help=__doc__)


@dataclass(frozen=True)
class Data:
    """Fashion-MNIST, sharded."""

    store: Store
    manifest: Manifest


def losses(data: Data, recipe: Recipe, loading: Loading, device: str) -> torch.Tensor:
    """Mean loss of each of the first 100 steps on that device. RuntimeError if the host waits for a GPU meanwhile."""
    place = Place(data.store, data.manifest, "train", 0, recipe.global_batch_size, 0, 1, torch.device(device))
    _, gradient, optimization = open_learner(recipe, data.manifest, 0, place.device, place.steps)
    assert isinstance(gradient, GraphedGradient) == (device == "cuda")
    found = []
    batches = augmented(open_loader(loading, place).batches(1), recipe.augment, 0, 1)
    try:
        for step, batch in enumerate(itertools.islice(batches, STEPS)):
            counts = gradient(batch.images, batch.labels, global_batch=batch.size)
            found.append(counts[0] / batch.size)
            optimization.step(step)
            if device == "cuda":  # from now on; to record the first step it has to wait
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return torch.stack(found).cpu()


def check_losses(data: Data) -> list[str]:
    """The losses' greatest relative distance from the CPU's, as lines of a table."""
    lines = []
    for name, precision, loading, tolerance in (
        ("seed", "float32", "resident", 1e-4),
        ("seed", "float32", "streaming", 1e-4),
        ("classic", "float32", "resident", 1e-4),
        ("modern", "float32", "resident", 2e-2),  # Muon computes in bfloat16
        ("seed", "bfloat16", "resident", 2e-2),
    ):
        recipe = replace(RECIPES[name], precision=precision)
        cpu = losses(data, replace(recipe, precision="float32"), loading, "cpu")
        apart = float(((losses(data, recipe, loading, "cuda") - cpu) / cpu).abs().max())
        lines.append(f"| {name}, {precision}, {loading} | {apart:.1e} | {tolerance:g} |")
        print(lines[-1], flush=True)
        assert apart <= tolerance, lines[-1]
    return lines


def check_augmentation(data: Data) -> None:
    """Whole pixels move as on the CPU; what is interpolated may round the other way."""
    images = torch.from_numpy(read_rows(data.store, data.manifest, "test")[0])
    rows = torch.arange(len(images))
    assert torch.equal(draws(rows.cuda(), 3, 4).cpu(), draws(rows, 3, 4))

    def apart(config: Augment) -> torch.Tensor:
        there = augment(images.cuda(), rows.cuda(), config, 3, 4).cpu()
        return (there.int() - augment(images, rows, config, 3, 4).int()).abs()

    assert not apart(replace(EVERYTHING, rotate=0, scale=0)).any()
    rounded = apart(EVERYTHING)
    assert rounded.max() <= 1
    assert rounded.double().mean() < 1e-3


def train(
    data: Data, run_id: str, on_epoch: Callable[[EpochMetrics], None] = lambda epoch: None, **recipe: object
) -> Training:
    """A training on the one GPU."""
    cluster = ClusterConfig(workers=1, gpu="yes")
    training = fit(
        data.store, run_id, data.manifest, TrainConfig.model_validate(recipe), cluster, LoadConfig(), on_epoch
    )
    assert training.device == "gpu"
    print(run_id, f"{rate(training):,.0f} images/s, {training.history[-1].held_out_accuracy:.4f}", flush=True)
    return training


def rate(training: Training) -> float:
    """Images/s, the median of the epochs."""
    return statistics.median(epoch.images_per_second for epoch in training.history)


def check_repetition(data: Data, training: Training, **recipe: object) -> None:
    """The same weights, to the bit, although the worker is killed on the way."""
    killed: list[int] = []

    def kill(epoch: EpochMetrics) -> None:
        workers = [process for process in psutil.process_iter() if "RayTrainWorker" in process.name()]
        if not killed and workers:
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(epoch.epoch)

    again = train(data, "again", kill, **recipe)
    print("killed in or after epoch", killed, flush=True)
    assert killed
    assert killed[0] < again.history[-1].epoch
    assert again.candidate_sha256 == training.candidate_sha256


@app.default
def main(
    rounds: Annotated[int, Parameter(help="Rounds of all loops.")] = 3,
    output: Annotated[Path, Parameter(help="Where the tables go.")] = ROOT / "docs" / "gpu.md",
) -> None:
    """Check, and print what was seen; exit code 1 if there is no GPU or it computes something else."""
    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no GPU here")
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        raw = fetch(SourceConfig())
        link_raw_files(raw, root)
        store = open_store(str(root / "store"))
        data = Data(store, write_shards(store, open_source(raw), ShardConfig()))
        check_augmentation(data)
        apart = check_losses(data)
        modern = [train(data, f"modern-{seed}", recipe="modern", seed=seed) for seed in range(SEEDS)]
        check_repetition(data, modern[0], recipe="modern", seed=0)
        others = {name: train(data, name, recipe=name) for name in ("seed", "classic")}
        others |= {
            "seed in bfloat16": train(data, "rough", recipe="seed", precision="bfloat16"),
            "seed, batches of 4,096": train(data, "large", recipe="seed", global_batch_size=4096),
        }
        run_ours(root / "warm-up", 1, "--gpu", "yes", workers=1)  # Prefect's database, bytecode
        measured: dict[str, list[float]] = {"textbook": [], "tensors": [], "ours": []}
        whole: list[Ours] = []
        train_x, train_y, test_x, test_y = (
            torch.from_numpy(array).cuda()
            for split in ("train", "test")
            for array in read_rows(store, data.manifest, split)
        )
        for number in range(rounds):
            for name, history in (
                ("textbook", textbook_loop(root, 2, device="cuda")),
                ("tensors", tensor_loop(train_x, train_y.long(), (test_x, test_y.long()), 4, 0)),
            ):
                measured[name].append(IMAGES / min(epoch.seconds for epoch in history))
            whole.append(run_ours(root / f"round-{number}", 10, "--gpu", "yes", workers=1))
            measured["ours"].append(whole[-1].rate)
            print({name: round(values[-1]) for name, values in measured.items()}, whole[-1], flush=True)
    output.write_text(report(apart, modern, others, measured, whole))
    print(output.read_text())


def report(
    apart: list[str],
    modern: list[Training],
    others: dict[str, Training],
    measured: dict[str, list[float]],
    whole: list[Ours],
) -> str:
    """What was seen, as Markdown."""

    def row(name: str, values: list[float], digits: int = 0) -> str:
        low, middle, high = min(values), statistics.median(values), max(values)
        return f"| {name} | {middle:,.{digits}f} | {low:,.{digits}f} to {high:,.{digits}f} |"

    def over(name: str) -> list[float]:
        return [ours / other for ours, other in zip(measured["ours"], measured[name], strict=True)]

    nl = "\n"
    last = modern[0].history[-1]
    accuracy = [training.history[-1].held_out_accuracy for training in modern]
    rates = nl.join(
        f"| {name} | {rate(training):,.0f} | {training.history[-1].held_out_accuracy:.4f} |"
        for name, training in {"modern": modern[0], **others}.items()
    )
    [pinned] = re.findall(r"^torch==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return f"""\
# On a GPU

Written by `make gpu-check` on one {torch.cuda.get_device_name()} and {os.cpu_count()} cores, torch {torch.__version__};
requirements.lock has torch {pinned}.

The first {STEPS} steps' losses were as far as this from the CPU's in float32, at most, and the host did not wait for
the GPU in any step after the first. Augmented images are the CPU's.

| recipe, precision, loading | relative distance | allowed |
| --- | --- | --- |
{nl.join(apart)}

`modern` trained {last.epoch} epochs in {sum(epoch.seconds for epoch in modern[0].history):.0f} s, over {SEEDS} seeds to
an accuracy of {statistics.mean(accuracy):.4f} on the {last.held_out} split (standard deviation
{statistics.stdev(accuracy):.4f}, {min(accuracy):.4f} to {max(accuracy):.4f}). Trained again, with its worker killed on
the way, it had the same weights, to the bit.

| recipe, one GPU | images/s while training | accuracy, {last.held_out} |
| --- | --- | --- |
{rates}

Against plain PyTorch on the same GPU, alternating; images/s are of the seed recipe with batches of {BATCH}. The
textbook loop has a DataLoader with two processes; its steps on images that are there have all of them on the GPU
([tests/bench/textbook.py](../tests/bench/textbook.py)). Of both the fastest epoch counts. `lenet train` is timed from
its process's start to its end, and its images/s are the median of its ten epochs.

| n = {len(whole)} | median | range |
| --- | --- | --- |
{row("textbook loop on the GPU, images/s", measured["textbook"])}
{row("its steps on images that are there, images/s", measured["tensors"])}
{row("lenet train, one GPU, images/s", measured["ours"])}
{row("lenet train over the textbook loop", over("textbook"), 1)}
{row("lenet train over its steps on images that are there", over("tensors"), 1)}
{row("lenet train, everything, s", [one.wall for one in whole], 1)}
{row("from the command to the first step, s", [one.ahead for one in whole], 1)}
{row("from the last epoch to the published report, s", [one.after for one in whole], 1)}
"""


if __name__ == "__main__":
    app()
