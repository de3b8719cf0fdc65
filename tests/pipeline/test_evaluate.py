"""Proves that the verdict on a model is what the textbook formulas say, and is only ever passed on the right bytes."""

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lenet.recipe import RECIPES
from pipeline.checkpoint import encode_model
from pipeline.errors import DataError
from pipeline.evaluate import MISTAKES_KEPT, Probabilities, judge, load_model, predict, worst_mistakes
from pipeline.idx import Pixels
from pipeline.storage import Store, sha256

if TYPE_CHECKING:
    from tests.conftest import Splits

NAMES = ("shirt", "shoe", "bag")


def random_verdicts(seed: int, count: int) -> tuple[Probabilities, Pixels]:
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.ones(3), size=count), generator.integers(0, 3, count).astype(np.uint8)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """E. B. Wilson, 1927: the 95% interval of a proportion."""
    z, share = 1.959963984540054, correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return centre - half, centre + half


@given(seed=st.integers(0, 2**32), count=st.integers(1, 60))
def test_every_figure_is_what_its_formula_says(seed: int, count: int) -> None:
    probabilities, labels = random_verdicts(seed, count)
    verdict = judge(probabilities, labels, NAMES)
    predicted = [max(range(3), key=row.__getitem__) for row in probabilities.tolist()]
    pairs = list(zip(labels.tolist(), predicted, strict=True))
    hits = [sum(pair == (k, k) for pair in pairs) for k in range(3)]

    assert verdict["images"] == count
    assert verdict["correct"] == sum(hits)
    assert verdict["accuracy"] == pytest.approx(sum(hits) / count)
    assert (verdict["accuracy_low"], verdict["accuracy_high"]) == pytest.approx(wilson(sum(hits), count), abs=1e-9)
    losses = [-math.log(probabilities[row, label]) for row, label in enumerate(labels)]
    assert verdict["loss"] == pytest.approx(sum(losses) / count)
    assert verdict["confusion"] == [[pairs.count((label, guess)) for guess in range(3)] for label in range(3)]
    for k, found in enumerate(verdict["classes"]):
        precision = hits[k] / max(1, predicted.count(k))
        recall = hits[k] / max(1, labels.tolist().count(k))
        f1 = 2 * precision * recall / (precision + recall) if hits[k] else 0
        assert (found.name, found.support) == (NAMES[k], labels.tolist().count(k))
        assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1))


@pytest.mark.parametrize("right", [True, False])
def test_the_interval_holds_at_its_ends(right: bool) -> None:
    labels = np.zeros(50, np.uint8)
    probabilities = np.tile([0.8, 0.1, 0.1] if right else [0.1, 0.8, 0.1], (50, 1))
    verdict = judge(probabilities, labels, NAMES)
    assert verdict["accuracy"] == right
    assert (verdict["accuracy_low"], verdict["accuracy_high"]) == pytest.approx(wilson(50 * right, 50))


def test_the_worst_mistakes_come_first_and_ties_by_row() -> None:
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9], [0.9, 0.1], [0.2, 0.8], [0.1, 0.9]])
    labels = np.array([1, 0, 0, 0, 0], np.uint8)
    found = worst_mistakes(probabilities, labels)
    assert [(m.row, m.label, m.predicted, m.probability, m.label_probability) for m in found] == [
        (1, 0, 1, 0.9, 0.1),
        (4, 0, 1, 0.9, 0.1),
        (3, 0, 1, 0.8, 0.2),
        (0, 1, 0, 0.6, 0.4),
    ]


def test_of_equal_mistakes_the_first_rows_are_kept() -> None:
    probabilities = np.tile([0.2, 0.7, 0.1], (500, 1))
    probabilities[::3] = [0.05, 0.9, 0.05]
    found = worst_mistakes(probabilities, np.zeros(500, np.uint8))
    assert [mistake.row for mistake in found] == [3 * place for place in range(MISTAKES_KEPT)]


@given(seed=st.integers(0, 2**32), count=st.integers(1, 200))
def test_the_mistakes_kept_are_the_surest_of_all(seed: int, count: int) -> None:
    probabilities, labels = random_verdicts(seed, count)
    found = worst_mistakes(probabilities, labels)
    wrong = [row for row in range(count) if probabilities[row].argmax() != labels[row]]
    assert len(found) == min(len(wrong), MISTAKES_KEPT)
    surest = sorted(wrong, key=lambda row: -probabilities[row].max())
    assert [mistake.row for mistake in found] == surest[: len(found)]


def test_predictions_do_not_depend_on_the_batches(small_splits: "Splits", monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = RECIPES["seed"].build_model(10, seed=0), small_splits["test"][0]
    whole = predict(model, images)
    monkeypatch.setattr("pipeline.evaluate.BATCH", 7)
    np.testing.assert_allclose(predict(model, images), whole, rtol=1e-5)
    assert whole.shape == (200, 10)
    assert whole.dtype == np.float64


def test_a_stored_model_predicts_as_the_one_in_memory(store: Store, small_splits: "Splits") -> None:
    model = RECIPES["seed"].build_model(10, seed=0)
    data = encode_model(model)
    store.put("candidate", data)
    loaded = load_model(store, "candidate", sha256(data))
    assert not loaded.training
    images = small_splits["test"][0]
    assert np.array_equal(predict(loaded, images), predict(model, images))


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


def test_a_model_that_knows_the_answers_is_judged_perfect(small_splits: "Splits") -> None:
    labels = small_splits["test"][1]
    sure = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 10).double().numpy()
    verdict = judge(sure, labels, tuple("abcdefghij"))
    assert (verdict["accuracy"], verdict["mistakes"]) == (1, [])
    assert verdict["loss"] == pytest.approx(0, abs=1e-12)
    assert all(found.f1 == 1 for found in verdict["classes"])
