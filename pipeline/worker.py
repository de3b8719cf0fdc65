"""What every Ray Train worker runs: its part of each global batch, an epoch at a time."""

import ctypes
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lenet.augment import augment
from lenet.fused import open_gradient
from lenet.recipe import Recipe
from lenet.step import Gradient, evaluate_step, flatten, metrics_of, no_counts
from pipeline.checkpoint import EpochMetrics, Position, load_state, save_state
from pipeline.collective import Sum, open_sum
from pipeline.loader import Loader, Loading, Place, open_loader
from pipeline.order import share
from pipeline.shards import Manifest, read_rows
from pipeline.storage import open_store

EVALUATION_BATCH = 1000
MIB = 2**20
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


@dataclass(frozen=True)
class Job:
    """All a worker needs to know; the same for every rank."""

    store_url: str
    manifest: Manifest
    recipe: Recipe
    seed: int
    loading: Loading
    checkpoint_steps: int | None


@dataclass(frozen=True)
class Split:
    """Resident rows: images uint8 (n, height, width) and labels uint8 (n,) on the worker's device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Session:
    """A rank at work."""

    job: Job
    place: Place
    model: nn.Module
    gradient: Gradient
    sum_up: Sum
    optimizer: torch.optim.Optimizer
    loader: Loader


def train_worker(config: dict[str, Any]) -> None:
    """Train `config["job"]` from where the run's last checkpoint stands; a report for every epoch."""
    job: Job = config["job"]
    session, position = _begin(job)
    held_out = load_share(session.place, job.manifest.held_out)
    while position.epoch <= job.recipe.epochs:
        train = metrics_of(_train_epoch(session, position))
        test = metrics_of(summed(evaluate_split(session.model, held_out)))
        metrics = EpochMetrics(
            epoch=position.epoch,
            held_out=job.manifest.held_out,
            train_loss=train.loss,
            train_accuracy=train.accuracy,
            held_out_loss=test.loss,
            held_out_accuracy=test.accuracy,
            seconds=position.seconds,
            images_per_second=train.images / position.seconds,
        )
        if not math.isfinite(train.loss):
            # Every rank sees the same sum and stops here. No checkpoint: the last good one stays the last.
            ray.train.report(metrics.model_dump())
            return
        position = Position(epoch=position.epoch + 1, history=[*position.history, metrics])
        _report(session, position, metrics.model_dump())


def _begin(job: Job) -> tuple[Session, Position]:
    """Model, optimizer and loader of this rank, as the last checkpoint left them, and where that stands."""
    keep_memory()
    context = ray.train.get_context()
    manifest, recipe, device = job.manifest, job.recipe, ray.train.torch.get_device()
    model = recipe.build_model(len(manifest.classes), job.seed, manifest.report.pixel_mean, manifest.report.pixel_std)
    model = model.to(device).to(memory_format=torch.channels_last)  # 1.7 times as fast as NCHW on CPUs
    flat = flatten(model)
    optimizer = recipe.build_optimizer([flat], recipe.lr)
    position = _restore(model, optimizer)
    one_host = context.get_local_world_size() == context.get_world_size()
    place = Place(
        store=open_store(job.store_url),
        manifest=manifest,
        split="train",
        seed=job.seed,
        global_batch_size=recipe.global_batch_size,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
    )
    session = Session(
        job,
        place,
        model,
        open_gradient(model, flat),
        open_sum(flat.numel(), device, one_host),
        optimizer,
        open_loader(job.loading, place),
    )
    return session, position


def _train_epoch(session: Session, position: Position) -> Tensor:
    """Train from `position`, which is kept up to date, to the end of its epoch; the epoch's counts over all ranks."""
    job, place = session.job, session.place
    session.model.train()
    # What was counted before the checkpoint counts once, however many ranks there are now.
    counts = torch.tensor(position.counts, dtype=torch.float64, device=place.device) * (place.rank == 0)
    started = time.perf_counter() - position.seconds
    for step, batch in enumerate(session.loader.batches(position.epoch, position.step), start=position.step + 1):
        images = augment(batch.images, batch.rows, job.recipe.augment, job.seed, position.epoch)
        counts += session.gradient(images, batch.labels, global_batch=batch.size)
        session.sum_up(session.gradient.total)
        session.optimizer.step()
        if job.checkpoint_steps and step % job.checkpoint_steps == 0 and step < place.steps:
            position.step, position.seconds = step, time.perf_counter() - started
            so_far = summed(counts.clone())
            loss, correct, images = so_far.tolist()
            if not math.isfinite(loss):
                return so_far  # on every rank: no checkpoint of weights that are lost, and no more steps with them
            position.counts = (loss, correct, images)
            _report(session, position, {"epoch": position.epoch, "step": step})
    total = summed(counts)
    position.seconds = time.perf_counter() - started
    return total


def keep_memory() -> None:
    """Let this process keep the memory it frees, where the C library is glibc.

    Otherwise a step's tensors, some megabytes each, are given back and asked for again: 900 to 1,900 page faults and
    2 to 5 ms in each step of 10 ms, in one process and not in the next, as the heap happens to lie.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for option, value in {M_MMAP_THRESHOLD: 32 * MIB, M_TRIM_THRESHOLD: 1024 * MIB, M_TOP_PAD: 64 * MIB}.items():
            library.mallopt(option, value)


def load_share(place: Place, split: str) -> Split:
    """This rank's share of a split, read from the Parquet shards and checked."""
    start, stop = share(place.manifest.rows(split), place.rank, place.world_size)
    images, labels = read_rows(place.store, place.manifest, split, start, stop)
    return Split(torch.from_numpy(images).to(place.device), torch.from_numpy(labels).to(place.device))


def evaluate_split(model: nn.Module, split: Split) -> Tensor:
    """Counts of `model` over all rows of `split`."""
    model.eval()
    counts = no_counts(split.images.device)
    for first in range(0, len(split.labels), EVALUATION_BATCH):
        batch = slice(first, first + EVALUATION_BATCH)
        counts += evaluate_step(model, split.images[batch], split.labels[batch])
    return counts


def summed(counts: Tensor) -> Tensor:
    """The counts of all ranks together."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Position()
    with checkpoint.as_directory() as folder:
        return load_state(Path(folder), model, optimizer)


def _report(session: Session, position: Position, metrics: dict[str, Any]) -> None:
    """Hand metrics to Ray with, from rank 0, a checkpoint. Every rank has to call it: a barrier."""
    if session.place.rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder), session.model, session.optimizer, position)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
