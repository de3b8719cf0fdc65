"""Proves that a process predicts its units as the model would, and writes the same bytes again, in bounded files."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import scorer
from pipeline.feed import find_feed
from pipeline.idx import Pixels
from pipeline.scorer import Answer, Job, Scorer
from pipeline.served import open_model
from pipeline.storage import Store, open_store

if TYPE_CHECKING:
    from tests.conftest import Splits


def test_encoded_pictures_in_parquet_on_s3(s3_store: Store, model: str, small_splits: "Splits", tmp_path: Path) -> None:
    images = small_splits["test"][0][:150]

    def png(image: Pixels) -> bytes:
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        return data.getvalue()

    column = [{"bytes": png(image), "path": None} for image in images[:149]] + [None]
    sink = io.BytesIO()
    pq.write_table(pa.table({"photo": column}), sink, row_group_size=40)
    s3_store.put("in/photos.parquet", sink.getvalue())
    output = open_store(f"{s3_store.url}/out")
    found = find_feed(s3_store.locate("in/photos.parquet"), "photo", 28)
    served = open_model(model)
    process = Scorer(Job(found.store, output, served, "photo", "auto", "0" * 16))
    (part,) = [part for unit in found.units for part in process.answer(unit).parts]
    assert (part.rows, part.unreadable, sum(part.predicted)) == (150, 1, 149)
    table = pq.read_table(pa.BufferReader(output.read(f"{process.job.folder}/{part.name}"))).to_pydict()
    assert table["row"] == list(range(150))
    assert table["error"] == [None] * 149 + ["null"]
    assert table["predicted"][:149] == served.predict(images[:149]).argmax(axis=1).tolist()


def test_a_process_writes_the_same_bytes_again_in_files_of_bounded_size(
    local_store: Store, model: str, small_splits: "Splits", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.concatenate([small_splits["train"][0]] * 5)  # 3,000 in one row group, read 1,000 at a time
    column = pa.array([image.tobytes() for image in images], pa.binary(784))
    pq.write_table(pa.table({"image": column}), tmp_path / "large.parquet", row_group_size=len(images))
    monkeypatch.setattr(scorer, "FILE_ROWS", 2_000)
    feed = find_feed(str(tmp_path / "large.parquet"), "image", 28)
    (unit,) = feed.units
    answers: list[Answer] = []
    for name in ("a", "b"):
        output = open_store(str(tmp_path / name))
        answers.append(Scorer(Job(feed.store, output, open_model(model), "image", "auto", "0" * 16)).answer(unit))
    assert answers[0] == answers[1]
    assert [part.rows for part in answers[0].parts] == [2_000, 1_000]
