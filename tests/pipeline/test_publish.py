"""Proves that a reader sees all of a run or nothing, however many publishers there are. That they may die at any write
is proven in test_strays.py, that a flipped byte is found in test_verify.py."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import s3fs

from lenet.recipe import RECIPES
from pipeline.checkpoint import encode_model
from pipeline.errors import DataError
from pipeline.publish import LATEST, code_of_pages, find_run, read_latest, run_folder, verify_run
from pipeline.storage import Store, sha256

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

FINISHED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

ARTIFACTS = {
    "model.safetensors", "model.onnx", "model.pt2", "predictions/00000.parquet", "predictions/00001.parquet",
    "report.json", "report.html", "README.md", "events.out.tfevents.lenet",
}  # fmt: skip
Trained = Callable[..., "Receipts"]


def test_a_published_run_can_be_read_back_with_s3fs_alone(s3_store: Store, trained: Trained) -> None:
    receipts = trained(s3_store, "r")
    published = receipts.publish(s3_store)
    plain = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], skip_instance_cache=True)
    folder = f"{s3_store.root}/{run_folder('r')}"
    assert {path.removeprefix(f"{folder}/") for path in plain.find(folder)} == ARTIFACTS | {"manifest.json"}
    manifest = find_run(s3_store, "r")
    assert manifest is not None
    for name, artifact in manifest.artifacts.items():
        data = plain.cat_file(f"{folder}/{name}")
        assert (len(data), sha256(data)) == (artifact.bytes, artifact.sha256)
    assert sha256(plain.cat_file(f"{folder}/model.safetensors")) == receipts.training.candidate_sha256
    assert published.report == f"{s3_store.url}/runs/r/report.html"


def test_latest_points_to_the_manifest_by_hash(store: Store, trained: Trained) -> None:
    receipts = trained(store, "r")
    assert read_latest(store) is None
    receipts.publish(store)
    latest = read_latest(store)
    assert latest is not None
    assert (latest.run_id, latest.accuracy) == ("r", receipts.evaluation.accuracy)
    assert sha256(store.read(latest.manifest)) == latest.manifest_sha256


def test_publishing_again_changes_no_byte(store: Store, trained: Trained) -> None:
    receipts = trained(store, "r")
    first = receipts.publish(store)
    before = {key: store.read(key) for key in store.keys("runs")}
    assert receipts.publish(store) == first
    assert {key: store.read(key) for key in store.keys("runs")} == before


def test_ten_publishers_of_ten_runs_lose_none_and_latest_is_the_last_finished(store: Store, trained: Trained) -> None:
    runs = [trained(store, f"r{hour}", FINISHED + timedelta(hours=hour)) for hour in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda receipts: receipts.publish(store), runs))
    for receipts in runs:
        verify_run(store, receipts.run_id)
    latest = read_latest(store)
    assert latest is not None
    assert latest.run_id == "r9"


def test_ten_publishers_of_one_run_publish_it_once(store: Store, trained: Trained) -> None:
    receipts = trained(store, "r")
    with ThreadPoolExecutor(10) as pool:
        outcomes = list(pool.map(lambda _: receipts.publish(store), range(10)))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    verify_run(store, "r")
    assert {key.removeprefix("runs/r/") for key in store.keys("runs/r")} == ARTIFACTS | {"manifest.json"}


def test_pages_that_other_code_has_written_are_not_said_to_be_of_this(local_store: Store, trained: Trained) -> None:
    receipts = trained(local_store, "r")
    local_store.put(f"{run_folder('r')}/report.html", b"<p>of a version before, that was killed then</p>")
    receipts.publish(local_store)
    found = find_run(local_store, "r")
    assert found is not None
    assert found.made_by == ""
    verify_run(local_store, "r")


def test_pages_are_of_this_code_if_it_was_killed_in_between(local_store: Store, trained: Trained) -> None:
    receipts = trained(local_store, "r")
    receipts.publish(local_store)
    local_store.delete(f"{run_folder('r')}/manifest.json")
    receipts.publish(local_store)
    found = find_run(local_store, "r")
    assert found is not None
    assert found.made_by == code_of_pages() != ""


def test_page_and_card_say_what_the_report_of_the_first_attempt_says(local_store: Store, trained: Trained) -> None:
    receipts = trained(local_store, "r")
    receipts.publish(local_store, lr=0.123)
    for name in ("manifest.json", "report.html", "README.md"):
        local_store.delete(f"{run_folder('r')}/{name}")
    receipts.publish(local_store, lr=0.456)  # on a machine with other versions, say
    found = find_run(local_store, "r")
    assert found is not None
    assert found.made_by == code_of_pages()
    for name in ("report.json", "report.html", "README.md"):
        text = local_store.read(f"{run_folder('r')}/{name}").decode()
        assert "0.123" in text, name
        assert "0.456" not in text, name


def test_pages_are_of_no_code_if_other_code_has_taken_its_place_meanwhile(
    local_store: Store, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipts, loaded = trained(local_store, "r"), code_of_pages()
    monkeypatch.setattr("pipeline.publish.code_on_disk", lambda: "0" * 64)
    receipts.publish(local_store)
    found = find_run(local_store, "r")
    assert found is not None
    assert (found.made_by, code_of_pages()) == ("", loaded)


@pytest.mark.parametrize("name", ["candidate_sha256", "dataset_digest"])
def test_an_evaluation_of_another_model_or_dataset_is_refused(local_store: Store, trained: Trained, name: str) -> None:
    receipts = trained(local_store, "r")
    other = receipts.evaluation.model_copy(update={name: "0" * 64})
    with pytest.raises(DataError, match="the evaluation is of another model or dataset"):
        replace(receipts, evaluation=other).publish(local_store)
    assert find_run(local_store, "r") is None


def test_another_model_that_lies_where_a_run_goes_is_not_published(local_store: Store, trained: Trained) -> None:
    receipts = trained(local_store, "r")
    other = RECIPES["seed"].build_model(10, 1)
    local_store.put(f"{run_folder('r')}/model.safetensors", encode_model(other))
    with pytest.raises(DataError, match=r"runs/r/model\.safetensors: is of another model already"):
        receipts.publish(local_store)
    assert find_run(local_store, "r") is None


def test_latest_never_points_to_a_damaged_run(local_store: Store, trained: Trained) -> None:
    receipts = trained(local_store, "r")
    receipts.publish(local_store)
    local_store.delete(LATEST)
    key = f"{run_folder('r')}/model.onnx"
    local_store.put(key, local_store.read(key)[:-1])
    with pytest.raises(DataError, match=r"runs/r/model\.onnx: its sha256 is not the recorded"):
        receipts.publish(local_store)
    assert read_latest(local_store) is None


def test_no_secret_reaches_what_is_published(s3_store: Store, trained: Trained, s3_env: dict[str, str]) -> None:
    trained(s3_store, "r").publish(s3_store)
    for key in s3_store.keys(""):
        assert s3_env["AWS_SECRET_ACCESS_KEY"].encode() not in s3_store.read(key), key
