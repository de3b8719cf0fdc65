"""Predicting a feed's units on Ray Data. Through Ray go names and numbers: each process reads and writes for itself,
and holds a few images at a time.

    predictions/<content>/<unit>-<file>.parquet   written by whoever reads the unit first, and read back
    receipts/<content>/<unit>.json                what a unit came to: it is not done again
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pydantic import BaseModel, ConfigDict, ValidationError
from ray._private.state import available_resources_per_node

from pipeline.cluster import ray_session
from pipeline.errors import ClusterError, DataError, StorageError, restored
from pipeline.feed import Feed, Slice, Unit, read_unit
from pipeline.metrics import Logits
from pipeline.own import THREADS
from pipeline.placement import ClusterConfig, placeable
from pipeline.predict import Form, probabilities
from pipeline.served import Served
from pipeline.storage import LocalStore, Store, sha256

log = logging.getLogger(__name__)

PREDICTIONS, RECEIPTS = "predictions", "receipts"
FILE_ROWS = 65_536  # of predictions in memory and in a file, or as many as a unit has
BLOCKS = 10_000  # that Ray Data keeps track of
FREE_CPU_S = 60  # how long others may hold every CPU before we give up
SAY_EVERY_S = 30
NODE_LABEL = "ray.io/node-id"  # that Ray gives every node


class Part(BaseModel):
    """One file of predictions: its name, rows, size in bytes and sha256 (hex); how many of the rows could not be read,
    and how many were found to be of each class, in their order."""

    model_config = ConfigDict(frozen=True)

    name: str
    rows: int
    unreadable: int
    bytes: int
    sha256: str
    predicted: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """All that a process needs to know. `content` names what is predicted and by which model."""

    source: Store
    output: Store
    served: Served
    image_column: str
    form: Form
    content: str

    @property
    def folder(self) -> str:
        """Key of the folder of the predictions."""
        return f"{PREDICTIONS}/{self.content}"

    @property
    def receipts(self) -> str:
        """Key of the folder of the receipts."""
        return f"{RECEIPTS}/{self.content}"


class Answer(BaseModel):
    """What a unit came to, now or before: its files, or the error, by its name, that a user can mend, and whether it
    may pass."""

    parts: list[Part] = []
    before: bool = False
    refusal: str = ""
    reason: str = ""
    may_pass: bool = False


@dataclass(frozen=True)
class Predicted:
    """The files in the order of the units; how long it took, without Ray's start, and how many images that was for."""

    parts: list[Part]
    seconds: float
    images_now: int


def predict_units(job: Job, feed: Feed, cluster: ClusterConfig) -> Predicted:
    """Have every unit predicted on Ray, but for those of which there is a receipt.

    Raises DataError and StorageError as reading and writing do, ClusterError when no CPU comes free.
    """
    found: dict[int, Answer] = {}
    with ray_session(cluster), _quiet():
        # Files of this machine are to be seen from here alone.
        processes, where = _room(cluster, isinstance(job.source, LocalStore) or isinstance(job.output, LocalStore))
        started = said = time.monotonic()
        units = [{"number": unit.number, "unit": unit.model_dump_json()} for unit in feed.units]
        # Tasks and not actors: the model is there in a millisecond, and whoever waits for a CPU holds none.
        dataset = ray.data.from_items(units, override_num_blocks=min(len(units), BLOCKS)).map_batches(
            Scorer(job),
            batch_size=1,
            compute=ray.data.TaskPoolStrategy(size=min(processes, len(units))),
            num_cpus=1,
            label_selector=where,
        )
        for row in dataset.iter_rows():
            answer = Answer.model_validate_json(row["answer"])
            if answer.refusal:
                raise restored(answer.refusal, [answer.reason], answer.may_pass)
            found[int(row["number"])] = answer
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                log.info("%s of %s images predicted", f"{_images(found.values()):,}", f"{feed.images:,}")
        seconds = time.monotonic() - started
    parts = [part for number in sorted(found) for part in found[number].parts]
    return Predicted(parts, seconds, _images(answer for answer in found.values() if not answer.before))


def _images(answers: Iterable[Answer]) -> int:
    return sum(part.rows for answer in answers for part in answer.parts)


@dataclass(frozen=True)
class Scorer:
    """The model at work: it reads a unit, predicts it and writes the predictions."""

    job: Job

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What Ray Data calls it with: numbers and units, as JSON; numbers and answers."""
        answers = [self.answer(Unit.model_validate_json(unit)).model_dump_json() for unit in batch["unit"]]
        return {"number": batch["number"], "answer": np.array(answers)}

    def answer(self, unit: Unit) -> Answer:
        """What the unit comes to, or came to before."""
        receipt = f"{self.job.receipts}/{unit.number:06d}.json"
        try:
            done = self._find(receipt)
            if done is None:
                done = Answer(parts=list(self._predict(unit)))
                self.job.output.put(receipt, done.model_dump_json().encode())
        except (DataError, StorageError) as error:
            # As data: an exception would be tried again, and come with a page of Ray's.
            return Answer(refusal=type(error).__name__, reason=str(error), may_pass=error.may_pass)
        return done

    def _find(self, receipt: str) -> Answer | None:
        output = self.job.output
        if not output.exists(receipt):
            return None
        try:
            done = Answer.model_validate_json(output.read(receipt))
        except ValidationError:
            return None
        told = {f"{self.job.folder}/{part.name}": part.sha256 for part in done.parts}
        found = {key: sha256(output.read(key)) for key in told if output.exists(key)}
        for key in found:
            if found[key] != told[key]:
                output.delete(key)  # damaged: _write would keep it
        return done.model_copy(update={"before": True}) if found == told else None

    def _predict(self, unit: Unit) -> Iterator[Part]:
        job, held, files = self.job, list[tuple[Slice, Logits]](), 0
        with ThreadPoolExecutor(THREADS) as pool:
            size = job.served.image_shape[0]
            for found in read_unit(job.source, unit, job.image_column, size, job.form, pool):
                held.append((found, job.served.predict(found.images)))
                if sum(len(logits) for _, logits in held) >= FILE_ROWS:
                    yield self._write(f"{unit.number:06d}-{files:03d}.parquet", held)
                    held, files = [], files + 1
        if held:
            yield self._write(f"{unit.number:06d}-{files:03d}.parquet", held)

    def _write(self, name: str, held: list[tuple[Slice, Logits]]) -> Part:
        table, key, output = predictions_of(self.job.served, held), f"{self.job.folder}/{name}", self.job.output
        # Another job of the same may have been quicker, and published, on a kind of CPU that differs in the last bits.
        data = encode_table(table)
        kept = output.keep(key, data)
        if kept != data:
            if (found := _decode_table(kept, table)) is None:
                output.put(key, data)
            else:
                data, table = kept, found
        predicted = table["predicted"].drop_null().to_numpy()
        return Part(
            name=name,
            rows=table.num_rows,
            unreadable=table["predicted"].null_count,
            bytes=len(data),
            sha256=sha256(data),
            predicted=tuple(np.bincount(predicted, minlength=len(self.job.served.classes)).tolist()),
        )


def schema_of(n_classes: int) -> pa.Schema:
    """The columns of predictions: the file and the row in it (0 of a picture), what was found and how surely, the
    logits, or the error of what could not be read; and by which model."""
    name = pa.dictionary(pa.int32(), pa.string())
    return pa.schema(
        [
            ("path", pa.string()),
            ("row", pa.uint64()),
            ("predicted", pa.uint8()),
            ("class", name),
            ("probability", pa.float32()),
            ("logits", pa.list_(pa.float32(), n_classes)),
            ("error", pa.string()),
            ("model", name),
            ("version", pa.int32()),
            ("run_id", name),
        ]
    )


def predictions_of(served: Served, held: list[tuple[Slice, Logits]]) -> pa.Table:
    """The predictions of some slices with their logits, float32 (n, n_classes), as `schema_of` says."""
    logits = np.concatenate([logits for _, logits in held])
    count, n_classes = logits.shape
    errors: list[str | None] = [found.bad.get(index) for found, _ in held for index in range(len(found.paths))]
    bad = np.array([error is not None for error in errors])
    best = logits.argmax(axis=1)
    surest = probabilities(logits).max(axis=1).astype(np.float32)
    first = np.zeros(count, np.int32)
    version = None if served.version is None else served.version.version
    columns = [
        pa.array([path for found, _ in held for path in found.paths]),
        pa.array(np.concatenate([found.rows for found, _ in held])),
        pa.array(best.astype(np.uint8), mask=bad),
        pa.DictionaryArray.from_arrays(pa.array(best.astype(np.int32), mask=bad), pa.array(served.classes)),
        pa.array(surest, mask=bad),
        pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), n_classes, mask=pa.array(bad)),
        pa.array(errors, pa.string()),
        pa.DictionaryArray.from_arrays(first, pa.array([served.place])),
        pa.array([version] * count, pa.int32()),
        pa.DictionaryArray.from_arrays(first, pa.array([served.run_id])),
    ]
    return pa.Table.from_arrays(columns, schema=schema_of(n_classes))


def encode_table(table: pa.Table) -> bytes:
    """Predictions as a Parquet file; the same bytes for the same table."""
    sink = pa.BufferOutputStream()
    names = ["path", "class", "error", "model", "version", "run_id"]
    pq.write_table(table, sink, compression="zstd", use_dictionary=names)
    return bytes(sink.getvalue())


def _decode_table(data: bytes, like: pa.Table) -> pa.Table | None:
    """The predictions in a Parquet file; None if it is torn, or they are of other images."""
    try:
        table, images = pq.read_table(pa.BufferReader(data)), ["path", "row"]
    except (pa.ArrowException, OSError):
        return None
    return table if table.schema == like.schema and table.select(images) == like.select(images) else None


def _room(cluster: ClusterConfig, pinned: bool) -> tuple[int, dict[str, str]]:
    """How many processes there is room for, and the labels of where: of this machine, if they are pinned to it.

    Ray Data waits for ever for CPUs that others hold, so it is not told to use more than are free.
    """
    here = ray.get_runtime_context().get_node_id()
    all_there_is = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]

    def cpus(resources: Mapping[str, Mapping[str, float]]) -> int:
        return placeable([of for node, of in resources.items() if node == here or not pinned], 1, 0)

    room = cpus(all_there_is)
    if not room:
        raise ClusterError(
            "this machine gives Ray no CPU, and files of it are asked for; use s3:// for source and output"
        )
    give_up = time.monotonic() + FREE_CPU_S
    while (free := cpus(available_resources_per_node())) < 1:  # type: ignore[no-untyped-call]
        if time.monotonic() > give_up:
            raise ClusterError(f"no CPU of Ray came free in {FREE_CPU_S} s; let other work end, then run again")
        time.sleep(0.5)
    return min(cluster.least_workers, room, free), {NODE_LABEL: here} if pinned else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without its bars and warnings: whoever started it sees what we say."""
    logger = logging.getLogger("ray.data")
    level, context = logger.level, ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logger.setLevel(logging.CRITICAL)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)
