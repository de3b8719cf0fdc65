"""Proves that a sound run is verified, and that whatever was done to one is found, each with its own message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flows.models import export
from flows.models import verify as show_verify
from lenet.model import LeNet
from lenet.recipe import RECIPES
from pipeline.artifacts import ONNX, PT2, SAFETENSORS, artifact_of
from pipeline.errors import DataError
from pipeline.evaluate import TOLERANCE
from pipeline.metrics import Tally, Verdict
from pipeline.predictions import decode_predictions, encode_predictions
from pipeline.promotion import PromoteConfig
from pipeline.publish import copy_run, run_folder
from pipeline.registry import promote, register
from pipeline.storage import Store
from pipeline.verify import verify

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

Trained = Callable[..., "Receipts"]
ROOT = run_folder("r")
# What is decided by the objects' content alone.
on_disk = pytest.mark.parametrize("store", ["local"], indirect=True)
NAMES = [
    SAFETENSORS, ONNX, PT2, "predictions/00000.parquet", "predictions/00001.parquet", "report.json", "report.html",
    "README.md", "events.out.tfevents.lenet",
]  # fmt: skip


@pytest.fixture
def url(store: Store, prepared: Callable[..., Store], trained: Trained, good_models: list[LeNet]) -> str:
    """A published run r, version 1 and champion of lenet."""

    def make(first: Store) -> None:
        trained(first, "r", model=good_models[-1]).publish(first)
        promote(first, PromoteConfig(), register(first, "lenet", "r"))

    return f"{prepared('a run that is champion', store, make).url}/runs/r"


def rewrite(store: Store, name: str, data: bytes) -> None:
    """Replace an artifact and have the manifest say that it is the one: what hashes alone do not find."""
    store.put(f"{ROOT}/{name}", data)
    manifest = json.loads(store.read(f"{ROOT}/manifest.json"))
    manifest["artifacts"][name] = artifact_of(data).model_dump()
    store.put(f"{ROOT}/manifest.json", json.dumps(manifest).encode())


def edit_report(store: Store, change: Callable[[Any], object], part: str | None = "evaluation") -> None:
    report = json.loads(store.read(f"{ROOT}/report.json"))
    change(report[part] if part else report)
    rewrite(store, "report.json", json.dumps(report).encode())


def edit_manifest(store: Store, **changes: object) -> None:
    manifest = json.loads(store.read(f"{ROOT}/manifest.json"))
    store.put(f"{ROOT}/manifest.json", json.dumps(manifest | changes).encode())


def test_a_sound_run_is_verified_by_each_of_its_urls(store: Store, url: str) -> None:
    lines = [found.line for found in verify(url)]
    assert lines[0] == "9 objects have the size and sha256 that the manifest says"
    assert lines[1].startswith("report.json: every figure of accuracy follows from the predictions, accuracy 0.")
    assert lines[2] == "predictions: what the model says of all 200 test images of fashion-mnist"
    assert lines[3].startswith("model.safetensors, model.onnx, model.pt2 are one model")
    assert lines[4] == "report.html and README.md say what report.json says"
    assert len(lines) == 5
    for other in (store.url, f"{store.url}/models/lenet", f"{store.url}/models/lenet/versions/1"):
        found = list(verify(other))
        assert [each.line for each in found] == [
            "lenet version 1 (r): its manifest is the one that was registered",
            *lines,
        ]
        assert all(str(each) == f"ok  {each.line}" for each in found)


def test_a_flipped_byte_is_found_in_each_object(store: Store, url: str) -> None:
    for name in NAMES:
        whole = store.read(f"{ROOT}/{name}")
        data = bytearray(whole)
        data[len(data) // 3] ^= 4
        store.put(f"{ROOT}/{name}", bytes(data))
        with pytest.raises(DataError, match=rf"runs/r/{name}: its sha256 is not the recorded"):
            list(verify(url))
        store.put(f"{ROOT}/{name}", whole)


def test_a_missing_object_is_named(store: Store, url: str) -> None:
    for name in NAMES:
        whole = store.read(f"{ROOT}/{name}")
        store.delete(f"{ROOT}/{name}")
        with pytest.raises(DataError, match=rf"runs/r/{name}: missing"):
            list(verify(url))
        store.put(f"{ROOT}/{name}", whole)


EDITS: list[tuple[Callable[[Any], object], str]] = [
    (lambda e: e.update(correct=199), "says correct 199, it is"),
    (lambda e: e.update(ece=e["ece"] + 1e-6), r"says ece 0\.\d+, it is"),
    (lambda e: e["classes"][3].update(f1=1.0), r"says classes\[3\].f1 1\.0, it is"),
    (lambda e: e["classes"][3]["f1_interval"].update(low=0.0), r"says classes\[3\].f1_interval.low 0\.0, it is"),
    (lambda e: e["classes"][0].update(name="Hat"), r"says classes\[0\].name 'Hat', it is"),
    (lambda e: e["confusion"][0].append(1), "says confusion"),
    (lambda e: e["mistakes"].pop(), "says mistakes"),
    (lambda e: e.update(accuracy=1.0), r"says accuracy 1\.0, the manifest 0\.\d+"),
    (lambda e: e.update(accuracy_low=0.5), r"says dataset='fashion-mnist' .*, the manifest dataset="),
    (lambda e: e.update(candidate_sha256="0" * 64), "is the report of model 0000"),
    (lambda e: e.update(test_digest="0" * 64), "is the report of set of test images 0000"),
    (lambda e: e.update(dataset_digest="0" * 64), "is the report of dataset 0000"),
    (
        lambda e: e["forms"][ONNX].update(correct=200),
        r"says model\.onnx\.correct 200, it is 1\d\d;",
    ),
    (lambda e: e["forms"][PT2].update(sha256="0" * 64), r"says model\.pt2\.sha256 '0000"),
]


def test_an_edited_report_is_found_though_its_hash_was_edited_too(store: Store, url: str) -> None:
    report = store.read(f"{ROOT}/report.json")
    for change, message in EDITS[:1] if store.url.startswith("s3:") else EDITS:
        store.put(f"{ROOT}/report.json", report)
        edit_report(store, change)
        with pytest.raises(DataError, match=rf"report\.json: {message}"):
            list(verify(url))


@on_disk
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("dataset", lambda d: d["rows"].update(train=60_000), r"says dataset\.rows\.train 60000, it is 600;"),
        ("layers", lambda layers: layers[1].update(parameters=1), r"says layers\[1\]\.parameters 1, it is 156;"),
        ("dataset", lambda d: d["duplicates"].update(test=7), r"says dataset\.duplicates\.test 7, it is 0;"),
        (
            None,
            lambda report: report.update(finished="2026-01-02T03:04:06Z"),
            "is the report of a run that finished at 2026-01-02 03:04:06",
        ),
        (None, lambda report: report.update(run_id="other"), "is the report of run other, the manifest is of r;"),
        (None, lambda report: report.update(history=[]), r"damaged, or of another version \(history: "),
    ],
)
def test_a_report_of_other_data_another_model_or_another_run_is_found(
    store: Store, url: str, part: str | None, change: Callable[[Any], object], message: str
) -> None:
    edit_report(store, change, part)
    with pytest.raises(DataError, match=rf"report\.json: {message}"):
        list(verify(url))


@on_disk
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dataset_digest", "is another dataset than that of run r"),
        ("test_digest", "runs/r: was judged by other test images than the dataset's"),
    ],
)
def test_other_data_that_report_and_manifest_agree_on_are_found(
    store: Store, url: str, name: str, message: str
) -> None:
    edit_report(store, lambda evaluation: evaluation.update({name: "0" * 64}))
    edit_manifest(store, **{name: "0" * 64})
    with pytest.raises(DataError, match=message):
        list(verify(url))


@on_disk
def test_a_manifest_that_does_not_name_all_is_found(store: Store, url: str) -> None:
    artifacts = json.loads(store.read(f"{ROOT}/manifest.json"))["artifacts"]
    for name in (SAFETENSORS, ONNX, PT2, "report.json", "report.html", "README.md"):
        edit_manifest(store, artifacts={other: found for other, found in artifacts.items() if other != name})
        with pytest.raises(DataError, match=f"runs/r: its manifest names no {name}; do not use the run"):
            list(verify(url))


@on_disk
def test_other_names_of_classes_or_another_shape_are_found(store: Store, url: str) -> None:
    """The names of two classes exchanged in manifest and report alike."""
    run = json.loads(store.read(f"{ROOT}/manifest.json"))

    def exchange(evaluation: Any) -> None:
        first, last = evaluation["classes"][0], evaluation["classes"][9]
        first["name"], last["name"] = last["name"], first["name"]

    edit_report(store, exchange)
    edit_manifest(store, classes=[run["classes"][9], *run["classes"][1:9], run["classes"][0]])
    complaint = r"manifest\.json: its classes or image_shape are not the dataset's; do not use the run"
    with pytest.raises(DataError, match=complaint):
        list(verify(url))
    edit_manifest(store, classes=run["classes"], image_shape=[32, 32])
    with pytest.raises(DataError, match=complaint):
        list(verify(url))


@on_disk
@pytest.mark.parametrize("name", ["report.html", "README.md"])
def test_an_edited_page_is_found_by_the_code_that_wrote_it(store: Store, url: str, name: str) -> None:
    assert list(verify(url))[-1].line == "report.html and README.md say what report.json says"
    rewrite(store, name, store.read(f"{ROOT}/{name}") + b"99.99%")
    with pytest.raises(DataError, match=rf"runs/r/{name}: is not what report\.json gives; it was edited, do not use"):
        list(verify(url))


@on_disk
def test_pages_of_other_code_are_not_said_to_be_proven(
    store: Store, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(store, "README.md", store.read(f"{ROOT}/README.md") + b"99.99%")
    edit_manifest(store, made_by="")
    show_verify(url)
    *held, last, summary = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok  ") for line in held)
    assert last == "--  README.md: not compared, other versions than these here have written the run"
    assert summary == f"verified, but for README.md: {url}"


@on_disk
def test_a_report_of_before_duplicates_were_told_is_sound(store: Store, url: str) -> None:
    edit_report(store, lambda dataset: dataset.pop("duplicates"), "dataset")
    edit_manifest(store, made_by="")
    assert all(found.open_to_doubt in ("", "report.html and README.md") for found in verify(url))


@on_disk
@pytest.mark.parametrize("part", ["forms", "predictions"])
@pytest.mark.parametrize("edit", [dict.clear, lambda parts: parts.update(other=next(iter(parts.values())))])
def test_forms_and_predictions_that_the_manifest_does_not_name_are_found(
    store: Store, url: str, part: str, edit: Callable[[dict[str, Any]], None]
) -> None:
    edit_report(store, lambda evaluation: edit(evaluation[part]))
    with pytest.raises(DataError, match=r"report\.json: its forms or predictions are not the manifest's; do not use"):
        list(verify(url))


def test_predictions_of_images_that_there_are_not_are_found(store: Store, url: str) -> None:
    """A file too many, all of it right, with a report to match."""
    labels = np.tile(np.arange(10, dtype=np.uint8), 100)
    logits = np.where(np.eye(10, dtype=np.bool_)[labels], np.float32(9), np.float32(-9))
    rewrite(store, "predictions/99999.parquet", encode_predictions(logits, labels, 200))
    forge(store)
    with pytest.raises(DataError, match=r"runs/r/predictions: are not of the 200 test images of the dataset"):
        list(verify(url))


@on_disk
def test_predictions_of_fewer_images_are_found(store: Store, url: str) -> None:
    manifest = json.loads(store.read(f"{ROOT}/manifest.json"))
    del manifest["artifacts"]["predictions/00001.parquet"]
    edit_manifest(store, artifacts=manifest["artifacts"])
    forge(store)
    with pytest.raises(DataError, match=r"runs/r/predictions: are not of the 200 test images of the dataset"):
        list(verify(url))


@on_disk
def test_predictions_in_files_of_other_rows_than_the_test_shards_have_are_found(store: Store, url: str) -> None:
    parts = [decode_predictions(store.read(f"{ROOT}/{name}")) for name in NAMES[3:5]]
    logits, labels = np.concatenate([part.logits for part in parts]), np.concatenate([part.labels for part in parts])
    for name, rows in zip(NAMES[3:5], (slice(0, 1), slice(1, 200)), strict=True):
        rewrite(store, name, encode_predictions(logits[rows], labels[rows], rows.start))
    forge(store)
    with pytest.raises(DataError, match=r"predictions/00000\.parquet: does not have the rows of test shard 0; do not"):
        list(verify(url))


def forge(store: Store) -> None:
    """Have report and manifest say what the predictions give."""
    run = json.loads(store.read(f"{ROOT}/manifest.json"))
    names = sorted(name for name in run["artifacts"] if name.startswith("predictions/"))
    tally = Tally(10)
    for name in names:
        found = decode_predictions(store.read(f"{ROOT}/{name}"))
        tally.add(found.logits, found.labels, found.first_row)
    verdict = tally.verdict(tuple(run["classes"])).model_dump(include=set(Verdict.model_fields))
    edit_report(store, lambda evaluation: evaluation.update(
        verdict, predictions={name: run["artifacts"][name] for name in names}
    ))  # fmt: skip
    bounds = {name: verdict[name] for name in ("accuracy_low", "accuracy_high")}
    edit_manifest(store, accuracy=verdict["accuracy"], headline=run["headline"] | bounds)


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


@on_disk
def test_predictions_a_little_off_are_found(store: Store, url: str) -> None:
    """By twice what rounding is given, with a report to match."""
    found = decode_predictions(store.read(f"{ROOT}/{NAMES[3]}"))
    logits = np.array(found.logits)
    row = int(np.abs(logits).max(axis=1).argmax())  # where it is a part of the logits, and none of them is below 1
    logits[row] *= 1 + 2 * TOLERANCE
    rewrite(store, NAMES[3], encode_predictions(logits, found.labels, 0))
    forge(store)
    with pytest.raises(DataError, match=rf"not what model\.safetensors predicts, first at row {row};"):
        list(verify(url))


def test_labels_that_are_not_the_datasets_are_found(store: Store, url: str) -> None:
    """Predictions made perfect by writing what was predicted over the labels, with a report to match."""
    for name in NAMES[3:5]:
        found = decode_predictions(store.read(f"{ROOT}/{name}"))
        rewrite(store, name, encode_predictions(found.logits, found.predicted, found.first_row))
    forge(store)
    assert json.loads(store.read(f"{ROOT}/manifest.json"))["accuracy"] == 1
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


def test_a_version_whose_run_was_written_anew_is_neither_verified_nor_exported(
    store: Store, url: str, tmp_path: Path
) -> None:
    manifest = store.read(f"{ROOT}/manifest.json")
    store.put(f"{ROOT}/manifest.json", manifest + b"\n")
    list(verify(url))
    for refused in (lambda: list(verify(store.url)), lambda: export(store.url, tmp_path / "out")):
        with pytest.raises(DataError, match=r"manifest\.json: its sha256 is not that of lenet version 1 \(r\)"):
            refused()
    assert not (tmp_path / "out").exists()


@on_disk
def test_a_run_of_the_format_before_is_not_exported(store: Store, url: str, tmp_path: Path) -> None:
    manifest = json.loads(store.read(f"{ROOT}/manifest.json"))
    artifacts = {name: found for name, found in manifest["artifacts"].items() if name != PT2}
    edit_manifest(store, format_version=1, artifacts=artifacts)
    for refused in (lambda: list(verify(url)), lambda: copy_run(store, "r", tmp_path)):
        with pytest.raises(DataError, match="^run r: published in format 1, "):
            refused()


def test_a_damaged_manifest_is_one_line(store: Store, url: str) -> None:
    store.put(f"{ROOT}/manifest.json", b'{"run_id": "r"}')
    with pytest.raises(DataError, match=r"manifest\.json: damaged, or of another version \(\w+: Field required"):
        list(verify(url))
