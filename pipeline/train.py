"""Data-parallel training with Ray Train, from a dataset in the store to a candidate model in the store."""

import contextlib
import contextvars
import logging
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import ray.exceptions
import ray.train
import safetensors.torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from torch import Tensor

from lenet.augment import Augment
from lenet.model import fold_standardise
from lenet.recipe import RECIPES, Recipe
from pipeline.checkpoint import FILE_NAME, EpochMetrics, History, Position, read_state
from pipeline.cluster import ClusterConfig, ray_session
from pipeline.errors import StorageError, TrainingError
from pipeline.loader import LoadConfig, choose_loading
from pipeline.shards import Manifest
from pipeline.storage import Store, sha256
from pipeline.worker import Job, train_worker

log = logging.getLogger(__name__)

# How often a lost worker, or a step that raised, sends all workers back to the last checkpoint.
MAX_FAILURES = 3
CHECKPOINTS_KEPT = 2
PROGRESS_POLL_S = 0.5

OnEpoch = Callable[[EpochMetrics], None]


def _known_recipe(name: str) -> str:
    if name not in RECIPES:
        raise ValueError(f"no such recipe; use one of {', '.join(RECIPES)}")
    return name


class TrainConfig(BaseModel):
    """What the weights become. A value that is not given is the recipe's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Annotated[str, AfterValidator(_known_recipe)] = Field(
        "seed", description="Named set of hyperparameters.", json_schema_extra={"enum": list(RECIPES)}
    )
    epochs: int | None = Field(None, ge=1, le=10_000, description="Passes over the training set.")
    global_batch_size: int | None = Field(
        None, ge=1, le=1_000_000, description="Images in each optimizer step, over all workers together."
    )
    lr: float | None = Field(None, gt=0, le=100, description="Learning rate.")
    seed: int = Field(
        0, ge=0, lt=2**63, description="Decides the initial weights, the order of the images and their augmentation."
    )
    standardise: bool | None = Field(
        None, description="Shift and scale pixels to mean 0 and standard deviation 1 over the training images."
    )
    flip: float | None = Field(None, ge=0, le=1, description="Probability to mirror a training image left to right.")
    shift: int | None = Field(None, ge=0, le=16, description="Pixels by which to shift training images at most.")
    rotate: float | None = Field(None, ge=0, le=180, description="Degrees to turn training images by at most.")
    scale: float | None = Field(
        None, ge=0, lt=1, description="Part by which to grow or shrink training images at most."
    )
    erase: int | None = Field(None, ge=0, le=28, description="Side in pixels of a square to black out in each.")
    checkpoint_steps: int | None = Field(
        None, ge=1, description="Keep a checkpoint after every so many steps too, not only after every epoch."
    )

    def resolved(self) -> Recipe:
        """The recipe with the values given here in place of its own."""
        recipe = RECIPES[self.recipe]
        given = {name: value for name, value in self if value is not None}
        own = {name: given[name] for name in ("epochs", "global_batch_size", "lr", "standardise") if name in given}
        changes = {field.name: given[field.name] for field in fields(Augment) if field.name in given}
        return replace(recipe, **own, augment=replace(recipe.augment, **changes))


class Training(BaseModel):
    """The receipt of a finished training: written last, so its presence says that the candidate is complete."""

    model_config = ConfigDict(frozen=True)

    history: History
    candidate: str
    candidate_sha256: str
    parameters: int
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
    return Training.model_validate_json(store.read(key)) if store.exists(key) else None


def fit(
    store: Store,
    run_id: str,
    manifest: Manifest,
    config: TrainConfig,
    cluster: ClusterConfig,
    load: LoadConfig,
    on_epoch: OnEpoch = lambda epoch: None,
) -> Training:
    """Train to the last epoch, from the run's last checkpoint if it has one, and store the candidate's weights.

    `on_epoch` is called in this process soon after each epoch, for restored epochs too. Raises ConfigError or
    ClusterError when the workers cannot be had, StorageError or TrainingError when training fails for good.
    """
    if done := find_training(store, run_id):
        return done
    started = time.perf_counter()
    loading = choose_loading(manifest, load)
    job = Job(store.url, manifest, config.resolved(), config.seed, loading, config.checkpoint_steps)
    log.info(
        "starting %d Ray workers for %d epochs; training images (%.0f MiB) are %s",
        cluster.workers,
        job.recipe.epochs,
        manifest.pixel_bytes("train") / 2**20,
        "resident in each" if loading == "resident" else "streamed",
    )
    with ray_session(cluster) as gpu, _progress(store, run_id, on_epoch):
        weights, position = _run_workers(store, run_id, job, cluster, gpu)
    if position.epoch <= job.recipe.epochs:
        raise TrainingError(
            f"the loss became infinite or undefined in epoch {position.epoch} with lr={job.recipe.lr:g}; lower lr"
        )
    candidate = safetensors.torch.save(_plain(job, weights))
    digest = sha256(candidate)
    # Named by content: two attempts, perhaps on other workers, that end at the same time do not overwrite each other.
    key = f"{staging(run_id)}/candidate-{digest[:16]}.safetensors"
    store.put(key, candidate)
    training = Training(
        history=position.history,
        candidate=key,
        candidate_sha256=digest,
        parameters=sum(tensor.numel() for tensor in weights.values()),
        world_size=cluster.workers,
        device="gpu" if gpu else "cpu",
        wall_seconds=time.perf_counter() - started,
        finished=datetime.now(UTC),
    )
    receipt = store.keep(f"{staging(run_id)}/training.json", training.model_dump_json(indent=2).encode())
    return Training.model_validate_json(receipt)


def _run_workers(
    store: Store, run_id: str, job: Job, cluster: ClusterConfig, gpu: bool
) -> tuple[dict[str, Tensor], Position]:
    """Run Ray Train to its end; the weights and the position of the last checkpoint."""
    trainer = _LeanTrainer(
        train_worker,
        train_loop_config={"job": job},
        local=cluster.ray_address is None,
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            # The same name and path again make Ray Train go on from the last checkpoint it finds there.
            name="ray",
            storage_path=store.path(staging(run_id)),
            storage_filesystem=store.arrow,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[_WriteProgress(store, run_id)],  # type: ignore[list-item]
        ),
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        checkpoint = trainer.fit().checkpoint
    except SystemExit:
        # Ray Train answers Ctrl-C by stopping its workers and leaving with exit code 0: not a success to us.
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        store.check_writable()  # a store that went away is the likelier cause, and its error says so
        raise TrainingError(f"training failed {MAX_FAILURES + 1} times, at last with: {_cause(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)
    if checkpoint is None:
        return {}, Position()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE_NAME
        file.write_bytes(store.read(f"{checkpoint.path.removeprefix(store.root + '/')}/{FILE_NAME}"))
        return read_state(file)


def _plain(job: Job, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a LeNet that takes pixels as they are, whatever was done to them in training."""
    report = job.manifest.report
    model = job.recipe.build_model(len(job.manifest.classes), job.seed, report.pixel_mean, report.pixel_std)
    model.load_state_dict(weights)
    return {name: value.contiguous() for name, value in fold_standardise(model).state_dict().items()}


class _LeanTrainer(TorchTrainer):
    """Without the actors that have nothing to do here: each takes 2 s of a core to start, before the first step."""

    def __init__(self, *args: Any, local: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.local = local

    def _create_default_callbacks(self) -> list[Any]:
        # Ray Data's manager serves datasets, and there are none. The cleaner frees the workers' places when the
        # controller has died, which on a local Ray goes down with this process.
        idle: tuple[type, ...] = (DatasetsCallback,)
        if self.local:
            idle += (PlacementGroupCleanerCallback,)
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if not isinstance(callback, idle)]


class _WriteProgress(ray.train.UserCallback):
    """Runs in Ray Train's controller: leaves each epoch's metrics in the store, where any process can follow them."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.run_id = run_id

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if checkpoint is None or "step" in metrics[0]:
            return  # an epoch that went wrong and will be named as an error, or one that is not over
        epoch = EpochMetrics.model_validate(metrics[0])
        self.store.put(f"{_progress_folder(self.run_id)}/{epoch.epoch:05d}.json", epoch.model_dump_json().encode())


def _progress_folder(run_id: str) -> str:
    return f"{staging(run_id)}/progress"


@contextlib.contextmanager
def _progress(store: Store, run_id: str, on_epoch: OnEpoch) -> Iterator[None]:
    """Call `on_epoch` for every epoch in the progress folder, those that come while the block runs included."""
    ended = threading.Event()
    seen: set[str] = set()

    def catch_up() -> None:
        for key in store.keys(_progress_folder(run_id)):
            if key not in seen and key.endswith(".json"):
                seen.add(key)
                epoch = EpochMetrics.model_validate_json(store.read(key))
                try:
                    on_epoch(epoch)
                except Exception:  # whoever looks on does not stop the training
                    log.warning("epoch %d could not be shown", epoch.epoch, exc_info=True)

    def follow() -> None:
        while not ended.wait(PROGRESS_POLL_S):
            with contextlib.suppress(StorageError):  # the next look may succeed, and training reports its own
                catch_up()

    # on_epoch runs in the caller's context, where Prefect keeps the current task.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(follow,), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    catch_up()


def _cause(error: BaseException) -> str:
    """The last line of what the worker raised: its exception and message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
