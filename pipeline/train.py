"""Data-parallel training with Ray Train, from a dataset in the store to a candidate model in the store."""

import json
import logging
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray.exceptions
import ray.train
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lenet.model import LeNet, fold_standardise
from pipeline.checkpoint import FILE_NAME, History, Position, encode_model, read_state
from pipeline.cluster import ray_session
from pipeline.documents import find_document, keep_document
from pipeline.errors import DataError, PipelineError, Terminated, TrainingError
from pipeline.lease import Hold, held, lease_key
from pipeline.loader import LoadConfig, choose_loading
from pipeline.placement import ClusterConfig
from pipeline.progress import ENDED, OnEpoch, OnNow, WriteProgress, followed, tell_epochs
from pipeline.recipe import TrainConfig
from pipeline.shards import Manifest
from pipeline.signals import on_signal
from pipeline.storage import Store, patience_s, sha256
from pipeline.trainer import Trainer, cause_of, mistake_of
from pipeline.worker import RAY_FOLDER, Job, train_worker

log = logging.getLogger(__name__)

# How often a lost worker, or a step that raised, sends all workers back to the last checkpoint.
MAX_FAILURES = 3
CHECKPOINTS_KEPT = 2
RESIZE_S = 10  # how often to look whether the cluster has room for more workers, if more are wanted
MIB = 2**20


class Training(BaseModel):
    """The receipt of a finished training: written last, so its presence says that the candidate is complete."""

    model_config = ConfigDict(frozen=True)

    history: History
    candidate: str
    candidate_sha256: str
    world_size: int
    device: str
    wall_seconds: float
    finished: datetime


def staging(run_id: str) -> str:
    """Key of the folder that only this run writes to, and nobody else reads."""
    return f"staging/{run_id}"


def find_training(store: Store, run_id: str) -> Training | None:
    """The receipt of the run's training, or None while it is not finished."""
    key = f"{staging(run_id)}/training.json"
    return find_document(store, key, Training)


def fit(
    store: Store,
    run_id: str,
    manifest: Manifest,
    config: TrainConfig,
    cluster: ClusterConfig,
    load: LoadConfig,
    on_epoch: OnEpoch = lambda epoch: None,
    on_now: OnNow = lambda now: None,
    job: str | None = None,
) -> Training:
    """Train to the last epoch, from the run's last checkpoint if it has one, and store the candidate's weights.

    `on_epoch` is called in this process soon after each epoch, for restored epochs too, and `on_now` every two
    seconds. `job` is the Ray job that this process is, if it is one. While another process trains this run, it is
    waited for and followed. Raises ConfigError or ClusterError when the workers cannot be had, StorageError or
    TrainingError when training fails for good, Terminated when SIGTERM has ended it, with a checkpoint.
    """
    while (done := find_training(store, run_id)) is None:
        with (
            followed(store, staging(run_id), on_epoch, on_now),
            held(store, lease_key(staging(run_id)), lambda: find_training(store, run_id) is not None, job) as hold,
        ):
            if hold is not None:
                _train(store, run_id, manifest, config, cluster, load, hold)
    return done


def _train(
    store: Store,
    run_id: str,
    manifest: Manifest,
    config: TrainConfig,
    cluster: ClusterConfig,
    load: LoadConfig,
    hold: Hold,
) -> None:
    """What `fit` does as the run's one writer. Nothing is left when another process has taken over meanwhile."""
    started = time.perf_counter()
    # The workers, wherever they are, then end with a checkpoint.
    with ray_session(cluster) as gpu, on_signal(signal.SIGTERM, hold.ask_stop):
        store.delete(f"{staging(run_id)}/{ENDED}")  # how a training before this one did
        start = _take_up(store, staging(run_id))
        job = Job(
            store_url=store.url,
            folder=staging(run_id),
            manifest=manifest,
            recipe=config.resolved(),
            seed=config.seed,
            loading=choose_loading(manifest, load),
            checkpoint_steps=config.checkpoint_steps,
            checkpoint_seconds=config.checkpoint_seconds,
            lease_token=hold.lease.token,
            start=start,
        )
        log.info(
            "starting Ray workers: %s, epochs: %d; training images (%.0f MiB) are %s",
            cluster.wanted,
            job.recipe.epochs,
            manifest.pixel_bytes("train") / MIB,
            "resident in each" if job.loading == "resident" else "streamed",
        )
        try:
            weights, position = _run_workers(store, run_id, job, cluster, gpu, lambda: hold.stop_asked)
        except PipelineError:
            if hold.superseded():
                return
            raise
        unfinished = position.epoch <= job.recipe.epochs
        if hold.lost or (unfinished and hold.superseded()):
            return
        if unfinished:
            raise _unfinished(_ended(store, run_id), job, position)
    candidate = encode_model(_plain(job, weights))
    digest = sha256(candidate)
    # Named by content: two attempts, perhaps on other workers, that end at the same time do not overwrite each other.
    key = f"{staging(run_id)}/candidate-{digest[:16]}.safetensors"
    store.put(key, candidate)
    training = Training(
        history=position.history,
        candidate=key,
        candidate_sha256=digest,
        world_size=position.history[-1].world_size,
        device="gpu" if gpu else "cpu",
        # Of a run that was taken up again, at least what its epochs took.
        wall_seconds=max(time.perf_counter() - started, sum(epoch.seconds for epoch in position.history)),
        finished=datetime.now(UTC),
    )
    keep_document(store, f"{staging(run_id)}/training.json", training)
    if hold.ended_here:  # too late for the workers; what comes after the training is not to begin
        raise Terminated


def _take_up(store: Store, folder: str) -> str | None:
    """Key of the newest whole state that any earlier holder of the lease has left, None if there is none.

    Those of other holders go, and whoever follows the run will hear of all epochs before: a holder that was killed may
    have kept a state and not yet told of its epoch.
    """
    states = f"{folder}/{RAY_FOLDER}"
    found: list[tuple[Position, str]] = []
    keys = store.keys(states)
    for key in keys:
        try:
            if key.endswith(FILE_NAME):
                found.append((read_state(store.read(key))[1], key))
        except DataError as error:
            log.warning("%s: %s; going back to the one before", store.locate(key), error)
    if not found:
        return None
    position, newest = max(found, key=lambda each: (each[0].epoch, each[0].step))
    tell_epochs(store, folder, position.history)
    kept = newest.removeprefix(f"{states}/").partition("/")[0]
    for name in {key.removeprefix(f"{states}/").partition("/")[0] for key in keys} - {kept}:
        store.delete(f"{states}/{name}")
    return newest


def _run_workers(
    store: Store, run_id: str, job: Job, cluster: ClusterConfig, gpu: bool, end_asked: Callable[[], bool]
) -> tuple[dict[str, Tensor], Position]:
    """Run Ray Train to its end; the weights and the position of the last checkpoint."""
    progress = WriteProgress(store, staging(run_id))
    trainer = Trainer(
        train_worker,
        train_loop_config={"job": job},
        local=cluster.ray_address is None,
        timeout_s=patience_s(),
        end_asked=end_asked,
        kept=lambda: progress.kept,
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.world_size,  # type: ignore[arg-type]  # annotated as of the version before
            elastic_resize_monitor_interval_s=RESIZE_S,  # type: ignore[call-arg]
            use_gpu=gpu,
            resources_per_worker=cluster.resources(gpu),
        ),
        run_config=ray.train.RunConfig(
            name=Path(job.checkpoints).name,
            storage_path=store.path(str(Path(job.checkpoints).parent)),
            storage_filesystem=store.arrow,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[progress],  # type: ignore[list-item]
        ),
    )
    try:
        checkpoint = trainer.fit().checkpoint
    except ray.train.TrainingFailedError as error:
        if mistake := mistake_of(error):
            raise mistake from None
        store.check_writable()  # a store that went away is the likelier cause, and its error says so
        raise TrainingError(f"training failed for good: {cause_of(error)}") from error
    newest = job.start if checkpoint is None else job.state_key(Path(checkpoint.path).name)
    return read_state(store.read(newest)) if newest else ({}, Position())


def _ended(store: Store, run_id: str) -> dict[str, Any]:
    """The last report of a training that has ended before its last epoch."""
    key = f"{staging(run_id)}/{ENDED}"
    found: dict[str, Any] = json.loads(store.read(key)) if store.exists(key) else {}
    return found


def _unfinished(ended: dict[str, Any], job: Job, position: Position) -> BaseException:
    """Why training has ended before its last epoch."""
    if "stopped" in ended:
        return Terminated()
    kept = (
        f"after step {position.step} of epoch {position.epoch}" if position.step else f"of epoch {position.epoch - 1}"
    )
    kept = f"the last good checkpoint is {kept if position.history or position.step else 'none'}"
    if "diverged" not in ended:
        return TrainingError(f"Ray Train has ended before the last epoch without a reason; {kept}; run it again")
    what = ended["diverged"]
    return TrainingError(
        f"the loss became infinite or undefined at step {what['step']} of epoch {what['epoch']} on rank "
        f"{', '.join(map(str, what['ranks']))} with lr={job.recipe.lr:g}; {kept}; lower lr"
    )


def _plain(job: Job, weights: dict[str, Tensor]) -> LeNet:
    """A LeNet that takes pixels as they are, whatever was done to them in training."""
    report = job.manifest.report
    model = job.recipe.build_model(len(job.manifest.classes), job.seed, report.pixel_mean, report.pixel_std)
    model.load_state_dict(weights)
    return fold_standardise(model)
