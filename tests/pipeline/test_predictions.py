"""Proves that predictions come back as they were written, and that a test split has one name however it is sharded."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import artifact_of
from pipeline.errors import DataError
from pipeline.predictions import decode_predictions, encode_predictions, read_predictions, sum_of_rows
from pipeline.storage import Store

if TYPE_CHECKING:
    from tests.conftest import Splits


def some(count: int = 20, seed: int = 0, first_row: int = 0) -> bytes:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, 3)).astype(np.float32)
    return encode_predictions(logits, generator.integers(0, 3, count).astype(np.uint8), first_row)


def edited(data: bytes, column: str, values: pa.Array) -> bytes:
    table = pq.read_table(pa.BufferReader(data))
    sink = pa.BufferOutputStream()
    pq.write_table(table.set_column(table.column_names.index(column), column, values), sink)
    return bytes(sink.getvalue())


def test_predictions_come_back_and_other_readers_see_the_columns() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(4, 3)
    labels = np.array([2, 0, 1, 2], np.uint8)
    data = encode_predictions(logits, labels, 7)
    found = decode_predictions(data)
    assert found.first_row == 7
    assert np.array_equal(found.logits, logits)
    assert np.array_equal(found.labels, labels)
    assert found.right.tolist() == [True, False, False, True]
    schema = pq.read_schema(pa.BufferReader(data))
    types = [pa.uint32(), pa.uint8(), pa.uint8(), pa.list_(pa.float32(), 3)]
    assert (schema.names, schema.types) == (["row_id", "label", "predicted", "logits"], types)


def test_a_class_that_is_not_the_logits_is_refused() -> None:
    wrong = edited(some(), "predicted", pa.array(np.zeros(20, np.uint8)))
    with pytest.raises(DataError, match="not what its logits say"):
        decode_predictions(wrong)


def test_rows_out_of_order_are_refused() -> None:
    wrong = edited(some(), "row_id", pa.array(np.arange(20, dtype=np.uint32)[::-1].copy()))
    with pytest.raises(DataError, match="do not follow each other"):
        decode_predictions(wrong)


def test_a_label_beyond_the_classes_is_refused() -> None:
    wrong = edited(some(), "label", pa.array(np.full(20, 3, np.uint8)))
    with pytest.raises(DataError, match="it has label 3 where its logits are of 3 classes"):
        decode_predictions(wrong)


@pytest.mark.parametrize(
    "labels", [pa.array(np.full(20, -1, np.int8)), pa.array(np.ones(20)), pa.array([None] * 20, pa.uint8())]
)
@pytest.mark.parametrize("column", ["label", "predicted"])
def test_classes_that_are_no_bytes_are_refused(column: str, labels: pa.Array) -> None:
    with pytest.raises(DataError, match="its labels or classes are no bytes"):
        decode_predictions(edited(some(), column, labels))


@pytest.mark.parametrize("data", [b"", b"PAR1", some()[:-9], some(0)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not a file of predictions"):
        decode_predictions(data)


def test_parts_have_to_follow_each_other(store: Store) -> None:
    parts = {"predictions/00000.parquet": some(20), "predictions/00001.parquet": some(5, first_row=20)}
    for name, data in parts.items():
        store.put(f"f/{name}", data)
    artifacts = {name: artifact_of(data) for name, data in parts.items()}
    assert [len(part.labels) for part in read_predictions(store, "f", artifacts)] == [20, 5]
    store.put("f/predictions/00001.parquet", some(5, first_row=21))
    artifacts["predictions/00001.parquet"] = artifact_of(some(5, first_row=21))
    with pytest.raises(DataError, match=r"00001\.parquet: starts with row 21 and not 20"):
        list(read_predictions(store, "f", artifacts))


@given(cut=st.integers(0, 200))
def test_the_sum_of_rows_is_that_of_its_parts(small_splits: "Splits", cut: int) -> None:
    images, labels = small_splits["test"]
    parts = [sum_of_rows(images[:cut], labels[:cut], 0), sum_of_rows(images[cut:], labels[cut:], cut)]
    assert sum(parts) % 2**256 == sum_of_rows(images, labels, 0)


@pytest.mark.parametrize("change", ["pixel", "label", "order"])
def test_the_sum_of_rows_tells_other_images_apart(small_splits: "Splits", change: str) -> None:
    images, labels = (np.array(part) for part in small_splits["test"])
    before = sum_of_rows(images, labels, 0)
    if change == "pixel":
        images[3, 4, 5] ^= 1
    elif change == "label":
        labels[3] ^= 1
    else:
        images[[3, 4]], labels[[3, 4]] = images[[4, 3]], labels[[4, 3]]
    assert sum_of_rows(images, labels, 0) != before
