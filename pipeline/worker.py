"""What every Ray Train worker runs: its part of each global batch, an epoch at a time."""

import logging
import math
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode
from ray.train.v2._internal.execution.context import get_train_context
from torch import Tensor

from lenet.compiled import library
from lenet.fused import open_gradient
from lenet.model import LeNet
from lenet.optimize import Optimization
from lenet.recipe import Recipe
from lenet.step import Gradient, flatten, metrics_of, no_counts
from pipeline.checkpoint import FILE_NAME, EpochMetrics, Position, encode_state, load_state
from pipeline.collective import SharedSum, Sum, open_sum
from pipeline.errors import DataError, TrainingError
from pipeline.lease import Watchman, lease_key
from pipeline.loader import Loader, Loading, Place, augmented, open_loader
from pipeline.memory import keep_memory
from pipeline.order import share
from pipeline.progress import Teller, tell_log
from pipeline.shards import Manifest, read_rows
from pipeline.storage import open_store

log = logging.getLogger(__name__)

EVALUATION_BATCH = 1000
REPORTS_UNDER_WAY = 2
RAY_FOLDER = "ray"


# What rank 0 may say to all others, in one sum, with the gradients; NaN, from any, says that its loss is not finite.
SAVE, STOP, FENCED = 1, 2, 4
NOTICE_S = 2  # between checkpoints, when a machine is about to be taken away
# Steps from one time of listening to the next, by the device's type, elsewhere 1: on a GPU, to hear is to wait for all
# that was asked of it before.
LISTENS_EVERY = {"cuda": 50}


@dataclass(frozen=True)
class Job:
    """All a worker needs to know; the same for every rank.

    `folder` is the run's own in the store, `lease_token` what its lease there has while this training may write, and
    `start` the key of the state to go on from, None for none.
    """

    store_url: str
    folder: str
    manifest: Manifest
    recipe: Recipe
    seed: int
    loading: Loading
    checkpoint_steps: int | None
    checkpoint_seconds: float
    lease_token: int
    start: str | None

    @property
    def checkpoints(self) -> str:
        """Key of the folder that Ray Train keeps the checkpoints of this holder of the lease in, and a list of them.

        It would begin with the list it finds: of another holder, perhaps torn as that was killed, or written after it
        was superseded.
        """
        return f"{self.folder}/{RAY_FOLDER}/{self.lease_token}"

    def state_key(self, checkpoint: str) -> str:
        """Key of the state in the checkpoint that Ray Train has given this name."""
        return f"{self.checkpoints}/{checkpoint}/{FILE_NAME}"


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
    model: LeNet
    gradient: Gradient
    sum_up: Sum
    optimization: Optimization
    loader: Loader
    watch: "Watch"
    teller: Teller


class Watch:
    """What this rank says to the others: that a checkpoint is due, or the end, or that its loss is not finite."""

    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.place = job, place
        self.every = LISTENS_EVERY.get(place.device.type, 1)
        self.nothing = torch.zeros((), device=place.device)
        self.watchman = Watchman(place.store, lease_key(job.folder), job.lease_token) if place.rank == 0 else None
        self.saved()

    def listens(self, step: int) -> bool:
        """Whether all ranks wait, at this step, for what was said to be heard: before a checkpoint, too."""
        return step % self.every == 0 or step == self.place.steps or self.due(step)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, by the number of steps."""
        return self.job.checkpoint_steps is not None and step % self.job.checkpoint_steps == 0

    def saved(self) -> None:
        """There is a checkpoint of this moment."""
        self.saved_at = time.monotonic()

    def word(self, loss: Tensor, step: int) -> Tensor:
        """What to say to the other ranks with the gradients, when the sum of this rank's losses is this float64 ()."""
        if not self.listens(step):
            return self.nothing  # a loss that is not finite stays in the sum, and is told of later
        wish = 0
        if self.watchman is not None:
            patience = min(NOTICE_S, self.job.checkpoint_seconds) if _preempted() else self.job.checkpoint_seconds
            wish += SAVE * (time.monotonic() - self.saved_at > patience)
            wish += STOP * (self.watchman.verdict == "stop") + FENCED * (self.watchman.verdict == "fenced")
        return (loss * 0 + wish).float()


class Ended(Exception):  # noqa: N818  # not an error
    """Training ends here, on all ranks: what to report, without a checkpoint."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(str(report))
        self.report = report


def train_worker(config: dict[str, Any]) -> None:
    """Train `config["job"]` from where the run's last checkpoint stands; a report for every epoch."""
    job: Job = config["job"]
    session, position = _begin(job)
    held_out = load_share(session.place, job.manifest.held_out)
    try:
        while position.epoch <= job.recipe.epochs:
            counts, stop = _train_epoch(session, position)
            train = metrics_of(counts)
            with session.optimization.averaged():
                test = metrics_of(summed(evaluate_split(session.gradient, held_out)))
            _require_sound(session, position.epoch, session.place.steps, test.loss)
            metrics = EpochMetrics(
                epoch=position.epoch,
                held_out=job.manifest.held_out,
                train_loss=train.loss,
                train_accuracy=train.accuracy,
                held_out_loss=test.loss,
                held_out_accuracy=test.accuracy,
                seconds=position.seconds,
                images_per_second=train.images / position.seconds,
                world_size=session.place.world_size,
            )
            position = Position(epoch=position.epoch + 1, history=[*position.history, metrics])
            _save(session, position, metrics.model_dump())
            if stop:
                raise Ended({"stopped": True})
    except Ended as end:
        ray.train.report(end.report)
    finally:
        for handler in log.handlers:
            handler.flush()
    _wait_until_taken_in()


def _begin(job: Job) -> tuple[Session, Position]:
    """Model, optimizer and loader of this rank, as the last checkpoint left them, and where that stands."""
    keep_memory()
    context = ray.train.get_context()
    manifest, recipe, device = job.manifest, job.recipe, ray.train.torch.get_device()
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
    tell_log(log, place.store, job.folder, place.rank)
    model, gradient, optimization = open_learner(recipe, manifest, job.seed, device, place.steps)
    sum_up = open_sum(gradient.total.numel(), device, place.world_size, one_host)
    if isinstance(sum_up, SharedSum):  # by other ways it costs more than it saves
        optimization.deal(place.rank, place.world_size, lambda update: sum_up(update, torch.zeros(())))
    session = Session(
        job,
        place,
        model,
        gradient,
        sum_up,
        optimization,
        open_loader(job.loading, place),
        Watch(job, place),
        Teller(place.store, job.folder, place.steps, place.global_batch_size),
    )
    if session.watch.watchman is not None:
        session.watch.watchman.look()  # a training that was restarted may have been superseded meanwhile
    if recipe.precision == "bfloat16" and device.type == "cpu" and place.rank == 0:
        log.warning("bfloat16 is for GPUs: computing in float32")
    if device.type == "cpu" and library() is None and place.rank == 0:
        able = torch.cpu.get_capabilities().get("avx2")
        why = "install gcc, then: pip install --no-deps --editable ." if able else "they are for AVX2 and FMA"
        log.warning("no compiled convolutions, so at half the speed or less; %s", why)
    position = _restore(session)
    log.info(
        "on %s of %s, images %s, from epoch %d, step %d",
        device, socket.gethostname(), job.loading, position.epoch, position.step + 1,
    )  # fmt: skip
    return session, position


def open_learner(
    recipe: Recipe, manifest: Manifest, seed: int, device: torch.device, steps_per_epoch: int
) -> tuple[LeNet, Gradient, Optimization]:
    """A new model on the device, what computes its gradient, and what updates it."""
    model = recipe.build_model(len(manifest.classes), seed, manifest.report.pixel_mean, manifest.report.pixel_std)
    model = model.to(device).to(memory_format=torch.channels_last)  # 1.7 times as fast as NCHW on CPUs
    flat = flatten(model)
    optimization = Optimization(recipe, model, flat, recipe.epochs * steps_per_epoch)
    return model, open_gradient(model, flat, recipe.label_smoothing, recipe.precision == "bfloat16"), optimization


def _train_epoch(session: Session, position: Position) -> tuple[Tensor, bool]:
    """Train from `position`, which is kept up to date, to the end of its epoch; the epoch's counts over all ranks, and
    whether training is to stop after it.

    Raises Ended when the loss has become infinite or undefined, before the update (on a GPU, before the next time of
    listening and any checkpoint is past), or when training is to stop.
    """
    job, place, watch = session.job, session.place, session.watch
    session.model.train()
    # What was counted before the checkpoint counts once, however many ranks there are now.
    counts = torch.tensor(position.counts, dtype=torch.float64, device=place.device) * (place.rank == 0)
    started = time.perf_counter() - position.seconds
    before, wish = (position.epoch - 1) * place.steps, 0
    batches = session.loader.batches(position.epoch, position.step)
    batches = augmented(batches, job.recipe.augment, job.seed, position.epoch)
    for step, batch in enumerate(batches, start=position.step + 1):
        counts += session.gradient(batch.images, batch.labels, global_batch=batch.size)
        words = session.sum_up(session.gradient.total, watch.word(counts[0], step))
        wish = 0
        if watch.listens(step):
            said = words.item()
            if math.isnan(said):
                raise Ended({"diverged": {"epoch": position.epoch, "step": step, "ranks": _blame(place, counts[0])}})
            wish = round(said)
        if wish & FENCED:
            raise Ended({"fenced": True})
        session.optimization.step(before + step - 1)
        if place.rank == 0:
            session.teller.tell(position.epoch, step, counts, time.perf_counter() - started)
        if (wish or watch.due(step)) and step < place.steps:
            position.step, position.seconds = step, time.perf_counter() - started
            loss, correct, seen = summed(counts.clone()).tolist()
            position.counts = (loss, correct, seen)
            _require_sound(session, position.epoch, step, loss)
            _save(session, position, {"epoch": position.epoch, "step": step})
            if wish & STOP:
                raise Ended({"stopped": True})
    total = summed(counts)
    position.seconds = time.perf_counter() - started
    return total, bool(wish & STOP)


def _require_sound(session: Session, epoch: int, step: int, loss: float) -> None:
    """Raises Ended, on all ranks, when the last update has left a model that no checkpoint should keep: its loss, the
    same everywhere, or its weights are not finite."""
    if not (math.isfinite(loss) and session.optimization.flat.isfinite().all()):
        ranks = list(range(session.place.world_size))
        raise Ended({"diverged": {"epoch": epoch, "step": step, "ranks": ranks}})


def _blame(place: Place, loss: Tensor) -> list[int]:
    """The ranks whose own loss is not finite."""
    flags = torch.zeros(place.world_size, device=place.device)
    flags[place.rank] = float(not loss.isfinite())
    return [int(rank) for rank in summed(flags).nonzero()]


def load_share(place: Place, split: str) -> Split:
    """This rank's share of a split, read from the Parquet shards and checked."""
    start, stop = share(place.manifest.rows(split), place.rank, place.world_size)
    images, labels = read_rows(place.store, place.manifest, split, start, stop)
    return Split(torch.from_numpy(images).to(place.device), torch.from_numpy(labels).to(place.device))


def evaluate_split(gradient: Gradient, split: Split) -> Tensor:
    """Counts of the gradient's model over all rows of `split`."""
    gradient.model.eval()
    counts = no_counts(split.images.device)
    for first in range(0, len(split.labels), EVALUATION_BATCH):
        batch = slice(first, first + EVALUATION_BATCH)
        counts += gradient.evaluate(split.images[batch], split.labels[batch])
    return counts


def summed(counts: Tensor) -> Tensor:
    """The counts of all ranks together."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def _restore(session: Session) -> Position:
    """Take up the newest whole checkpoint since this training began, or else what it began with; if there is none,
    the start."""
    newest, job, store = ray.train.get_checkpoint(), session.job, session.place.store
    states: list[str] = []
    if newest:
        # Their names are in the order of time. What is newer was not taken in by Ray Train.
        last = job.state_key(Path(newest.path).name)
        states = sorted(key for key in store.keys(job.checkpoints) if key.endswith(FILE_NAME) and key <= last)
    for key in filter(None, (*reversed(states), job.start)):
        try:
            return load_state(store.read(key), session.model, session.optimization)
        except DataError as error:
            log.warning("%s: %s; going back to the one before", store.locate(key), error)
    return Position()


def _save(session: Session, position: Position, metrics: dict[str, Any]) -> None:
    """Hand metrics to Ray with, from rank 0, a checkpoint that is stored while training goes on. Every rank has to
    call it: a barrier, from which all go on with the same weights."""
    session.watch.saved()
    session.sum_up.align(session.optimization.flat.detach())
    if session.optimization.average is not None:
        session.sum_up.align(session.optimization.average)
    # Ray Train takes in a report every RAY_TRAIN_HEALTH_CHECK_INTERVAL_S, and would let any number wait in memory.
    context = get_train_context()
    with context.report_order_condition:
        context.report_order_condition.wait_for(
            lambda: context.report_call_index - context.current_report_index < REPORTS_UNDER_WAY
        )
    if session.place.rank != 0:
        ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        return
    data = encode_state(session.model, session.optimization, position)
    job, store, watchman = session.job, session.place.store, session.watch.watchman

    def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        if watchman is not None and watchman.look() == "fenced":
            raise TrainingError("another process has taken over this run; this one writes no more")
        store.put(job.state_key(name), data)
        return ray.train.Checkpoint(store.path(f"{job.checkpoints}/{name}"), checkpoint.filesystem)

    here = ray.train.Checkpoint(store.path(job.checkpoints), ray.train.get_context().get_storage().storage_filesystem)
    ray.train.report(
        metrics,
        checkpoint=here,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=upload,
        delete_local_checkpoint_after_upload=False,
    )


def _wait_until_taken_in() -> None:
    """Return when Ray Train has all reports of this rank.

    It asks a worker for a report first and whether it still runs then: what is reported between the two, by a worker
    that ends there, would be lost, and training over without its last epoch.
    """
    context = get_train_context()
    context.checkpoint_upload_threadpool.shutdown()
    context.execution_context.result_queue.join()


def _preempted() -> bool:
    """Whether Ray has said that a machine of this training is soon taken away.

    `ray.train.get_preemption_info` says it to all ranks at once, for which it takes milliseconds.
    """
    return get_train_context().preemption_context.preemption_info is not None
