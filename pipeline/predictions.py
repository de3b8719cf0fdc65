"""What was predicted of every test image, kept as Parquet so that any later question can be answered without the model;
and a name for a test split that does not depend on how it is sharded.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import Artifact, read_checked
from pipeline.errors import DataError, first_line
from pipeline.idx import Pixels
from pipeline.metrics import Logits
from pipeline.shards import Manifest
from pipeline.storage import Store


def sum_of_rows(images: Pixels, labels: Pixels, first_row: int) -> int:
    """The sum, modulo 2**256, of the sha256 of every image with its label and its row: the same however the rows are
    sharded, so that two runs know whether they were judged by the same images."""
    total = 0
    for row, (image, label) in enumerate(zip(images, labels, strict=True), first_row):
        digest = hashlib.sha256(row.to_bytes(8, "little") + bytes((int(label),)) + image.tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return total % 2**256


def digest_of_rows(total: int, manifest: Manifest) -> str:
    """Name (sha256, hex) of a test split: of what `sum_of_rows` gave for all of it, its classes, its images' shape."""
    content = [f"{total:064x}", list(manifest.classes), list(manifest.image_shape), manifest.rows("test")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def encode_predictions(logits: Logits, labels: Pixels, first_row: int) -> bytes:
    """Parquet of logits (n, n_classes) and labels (n,): a row for each image, by its number in the test split."""
    count, n_classes = logits.shape
    values = pa.array(np.ascontiguousarray(logits).reshape(-1))
    table = pa.table(
        {
            "row_id": pa.array(np.arange(first_row, first_row + count, dtype=np.uint32)),
            "label": pa.array(labels),
            "predicted": pa.array(logits.argmax(axis=1).astype(np.uint8)),
            "logits": pa.FixedSizeListArray.from_arrays(values, n_classes),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    return bytes(sink.getvalue())


@dataclass(frozen=True)
class Predictions:
    """Rows of the test split: logits float32 (n, n_classes), labels and predicted uint8 (n,), from first_row on."""

    first_row: int
    labels: Pixels
    predicted: Pixels
    logits: Logits

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each image (n,) is recognised."""
        return np.equal(self.predicted, self.labels)


def decode_predictions(data: bytes) -> Predictions:
    """What `encode_predictions` wrote. Raises DataError for another file, and for a class that is not the logits'."""
    try:
        table = pq.read_table(pa.BufferReader(data)).combine_chunks()
        if not all(table[name].type == pa.uint8() and not table[name].null_count for name in ("label", "predicted")):
            raise DataError("its labels or classes are no bytes")
        rows, labels, predicted = (table[name].to_numpy() for name in ("row_id", "label", "predicted"))
        values = table["logits"].combine_chunks()
        logits = values.flatten().to_numpy().reshape(len(rows), -1)  # ValueError for no rows
    except (pa.ArrowException, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"not a file of predictions ({first_line(error)})") from None
    if not np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        raise DataError("its rows do not follow each other")
    if not np.array_equal(predicted, logits.argmax(axis=1)):
        raise DataError("what it says was predicted is not what its logits say")
    if labels.max() >= logits.shape[1]:
        raise DataError(f"it has label {labels.max()} where its logits are of {logits.shape[1]} classes")
    return Predictions(int(rows[0]), labels, predicted, logits)


def prediction_files(artifacts: dict[str, Artifact]) -> list[str]:
    """Names of those of a run's artifacts that are its predictions, in the order of the rows."""
    return sorted(name for name in artifacts if name.startswith("predictions/"))


def read_predictions(store: Store, folder: str, artifacts: dict[str, Artifact]) -> Iterator[Predictions]:
    """The predictions of a run, file by file in the order of the rows; `artifacts` has them by name under `folder`.

    Raises DataError for one that is missing, altered, or does not go on where the one before ended.
    """
    next_row = 0
    for name in prediction_files(artifacts):
        key = f"{folder}/{name}"
        try:
            part = decode_predictions(read_checked(store, key, artifacts[name]))
            if part.first_row != next_row:
                raise DataError(f"starts with row {part.first_row} and not {next_row}")
        except DataError as error:
            where = store.locate(key)
            raise error if str(error).startswith(where) else DataError(f"{where}: {error}; do not use it") from None
        next_row += len(part.labels)
        yield part
