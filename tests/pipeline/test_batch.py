"""Proves, on a real Ray and a real S3 server, that a batch is predicted as each image alone would be, every image once,
and that predictions are published whole or not at all."""

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from pipeline import scorer
from pipeline.batch import PredictConfig, _content, _publish, _work, predict_batch, read_manifest, render_batch
from pipeline.cluster import ray_session
from pipeline.errors import ConfigError, DataError, PipelineError, StorageError
from pipeline.feed import find_feed
from pipeline.placement import ClusterConfig
from pipeline.predict import predict_pictures
from pipeline.scorer import PREDICTIONS, Answer, Job, Part, Predicted, Scorer, schema_of
from pipeline.served import open_model
from pipeline.shards import Manifest
from pipeline.storage import Store, open_store, sha256

if TYPE_CHECKING:
    from tests.conftest import S3Server, Splits


@pytest.fixture(scope="module", autouse=True)
def _one_ray(s3_server: "S3Server") -> Iterator[None]:
    """A local Ray for all tests here, whose processes know the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        with ray_session(ClusterConfig(workers=1)):
            yield


def rows_of(output: Store) -> dict[str, list[object]]:
    """All predictions that the manifest names, once they are the bytes that it says."""
    manifest = read_manifest(output)
    assert manifest is not None
    tables = []
    for part in manifest.parts:
        data = output.read(f"{manifest.folder}/{part.name}")
        assert (len(data), sha256(data)) == (part.bytes, part.sha256)
        tables.append(pq.read_table(pa.BufferReader(data)))
        assert tables[-1].num_rows == part.rows
    written = {f"{manifest.folder}/{part.name}" for part in manifest.parts}
    assert set(output.keys("")) == {"manifest.json", *written}
    table = pa.concat_tables(tables).unify_dictionaries()
    assert table.schema == schema_of(10)
    return {str(name): values for name, values in table.to_pydict().items()}


def test_shards_on_s3_are_predicted_image_by_image(
    s3_store: Store, model: str, small_manifest: Callable[[Store], Manifest], small_splits: "Splits"
) -> None:
    manifest = small_manifest(s3_store)
    source, output = s3_store.locate(manifest.folder), open_store(f"{s3_store.url}/predicted")
    report = predict_batch(PredictConfig(source=source, output=output.url, model=model))
    found, served = rows_of(output), open_model(model)
    assert (report.images, report.unreadable, report.run_id, report.version) == (800, 0, "good-run", 1)
    assert report.model_sha256 == served.model_sha256
    assert set(zip(found["model"], found["version"], found["run_id"], strict=True)) == {
        (str(served.place), 1, "good-run")
    }
    assert sum(report.predicted.values()) == 800
    place = {(path, row): index for index, (path, row) in enumerate(zip(found["path"], found["row"], strict=True))}
    assert len(place) == 800
    right = 0
    for split, shards in manifest.splits.items():
        images, labels = small_splits[split]
        where = [place[shard.name, row] for shard in shards for row in range(shard.rows)]
        logits = np.array([found["logits"][index] for index in where], np.float32)
        assert np.allclose(logits, served.predict(images), atol=1e-5)
        predicted = np.array([found["predicted"][index] for index in where])
        assert np.array_equal(predicted, served.predict(images).argmax(axis=1))
        assert [found["class"][index] for index in where] == [served.classes[number] for number in predicted]
        right += int((predicted == labels).sum()) if split == "test" else 0
    assert right > 140  # of 200: these are the images, and not merely some


def test_a_folder_of_pictures_is_predicted_as_each_is_alone(model: str, tmp_path: Path, small_splits: "Splits") -> None:
    folder = tmp_path / "pictures"
    for row, image in enumerate(small_splits["test"][0]):
        path = folder / f"{row % 3}" / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        large = Image.fromarray(255 - image if row % 2 else image).resize((60, 50))
        large.save(path.with_suffix(".jpg") if row % 5 == 0 else path)
    (folder / "1" / "bad.png").write_bytes(b"no picture")
    (folder / ".hidden.png").write_bytes(b"no picture")
    output = open_store(str(tmp_path / "out"))
    report = predict_batch(PredictConfig(source=str(folder), output=output.url, model=model, workers=1))
    found = rows_of(output)
    assert (report.images, report.unreadable, report.files) == (201, 1, 1)
    assert found["path"] == sorted(found["path"])
    bad = found["path"].index("1/bad.png")
    assert found["error"][bad] == "neither PNG nor JPEG"
    assert all(found[name][bad] is None for name in ("predicted", "class", "probability", "logits"))
    good = [index for index in range(201) if index != bad]
    served = open_model(model)
    alone = predict_pictures(served, [folder / str(found["path"][index]) for index in good])
    for index, prediction in zip(good, alone, strict=True):
        surest = max(prediction.probabilities)
        assert found["class"][index] == served.classes[prediction.probabilities.index(surest)]
        assert found["probability"][index] == pytest.approx(surest, abs=1e-5)
    assert {found["error"][index] for index in good} == {None}


def test_the_same_again_is_no_work_and_other_content_is_refused(
    local_store: Store, model: str, small_manifest: Callable[[Store], Manifest], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = local_store.locate(small_manifest(local_store).folder)
    output = open_store(str(tmp_path / "out"))
    config = PredictConfig(source=f"{folder}/test-*.parquet", output=output.url, model=model, workers=1)
    report = predict_batch(config)
    assert (report.images, report.output) == (200, str(tmp_path / "out"))
    text = render_batch(report)
    assert "# 200 images predicted by lenet version 1 (good-run)" in text
    assert f"| Ankle boot | {report.predicted['Ankle boot']} |" in text

    before = {key: output.read(key) for key in output.keys("")}
    refused = r"^output=.*: it holds predictions of other images or by another model \(200 by lenet version 1 \("
    other = config.model_copy(update={"source": f"{folder}/train-*.parquet"})
    with monkeypatch.context() as patch:
        patch.setattr(scorer, "predict_units", None)
        assert predict_batch(config) == report
        for wrong in (other, config.model_copy(update={"model": f"{model}/runs/good-run"})):
            with pytest.raises(ConfigError, match=refused):
                predict_batch(wrong)
        os.utime(next(Path(folder).glob("test-*.parquet")), ns=(0, 0))
        with pytest.raises(ConfigError, match=refused):
            predict_batch(config)
    assert {key: output.read(key) for key in output.keys("")} == before

    # Another job takes the output while this one is at work.
    contested = open_store(str(tmp_path / "contested"))

    def overtaken(job: Job, *_: object) -> object:
        part = Part(name="000000-000.parquet", rows=600, unreadable=0, bytes=5, sha256="", predicted=(60,) * 10)
        job.output.put(f"{job.folder}/{part.name}", b"where")
        for key, data in before.items():
            contested.create(key, data)
        return Predicted([part], 1.0, 600)

    monkeypatch.setattr(scorer, "predict_units", overtaken)
    with pytest.raises(ConfigError, match=refused):
        predict_batch(other.model_copy(update={"output": contested.url}))
    assert {key: contested.read(key) for key in contested.keys("")} == before


@pytest.mark.parametrize(
    "theirs", ["predictions/2025/a.csv", "receipts/rent.pdf", "predictions/0123456789abcdef/a.csv"]
)
def test_what_others_keep_in_the_output_is_not_touched(
    store: Store, model: str, tmp_path: Path, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "in" / "a.png")
    output = open_store(f"{store.url}/out")
    config = PredictConfig(source=str(tmp_path / "in"), output=output.url, model=model, workers=1)

    def meanwhile(job: Job, *_: object) -> object:
        job.output.put(f"{PREDICTIONS}/{'0' * 16}/000000-000.parquet", b"of a job before")
        output.put(theirs, b"theirs")
        part = Part(name="000000-000.parquet", rows=1, unreadable=0, bytes=5, sha256="", predicted=(1,) * 10)
        return Predicted([part], 1.0, 1)

    with monkeypatch.context() as patch:
        patch.setattr(scorer, "predict_units", meanwhile)
        predict_batch(config)
    assert output.keys("") == sorted(["manifest.json", theirs])
    output.delete("manifest.json")
    monkeypatch.setattr(scorer, "predict_units", None)
    with pytest.raises(ConfigError, match=f"^output=.*: it holds {theirs}, which is not ours; name another folder$"):
        predict_batch(config)
    assert output.keys("") == [theirs]


def test_an_output_is_inside_the_source_by_whatever_name(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, link = tmp_path / "photos", tmp_path / "link"
    photos.mkdir()
    link.symlink_to(photos)
    Image.new("L", (28, 28)).save(photos / "a.png")
    monkeypatch.chdir(photos)
    for source, output in ((".", "out"), (link, photos / "out"), (photos, link), (photos, f"{link}/../photos/out")):
        with pytest.raises(ConfigError, match=r"^output=.*: it is inside the source; name a folder outside of it$"):
            predict_batch(PredictConfig(source=str(source), output=str(output), model=model, workers=1))
    assert predict_batch(PredictConfig(source=".", output="../out", model=model, workers=1)).images == 1


def test_a_job_is_told_of_places_in_full(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a working directory of its own, and perhaps a home."""
    monkeypatch.setenv("HOME", "/home/me")
    config = PredictConfig(source="~/photos", output="~/out", model=model, ray_address="http://127.0.0.1:8265")
    asked = _work(open_store(config.output), config, open_model(model), "0" * 16).asked["parameters"]
    assert (asked["source"], asked["output"]) == ("/home/me/photos", "file:///home/me/out")


def test_a_job_that_broke_off_goes_on(
    local_store: Store, model: str, small_manifest: Callable[[Store], Manifest], tmp_path: Path
) -> None:
    folder = local_store.locate(small_manifest(local_store).folder)
    output = open_store(str(tmp_path / "out"))
    config = PredictConfig(source=folder, output=output.url, model=model, workers=1)
    torn = sorted(Path(folder).glob("train-*.parquet"))[2]
    whole, times = torn.read_bytes(), torn.stat()
    damaged = bytearray(whole)
    damaged[200:20_000] = bytes(19_800)  # the footer says nothing of it
    torn.write_bytes(damaged)
    os.utime(torn, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=rf"^{torn}: cannot be read to its end \(.*\); write it again$"):
        predict_batch(config)
    assert not output.exists("manifest.json")
    answers = [Answer.model_validate_json(output.read(key)) for key in output.keys("receipts")]
    before = sum(part.rows for answer in answers for part in answer.parts)
    assert before
    torn.write_bytes(whole)
    os.utime(torn, ns=(times.st_atime_ns, times.st_mtime_ns))
    predictions = {key: (tmp_path / "out" / key).stat().st_ino for key in output.keys("predictions")}
    report = predict_batch(config)
    assert report.images == 800
    assert report.images_per_second * report.seconds == pytest.approx(800 - before)
    assert len(rows_of(output)["path"]) == 800
    assert predictions.items() <= {key: (tmp_path / "out" / key).stat().st_ino for key in output.keys("")}.items()


def test_what_will_not_pass_is_not_said_to(model: str, tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    feed, served = find_feed(str(tmp_path / "a.png"), "image", 28), open_model(model)
    (tmp_path / "a.png").unlink()
    job = Job(feed.store, open_store(str(tmp_path / "out")), served, "image", "auto", "0" * 16)
    with pytest.raises(StorageError, match=rf"^{tmp_path}/a.png: not found") as raised:
        scorer.predict_units(job, feed, ClusterConfig(workers=1, cpus_per_worker=1, gpu="no"))
    assert not raised.value.may_pass


def test_a_source_that_changes_meanwhile_is_not_published(
    local_store: Store, model: str, small_manifest: Callable[[Store], Manifest], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = Path(local_store.locate(small_manifest(local_store).folder))
    output = open_store(str(tmp_path / "out"))

    def meddled(job: Job, *_: object) -> object:
        job.output.put(f"{job.folder}/000000-000.parquet", b"predictions")
        (folder / "late.parquet").write_bytes(next(folder.glob("test-*")).read_bytes())
        return Predicted([], 1.0, 0)

    monkeypatch.setattr(scorer, "predict_units", meddled)
    with pytest.raises(DataError, match=rf"^{folder}: changed while it was read; let it rest and run again$"):
        predict_batch(PredictConfig(source=str(folder), output=output.url, model=model, workers=1))
    assert output.keys("") == []


@pytest.mark.parametrize("misses_a_receipt", [False, True])
def test_what_another_job_of_the_same_has_published_stays(
    local_store: Store, model: str, small_manifest: Callable[[Store], Manifest], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, misses_a_receipt: bool,
) -> None:  # fmt: skip
    """The source changes after that, or this one looks for a receipt that the other takes away."""
    folder = Path(local_store.locate(small_manifest(local_store).folder))
    output = open_store(str(tmp_path / "out"))
    config = PredictConfig(source=f"{folder}/test-*.parquet", output=output.url, model=model, workers=1)
    predict_units, before = scorer.predict_units, dict[str, bytes]()

    def overtaken(job: Job, *_: object) -> object:
        monkeypatch.setattr(scorer, "predict_units", predict_units)
        predict_batch(config)
        before.update({key: output.read(key) for key in output.keys("")})
        output.put(f"{job.receipts}/000000.json", b"of this one")
        if misses_a_receipt:
            output.read(f"{job.receipts}/000001.json")
        (folder / "test-late.parquet").write_bytes(next(folder.glob("test-*")).read_bytes())
        return Predicted([], 1.0, 0)

    monkeypatch.setattr(scorer, "predict_units", overtaken)
    assert predict_batch(config).images == 200
    assert {key: output.read(key) for key in output.keys("")} == before
    assert len(rows_of(output)["path"]) == 200


def test_a_slower_job_of_the_same_leaves_what_is_published(
    store: Store, model: str, small_manifest: Callable[[Store], Manifest]
) -> None:
    """On another kind of CPU, which differs in the last bits: here by other weights."""
    source, output = store.locate(small_manifest(store).folder), open_store(f"{store.url}/out")
    config = PredictConfig(source=source, output=output.url, model=model)
    feed, served = find_feed(source, "image", 28), open_model(model)
    job = Job(feed.store, output, served, "image", "auto", _content(config, served, feed))
    nudged = copy.deepcopy(served.model)
    with torch.no_grad():
        for weights in nudged.parameters():
            weights *= 1 + 1e-6
    slower = replace(job, served=replace(served, model=nudged))

    def predicted(job: Job) -> Predicted:
        return Predicted([part for unit in feed.units for part in Scorer(job).answer(unit).parts], 1.0, feed.images)

    elsewhere = replace(slower, output=open_store(f"{store.url}/elsewhere"))
    other = predicted(elsewhere).parts
    first = _publish(config, job, feed, predicted(job))
    assert not {part.sha256 for part in first.parts} & {part.sha256 for part in other}
    assert _publish(config, slower, feed, predicted(slower)) == first
    assert len(rows_of(output)["path"]) == 800

    # What is damaged is no work of another's: by its receipt, or because nobody could read it.
    output.delete("manifest.json")
    parts = predicted(job).parts
    key = f"{job.folder}/{parts[0].name}"
    output.put(key, elsewhere.output.read(key))
    assert predicted(job).parts == parts
    output.delete(job.receipts)
    for damaged in (b"torn", output.read(f"{job.folder}/{parts[1].name}")):
        output.put(key, damaged)
        output.delete(job.receipts)
        assert predicted(job).parts == parts
    assert sha256(output.read(key)) == parts[0].sha256


def test_other_work_on_ray_leaves_room_or_is_waited_for_in_vain(
    local_store: Store, model: str, small_manifest: Callable[[Store], Manifest], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = local_store.locate(small_manifest(local_store).folder)
    config = PredictConfig(source=f"{folder}/test-*.parquet", output=str(tmp_path / "out"), model=model, workers=1)
    monkeypatch.setattr(scorer, "FREE_CPU_S", 1)
    cpus = int(ray.cluster_resources()["CPU"])

    @ray.remote(num_cpus=1)
    class Busy:
        def ready(self) -> bool:
            return True

    busy = [Busy.remote() for _ in range(cpus)]
    ray.get([actor.ready.remote() for actor in busy])
    with pytest.raises(
        scorer.ClusterError, match=r"^no CPU of Ray came free in 1 s; let other work end, then run again$"
    ):
        predict_batch(config)
    ray.kill(busy.pop())
    monkeypatch.setattr(scorer, "FREE_CPU_S", 30)
    assert predict_batch(config.model_copy(update={"workers": cpus})).images == 200
    for actor in busy:
        ray.kill(actor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "/nowhere"}, "source='/nowhere': no such file or folder; a source is"),
        ({"source": "ftp://x/y"}, "source='ftp://x/y': the store is a folder"),
        ({"source": "EMPTY"}, "source='EMPTY': there is nothing to predict; a source is"),
        ({"source": "SHARDS/none-*.parquet"}, "source='SHARDS/none-*.parquet': there is nothing to predict;"),
        ({"output": "ftp://x/y"}, "output='ftp://x/y': the store is a folder"),
        ({"output": "SHARDS/out"}, "output='SHARDS/out': it is inside the source; name a folder outside of it"),
        ({"image_column": "photo"}, "has no column 'photo' (but row_id, image, label); name it with image_column"),
        ({"image_column": "label"}, "uint8 is not images; they have to be encoded PNG or JPEG"),
        ({"workers": 1000}, "workers=1000: Ray has room for "),
        ({"ray_address": "127.0.0.1:9"}, "ray_address='127.0.0.1:9': no Ray cluster answers there"),
        ({"model": "EMPTY"}, "model='"),
    ],
)
def test_a_mistake_costs_a_line_and_no_work(
    local_store: Store, model: str, small_manifest: Callable[[Store], Manifest], tmp_path: Path,
    change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shards, empty = local_store.locate(small_manifest(local_store).folder), tmp_path / "empty"
    empty.mkdir()

    def real(text: object) -> object:
        return text.replace("SHARDS", shards).replace("EMPTY", str(empty)) if isinstance(text, str) else text

    given = {"source": shards, "output": str(tmp_path / "out"), "model": model, **change}
    monkeypatch.setattr(scorer, "predict_units", None)
    with pytest.raises(PipelineError) as raised:
        predict_batch(PredictConfig.model_validate({name: real(value) for name, value in given.items()}))
    assert str(real(message)) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
