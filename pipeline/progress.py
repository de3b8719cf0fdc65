"""What a training says while it goes on: left in the run's folder by its processes, followed there by whoever looks on.

<folder>/progress/<epoch>.json    the metrics of each epoch, by Ray Train's controller
<folder>/now.json                 how far the epoch is, by rank 0, every two seconds
<folder>/log/<when>-<rank>.json   what the workers log
<folder>/ended.json               why training ended before its last epoch
"""

import contextlib
import contextvars
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray.train
from pydantic import BaseModel, ConfigDict
from ray.util.metrics import Gauge
from torch import Tensor

from pipeline.checkpoint import EpochMetrics
from pipeline.documents import parse_document
from pipeline.errors import StorageError
from pipeline.storage import Store

log = logging.getLogger(__name__)
workers_log = logging.getLogger("pipeline.worker")

PROGRESS = "progress"
LOG = "log"
NOW = "now.json"
ENDED = "ended.json"
POLL_S = 0.5
TELL_S = 2
GATHER_S = 0.1  # an epoch may be over in half a second, and is shown after what was said before it
# Of EpochMetrics, as lenet_<name> among Ray's metrics.
GAUGES = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "held_out_loss",
    "held_out_accuracy",
    "images_per_second",
    "world_size",
)


OnEpoch = Callable[[EpochMetrics], None]


class Now(BaseModel):
    """How far an epoch is: `step` of `steps` are done. Loss and accuracy so far are of rank 0's slices, which are a
    random part of all; images/s are of all ranks."""

    model_config = ConfigDict(frozen=True)

    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float

    def seconds_left(self, epochs: int, images: float) -> float:
        """Until the last of so many epochs, of so many images each, is over at this pace."""
        return ((epochs - self.epoch) + 1 - self.step / self.steps) * images / self.images_per_second


OnNow = Callable[[Now], None]


class Teller:
    """Leaves `Now` every two seconds, without keeping the training waiting."""

    def __init__(self, store: Store, folder: str, steps: int, global_batch_size: int) -> None:
        self.store, self.key, self.steps, self.global_batch_size = store, f"{folder}/{NOW}", steps, global_batch_size
        self.told_at = time.monotonic()
        self.pool = ThreadPoolExecutor(1, "teller")
        self.telling: Future[None] | None = None

    def tell(self, epoch: int, step: int, counts: Tensor, seconds: float) -> None:
        """After so many steps of an epoch, with rank 0's counts float64 (3,) and the seconds that the steps took."""
        if time.monotonic() - self.told_at < TELL_S or (self.telling and not self.telling.done()):
            return
        self.told_at = time.monotonic()
        loss, correct, images = counts.tolist()
        if not math.isfinite(loss):
            return  # the worker will say so itself, more precisely
        now = Now(
            epoch=epoch,
            step=step,
            steps=self.steps,
            loss=loss / images,
            accuracy=correct / images,
            images_per_second=step * self.global_batch_size / seconds,
        )
        self.telling = self.pool.submit(self.store.put, self.key, now.model_dump_json().encode())


class _LogTeller(logging.Handler):
    """Leaves a rank's log records in the store, some at a time: a chunk is written once, so readers read it once."""

    def __init__(self, store: Store, folder: str, rank: int) -> None:
        super().__init__(logging.INFO)
        self.store, self.folder, self.rank = store, folder, rank
        self.waiting: list[tuple[int, str]] = []
        self.telling: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.waiting.append((record.levelno, record.getMessage()))
        if record.levelno >= logging.WARNING:  # the process may be about to end
            self.tell()
        elif self.telling is None:
            self.telling = threading.Timer(GATHER_S, self.tell)
            self.telling.daemon = True
            self.telling.start()

    def flush(self) -> None:
        self.tell()

    def tell(self) -> None:
        self.telling = None
        chunk, self.waiting = self.waiting, []
        if chunk:
            with contextlib.suppress(StorageError):  # training says so itself
                key = f"{self.folder}/{LOG}/{time.time_ns()}-{self.rank:05d}.json"
                self.store.put(key, json.dumps({"rank": self.rank, "lines": chunk}).encode())


def tell_log(logger: logging.Logger, store: Store, folder: str, rank: int) -> None:
    """From now on, leave what this rank says through `logger` in the run's folder."""
    logger.setLevel(logging.INFO)
    logger.addHandler(_LogTeller(store, folder, rank))


def tell_epochs(store: Store, folder: str, epochs: Iterable[EpochMetrics]) -> None:
    """Leave the metrics of these epochs in the run's folder."""
    for epoch in epochs:
        store.put(f"{folder}/{PROGRESS}/{epoch.epoch:05d}.json", epoch.model_dump_json().encode())


class WriteProgress(ray.train.UserCallback):
    """Runs in Ray Train's controller: leaves each epoch's metrics in the store, where any process can follow them, and
    among Ray's own, for its dashboard and Prometheus."""

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, folder
        self.gauges: dict[str, Gauge] = {}
        self.kept = 0  # checkpoints

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if checkpoint is None:
            if "fenced" not in metrics[0]:  # the folder is another's by now
                self.store.put(f"{self.folder}/{ENDED}", json.dumps(metrics[0]).encode())
            return
        self.kept += 1
        self._set("checkpoint_timestamp_seconds", time.time())  # its age is what Prometheus makes of it
        if "step" in metrics[0]:
            return  # the epoch is not over
        epoch = EpochMetrics.model_validate(metrics[0])
        tell_epochs(self.store, self.folder, [epoch])
        for name in GAUGES:
            self._set(name, getattr(epoch, name))

    def _set(self, name: str, value: float) -> None:
        gauge = self.gauges.setdefault(name, Gauge(f"lenet_{name}", tag_keys=("run",)))
        gauge.set(value, tags={"run": self.folder.rpartition("/")[2]})


@contextlib.contextmanager
def followed(store: Store, folder: str, on_epoch: OnEpoch, on_now: OnNow) -> Iterator[None]:
    """Call `on_epoch` for every epoch, those that come while the block runs included, and `on_now` meanwhile."""
    ended = threading.Event()
    seen: set[str] = set()
    told = set(store.keys(f"{folder}/{LOG}"))  # by processes of before
    last = b""

    def catch_up() -> None:
        for key in store.keys(f"{folder}/{PROGRESS}"):
            if key not in seen and key.endswith(".json"):
                data = store.read(key)  # first: if the store fails, the next look reads it
                seen.add(key)
                _show(on_epoch, parse_document(store, key, EpochMetrics, data))

    def look() -> None:
        nonlocal last
        if store.exists(f"{folder}/{NOW}") and (now := store.read(f"{folder}/{NOW}")) != last:
            last = now
            _show(on_now, parse_document(store, f"{folder}/{NOW}", Now, now))

    def listen() -> None:
        for key in store.keys(f"{folder}/{LOG}"):
            if key not in told:
                data = store.read(key)
                told.add(key)
                chunk = json.loads(data)
                for level, line in chunk["lines"]:
                    workers_log.log(level, "rank %d: %s", chunk["rank"], line)

    def follow() -> None:
        while not ended.wait(POLL_S):
            try:
                listen()
                catch_up()
                look()
            except StorageError:
                pass  # the next look may succeed, and training reports its own
            except Exception as error:
                log.warning("what the training has left cannot be shown: %r", error)

    # Both are called in the caller's context, where Prefect keeps the current task.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(follow,), name="progress", daemon=True)
    thread.start()
    away = False
    try:
        yield
    except StorageError:
        away = True
        raise
    finally:
        ended.set()
        thread.join()
        if not away:  # every further question would wait for the store once more
            with contextlib.suppress(StorageError):
                listen()
    catch_up()


def _show(show: Callable[[Any], None], news: BaseModel) -> None:
    try:
        show(news)
    except Exception:  # whoever looks on does not stop the training
        log.warning("%r could not be shown", news, exc_info=True)
