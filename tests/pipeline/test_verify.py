"""Proves that a sound run is verified, and that whatever was done to one is found, each with its own message."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lenet.model import LeNet
from lenet.recipe import RECIPES
from pipeline.artifacts import ONNX, PT2, SAFETENSORS, artifact_of
from pipeline.errors import DataError
from pipeline.metrics import Tally, Verdict
from pipeline.predictions import decode_predictions, encode_predictions
from pipeline.promotion import PromoteConfig
from pipeline.publish import run_folder
from pipeline.registry import promote, register
from pipeline.storage import Store
from pipeline.verify import verify

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

Trained = Callable[..., "Receipts"]
ROOT = run_folder("r")
NAMES = [
    SAFETENSORS, ONNX, PT2, "predictions/00000.parquet", "predictions/00001.parquet", "report.json", "report.html",
    "README.md", "events.out.tfevents.lenet",
]  # fmt: skip


@pytest.fixture
def url(store: Store, trained: Trained, good_models: list[LeNet]) -> str:
    """A published run r, version 1 and champion of lenet."""
    trained(store, "r", model=good_models[-1]).publish(store)
    promote(store, PromoteConfig(), register(store, "lenet", "r"))
    return f"{store.url}/runs/r"


def rewrite(store: Store, name: str, data: bytes) -> None:
    """Replace an artifact and have the manifest say that it is the one: what hashes alone do not find."""
    store.put(f"{ROOT}/{name}", data)
    manifest = json.loads(store.read(f"{ROOT}/manifest.json"))
    manifest["artifacts"][name] = artifact_of(data).model_dump()
    store.put(f"{ROOT}/manifest.json", json.dumps(manifest).encode())


def edit_report(store: Store, change: Callable[[Any], None]) -> None:
    report = json.loads(store.read(f"{ROOT}/report.json"))
    change(report["evaluation"])
    rewrite(store, "report.json", json.dumps(report).encode())


def test_a_sound_run_is_verified_by_each_of_its_urls(store: Store, url: str) -> None:
    lines = list(verify(url))
    assert lines[0] == "9 objects have the size and sha256 that the manifest says"
    assert lines[1].startswith("report.json: every number follows from the predictions, accuracy 0.")
    assert lines[2] == "predictions: what the model says of all 200 test images of fashion-mnist"
    assert lines[3].startswith("model.safetensors, model.onnx, model.pt2 are one model")
    for other in (store.url, f"{store.url}/models/lenet", f"{store.url}/models/lenet/versions/1"):
        assert list(verify(other)) == ["lenet version 1 (r): its manifest is the one that was registered", *lines]


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_is_found_in_each_object(store: Store, url: str, name: str) -> None:
    data = bytearray(store.read(f"{ROOT}/{name}"))
    data[len(data) // 3] ^= 4
    store.put(f"{ROOT}/{name}", bytes(data))
    with pytest.raises(DataError, match=rf"runs/r/{name}: its sha256 is not the recorded"):
        list(verify(url))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_object_is_named(store: Store, url: str, name: str) -> None:
    store.delete(f"{ROOT}/{name}")
    with pytest.raises(DataError, match=rf"runs/r/{name}: missing"):
        list(verify(url))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(correct=199), "says correct 199, the predictions give"),
        (lambda e: e.update(ece=e["ece"] + 1e-6), r"says ece 0\.\d+, the predictions give"),
        (lambda e: e["classes"][3].update(f1=1.0), r"says classes\[3\].f1 1\.0, the predictions give"),
        (lambda e: e["classes"][0].update(name="Hat"), r"says classes\[0\].name 'Hat', the predictions give"),
        (lambda e: e["confusion"][0].append(1), "says confusion"),
        (lambda e: e["mistakes"].pop(), "says mistakes"),
        (lambda e: e.update(accuracy=1.0), r"says accuracy 1\.0, the manifest 0\.\d+"),
        (lambda e: e.update(accuracy_low=0.5), r"says dataset='fashion-mnist' .*, the manifest dataset="),
        (lambda e: e.update(candidate_sha256="0" * 64), "is the report of model 0000"),
        (lambda e: e.update(test_digest="0" * 64), "is the report of set of test images 0000"),
    ],
)
def test_an_edited_report_is_found_though_its_hash_was_edited_too(
    store: Store, url: str, change: Callable[[Any], None], message: str
) -> None:
    edit_report(store, change)
    with pytest.raises(DataError, match=rf"report\.json: {message}"):
        list(verify(url))


def test_swapped_predictions_are_found(store: Store, url: str) -> None:
    """Two rows that have the same label and outcome exchange their logits: every number stays as it is."""
    name = "predictions/00000.parquet"
    found = decode_predictions(store.read(f"{ROOT}/{name}"))
    logits = np.array(found.logits)
    pairs = [(a, b) for a in range(len(logits)) for b in range(a) if found.right[a] and found.right[b]
             and found.labels[a] == found.labels[b]]  # fmt: skip
    a, b = pairs[0]
    logits[[a, b]] = logits[[b, a]]
    rewrite(store, name, encode_predictions(logits, found.labels, 0))
    with pytest.raises(DataError, match=rf"{name}: not what model\.safetensors predicts, first at row {min(a, b)};"):
        list(verify(url))


def test_labels_that_are_not_the_datasets_are_found(store: Store, url: str) -> None:
    """Predictions made perfect by writing what was predicted over the labels, with a report to match."""
    tally, run = Tally(10), json.loads(store.read(f"{ROOT}/manifest.json"))
    for name in NAMES[3:5]:
        found = decode_predictions(store.read(f"{ROOT}/{name}"))
        tally.add(found.logits, found.predicted, found.first_row)
        rewrite(store, name, encode_predictions(found.logits, found.predicted, found.first_row))
    perfect = tally.verdict(tuple(run["classes"])).model_dump(include=set(Verdict.model_fields))
    edit_report(store, lambda evaluation: evaluation.update(perfect))
    manifest = json.loads(store.read(f"{ROOT}/manifest.json")) | {"accuracy": 1.0}
    manifest["headline"] |= {name: perfect[name] for name in ("accuracy_low", "accuracy_high")}
    store.put(f"{ROOT}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(DataError, match=r"predictions/00000\.parquet: its labels are not those of the dataset"):
        list(verify(url))


@pytest.mark.parametrize("name", [ONNX, PT2])
def test_a_form_of_another_model_is_found(
    store: Store, url: str, forms: Callable[[LeNet], dict[str, bytes]], name: str
) -> None:
    rewrite(store, name, forms(RECIPES["seed"].build_model(10, 1))[name])
    with pytest.raises(DataError, match=f"{name}: its logits differ from those of model.safetensors"):
        list(verify(url))


def test_the_manifest_of_another_run_is_found(store: Store, url: str, trained: Trained) -> None:
    trained(store, "other", seed=5).publish(store)
    store.put(f"{ROOT}/manifest.json", store.read("runs/other/manifest.json"))
    with pytest.raises(DataError, match=r"runs/r/manifest\.json: is the manifest of run other"):
        list(verify(url))


def test_a_version_whose_run_was_written_anew_is_found(store: Store, url: str) -> None:
    manifest = store.read(f"{ROOT}/manifest.json")
    store.put(f"{ROOT}/manifest.json", manifest + b"\n")
    list(verify(url))
    with pytest.raises(DataError, match=r"manifest\.json: its sha256 is not that of lenet version 1 \(r\)"):
        list(verify(store.url))


def test_a_damaged_manifest_is_one_line(store: Store, url: str) -> None:
    store.put(f"{ROOT}/manifest.json", b'{"run_id": "r"}')
    with pytest.raises(DataError, match=r"manifest\.json: damaged, or of another version \(\w+: Field required"):
        list(verify(url))
