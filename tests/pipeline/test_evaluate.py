"""Proves that every form of the very candidate is judged, on every test image, and forms that differ are refused."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from lenet.model import LeNet
from lenet.recipe import RECIPES
from pipeline import evaluate as module
from pipeline.artifacts import FORMS, ONNX, PT2, SAFETENSORS, artifact_of, open_form, predictor
from pipeline.checkpoint import encode_model
from pipeline.errors import DataError
from pipeline.evaluate import (
    Exported,
    ShardVerdict,
    apart,
    evaluate,
    export,
    exported_key,
    find_evaluation,
    load_model,
    require_agreement,
)
from pipeline.idx import Pixels
from pipeline.metrics import Predictor, Tally
from pipeline.predictions import decode_predictions, encode_predictions, read_predictions
from pipeline.probe import Robustness
from pipeline.storage import Store, sha256
from pipeline.train import staging

if TYPE_CHECKING:
    from tests.conftest import Splits
    from tests.pipeline.conftest import Receipts

Trained = Callable[..., "Receipts"]


def test_a_candidate_is_exported_once_and_all_its_forms_are_judged_equal(
    store: Store, trained: Trained, small_splits: "Splits", good_models: list[LeNet]
) -> None:
    left = trained(store, "r", model=good_models[-1])
    for key in (
        *store.keys(f"{staging('r')}/export"),
        f"{staging('r')}/export.json",
        f"{staging('r')}/evaluation.json",
    ):
        store.delete(key)
    exported = export(store, "r", left.manifest, left.training)
    assert tuple(exported.forms) == FORMS
    assert export(store, "r", left.manifest, left.training) == exported
    found = evaluate(store, "r", left.manifest, exported)
    images, labels = small_splits["test"]
    logits = open_form(SAFETENSORS, store.read(left.training.candidate))(images)
    assert found.images == 200
    assert found.accuracy == accuracy_score(labels, logits.argmax(axis=1)) > 0.6
    p = np.exp(logits.astype(np.float64))
    assert found.loss == pytest.approx(log_loss(labels, p / p.sum(axis=1, keepdims=True)))
    assert {check.correct for check in found.forms.values()} == {found.correct}
    assert found.forms[SAFETENSORS].largest_difference == 0
    assert max(check.largest_difference for check in found.forms.values()) < 1e-4
    assert [speed.batch for speed in found.speed] == [1, 256]
    assert len(found.robustness) == 12
    assert find_evaluation(store, "r") == found
    assert evaluate(store, "r", left.manifest, exported) == found


def test_figures_are_those_of_the_predictions_that_are_kept(
    local_store: Store, trained: Trained, good_models: list[LeNet]
) -> None:
    """An earlier attempt, on a machine that rounds otherwise, has left a part."""
    left = trained(local_store, "r", model=good_models[-1])
    key = f"{staging('r')}/predictions/00000.parquet"
    first = decode_predictions(local_store.read(key))
    local_store.put(key, encode_predictions(first.logits * np.float32(1 + 1e-6), first.labels, 0))
    local_store.delete(f"{staging('r')}/evaluation.json")
    found = evaluate(local_store, "r", left.manifest, left.exported)
    tally = Tally(10)
    for part in read_predictions(local_store, staging("r"), found.predictions):
        tally.add(part.logits, part.labels, part.first_row)
    assert found.loss == tally.verdict(left.manifest.classes).loss != left.evaluation.loss


def test_predictions_of_every_row_are_kept(store: Store, trained: Trained, small_splits: "Splits") -> None:
    left = trained(store, "r")
    assert len(left.evaluation.predictions) == len(left.manifest.splits["test"]) == 2
    parts = list(read_predictions(store, staging("r"), left.evaluation.predictions))
    images, labels = small_splits["test"]
    logits = np.concatenate([part.logits for part in parts])
    expected = open_form(SAFETENSORS, store.read(left.training.candidate))(images)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert np.array_equal(np.concatenate([part.labels for part in parts]), labels)
    assert sum(int(part.right.sum()) for part in parts) == left.evaluation.correct


def in_processes(work: Callable[[Any], Any], tasks: Any) -> Any:
    """As Ray's tasks do it: what goes there and back is pickled."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, tasks)


def test_shards_judged_in_other_processes_give_the_same_verdict(
    local_store: Store, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = trained(local_store, "r")
    local_store.delete(f"{staging('r')}/evaluation.json")
    monkeypatch.setattr(module, "ON_RAY_FROM", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    again = evaluate(local_store, "r", left.manifest, left.exported, in_processes)
    measured = {"seconds", "speed"}
    assert again.model_dump(exclude=measured) == left.evaluation.model_dump(exclude=measured)


def test_changed_images_are_from_all_of_the_test_split(
    local_store: Store, trained: Trained, small_splits: "Splits", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows may be sorted by class."""
    left = trained(local_store, "r")
    local_store.delete(f"{staging('r')}/evaluation.json")
    monkeypatch.setattr(module, "PROBED", 3)
    asked: list[list[int]] = []
    real = module.robustness

    def robustness(predict: Predictor, images: Pixels, labels: Pixels) -> list[Robustness]:
        every, classes = small_splits["test"]
        asked.append([int(np.flatnonzero((every == image).all(axis=(1, 2)))[0]) for image in images])
        assert np.array_equal(labels, classes[asked[-1]])
        return real(predict, images, labels)

    monkeypatch.setattr(module, "robustness", robustness)
    found = evaluate(local_store, "r", left.manifest, left.exported)
    assert asked == [[0, 100, 199]]
    assert {change.images for change in found.robustness} == {3}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_was_altered_after_export_is_refused(local_store: Store, trained: Trained, name: str) -> None:
    left = trained(local_store, "r")
    local_store.delete(f"{staging('r')}/evaluation.json")
    data = bytearray(local_store.read(exported_key("r", name)))
    data[len(data) // 2] ^= 1
    local_store.put(exported_key("r", name), bytes(data))
    with pytest.raises(DataError, match=rf"export/{name}: its sha256 is not the recorded"):
        evaluate(local_store, "r", left.manifest, left.exported)
    assert find_evaluation(local_store, "r") is None


@pytest.mark.parametrize("name", [ONNX, PT2])
def test_a_form_of_another_model_is_refused(
    local_store: Store, trained: Trained, forms: Callable[[LeNet], dict[str, bytes]], name: str
) -> None:
    left = trained(local_store, "r")
    local_store.delete(f"{staging('r')}/evaluation.json")
    other = forms(RECIPES["seed"].build_model(10, 1))[name]
    local_store.put(exported_key("r", name), other)
    exported = Exported(
        candidate_sha256=left.exported.candidate_sha256, forms=left.exported.forms | {name: artifact_of(other)}
    )
    with pytest.raises(DataError, match=f"{name}: its logits differ from those of {SAFETENSORS} by up to"):
        evaluate(local_store, "r", left.manifest, exported)
    assert find_evaluation(local_store, "r") is None


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_forms_that_are_not_one_model_are_refused(difference: float) -> None:
    require_agreement({SAFETENSORS: 0, ONNX: 9e-5})
    with pytest.raises(DataError, match=f"{ONNX}: its logits differ"):
        require_agreement({SAFETENSORS: 0, ONNX: difference})


@pytest.mark.parametrize("differences", [(0.0, np.nan, 0.0), (np.nan, 0.0, 0.0), (0.0, 2e-4, 0.0)])
def test_what_differs_in_one_shard_differs_in_all(differences: tuple[float, ...]) -> None:
    total = ShardVerdict.of_nothing(10)
    for difference in differences:
        shard = ShardVerdict.of_nothing(10)
        shard.differences[ONNX] = difference
        total.add(shard)
    with pytest.raises(DataError, match=f"{ONNX}: its logits differ"):
        require_agreement(total.differences)


def test_logits_are_as_far_apart_as_their_size_says() -> None:
    reference = np.array([[0.5, -0.25], [-1e5, 10], [1, 1]], np.float32)
    found = reference + np.array([[0.01, -0.02], [0.5, 0], [np.nan, 0]], np.float32)
    np.testing.assert_allclose(apart(found, reference), [0.02, 5e-6, np.nan], rtol=1e-5)


def test_a_model_of_huge_logits_is_exported_and_judged_as_any_other(local_store: Store, trained: Trained) -> None:
    """As a learning rate leaves it that is too high, but not so high that the loss is no number."""
    model = RECIPES["seed"].build_model(10, seed=0)
    with torch.no_grad():
        model.fc3.weight.mul_(1e6)
    evaluation = trained(local_store, "r", model=model).evaluation
    assert evaluation.loss > 1e4
    assert 0 < max(check.largest_difference for check in evaluation.forms.values()) < 1e-4


def test_a_stored_model_predicts_as_the_one_in_memory(store: Store, small_splits: "Splits") -> None:
    model = RECIPES["seed"].build_model(10, seed=0)
    data = encode_model(model)
    store.put("candidate", data)
    loaded = load_model(store, "candidate", sha256(data))
    assert not loaded.training
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    images = small_splits["test"][0]
    assert np.array_equal(predictor(loaded)(images), predictor(model)(images))


@pytest.mark.parametrize("position", [0, 20, -1])
def test_altered_weights_are_refused(local_store: Store, position: int) -> None:
    data = encode_model(RECIPES["seed"].build_model(10, seed=0))
    altered = bytearray(data)
    altered[position] ^= 1
    local_store.put("candidate", bytes(altered))
    with pytest.raises(DataError) as raised:
        load_model(local_store, "candidate", sha256(data))
    where = local_store.locate("candidate")
    assert str(raised.value) == f"{where}: its sha256 is not the recorded {sha256(data)[:12]}…; run anew"
