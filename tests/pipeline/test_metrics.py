"""Proves that every figure is what its formula, scikit-learn, scipy or torchmetrics says, however it was summed up."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
)
from torchmetrics.functional.classification import multiclass_calibration_error

from pipeline.idx import Pixels
from pipeline.metrics import CALIBRATION_BINS, MISTAKES_KEPT, Logits, Tally, Verdict, mcnemar
from tests.pipeline.conftest import judge

NAMES = ("shirt", "shoe", "bag")
SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**32)


def random_verdicts(seed: int, count: int) -> tuple[Logits, Pixels]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count).astype(np.uint8)
    logits = generator.normal(size=(count, 3)).astype(np.float32)
    logits[np.arange(count), labels] += generator.uniform(0, 2)
    return logits, labels


def wilson(correct: int, total: int) -> tuple[float, float]:
    """E. B. Wilson, 1927: the 95% interval of a proportion."""
    z, share = 1.959963984540054, correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return centre - half, centre + half


@given(seed=SEEDS, count=SIZES)
def test_every_figure_is_what_the_references_say(seed: int, count: int) -> None:
    logits, labels = random_verdicts(seed, count)
    verdict = judge(logits, labels, NAMES)
    p, predicted, every = softmax(logits.astype(np.float64), axis=1), logits.argmax(axis=1), [0, 1, 2]
    assert (verdict.images, verdict.correct) == (count, int((predicted == labels).sum()))
    assert verdict.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert (verdict.accuracy_low, verdict.accuracy_high) == pytest.approx(wilson(verdict.correct, count), abs=1e-9)
    assert verdict.loss == pytest.approx(log_loss(labels, p, labels=every), abs=1e-9)
    truth = np.eye(3)[labels]
    assert verdict.brier == pytest.approx(((p - truth) ** 2).sum(axis=1).mean(), abs=1e-9)
    one_against_rest = [brier_score_loss(truth[:, k], p[:, k], pos_label=1) for k in every]
    assert verdict.brier == pytest.approx(sum(one_against_rest), abs=1e-9)
    place = p.max(axis=1) * CALIBRATION_BINS
    if np.abs(place - place.round()).min() > 1e-5:  # torchmetrics computes in float32: so near two bins, in the other
        expected = multiclass_calibration_error(
            torch.from_numpy(p), torch.from_numpy(labels).long(), num_classes=3, n_bins=CALIBRATION_BINS, norm="l1"
        )
        assert verdict.ece == pytest.approx(float(expected), abs=1e-5)
    assert verdict.confusion == confusion_matrix(labels, predicted, labels=every).tolist()
    figures = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    for found, *of_class in zip(verdict.classes, *figures, strict=True):
        assert (found.precision, found.recall, found.f1, found.support) == pytest.approx(tuple(of_class))


@given(seed=SEEDS, count=SIZES)
def test_intervals_hold_their_figure(seed: int, count: int) -> None:
    logits, labels = random_verdicts(seed, count)
    verdict = judge(logits, labels, NAMES)
    confusion = np.array(verdict.confusion)
    for k, found in enumerate(verdict.classes):
        for name, total in (("recall", confusion[k].sum()), ("precision", confusion[:, k].sum())):
            interval = getattr(found, f"{name}_interval")
            assert (interval.low, interval.high) == pytest.approx(
                wilson(int(confusion[k, k]), int(total)) if total else (0, 1), abs=1e-9
            )
        either = int(confusion[k].sum() + confusion[:, k].sum() - confusion[k, k])
        share = wilson(int(confusion[k, k]), either) if either else (0, 1)
        ends = tuple(2 * end / (1 + end) for end in share)
        assert (found.f1_interval.low, found.f1_interval.high) == pytest.approx(ends, abs=1e-9)
        assert found.f1_interval.low - 1e-9 <= found.f1 <= found.f1_interval.high + 1e-9
    assert all(verdict.model_dump() == judge(logits, labels, NAMES).model_dump() for _ in range(2))


def test_the_interval_of_f1_is_as_wide_as_f1_varies() -> None:
    """Against the spread of F1 over test sets that are drawn anew, 400 times."""
    chances = np.array([[0.25, 0.05, 0.03], [0.08, 0.2, 0.05], [0.02, 0.04, 0.28]])
    generator = np.random.default_rng(1)

    def drawn() -> tuple[Logits, Pixels]:
        cells = generator.choice(9, size=500, p=chances.ravel())
        return np.eye(3, dtype=np.float32)[cells % 3] * 3, (cells // 3).astype(np.uint8)

    true = 2 * 0.2 / (chances[1].sum() + chances[:, 1].sum())
    intervals = [judge(*drawn(), NAMES).classes[1].f1_interval for _ in range(400)]
    covered = sum(interval.low <= true <= interval.high for interval in intervals) / 400
    assert 0.91 < covered < 0.985


def test_where_there_are_few_images_the_interval_of_f1_is_wide() -> None:
    labels = np.array([0] * 3 + [1] * 3, np.uint8)
    all_right = judge(np.eye(3, dtype=np.float32)[labels], labels, NAMES)
    assert [found.f1 for found in all_right.classes] == [1, 1, 0]
    assert all(found.f1_interval.low < 0.62 and found.f1_interval.high == 1 for found in all_right.classes[:2])
    assert all_right.classes[2].f1_interval.model_dump() == {"low": 0, "high": 1}  # there is none of it to know by


@given(seed=SEEDS, count=SIZES, data=st.data())
def test_parts_add_up_to_the_whole(seed: int, count: int, data: st.DataObject) -> None:
    logits, labels = random_verdicts(seed, count)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    total = Tally(3)
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        part = Tally(3)
        part.add(logits[start:stop], labels[start:stop], start)
        total.merge(part)
    whole, parts = judge(logits, labels, NAMES).model_dump(), total.verdict(NAMES).model_dump()
    floats = {"loss", "brier", "ece", "calibration"}
    assert {k: v for k, v in parts.items() if k not in floats} == {k: v for k, v in whole.items() if k not in floats}
    for name in ("loss", "brier", "ece"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-9)
    for one, other in zip(parts["calibration"], whole["calibration"], strict=True):
        assert one == pytest.approx(other, abs=1e-9)


@given(seed=SEEDS, count=SIZES)
def test_the_mistakes_kept_are_the_surest_of_all(seed: int, count: int) -> None:
    logits, labels = random_verdicts(seed, count)
    p = softmax(logits.astype(np.float64), axis=1)
    found = judge(logits, labels, NAMES).mistakes
    wrong = [row for row in range(count) if p[row].argmax() != labels[row]]
    surest = sorted(wrong, key=lambda row: (-p[row].max(), row))[:MISTAKES_KEPT]
    assert [mistake.row for mistake in found] == surest
    for mistake in found:
        expected = (p[mistake.row].max(), p[mistake.row, mistake.label])
        assert (mistake.probability, mistake.label_probability) == pytest.approx(expected)
        assert (mistake.label, mistake.predicted) == (labels[mistake.row], p[mistake.row].argmax())


def test_of_equal_mistakes_the_first_rows_are_kept() -> None:
    logits = np.tile(np.array([0, 2, 0], np.float32), (500, 1))
    logits[::3] = [0, 4, 0]
    found = judge(logits, np.zeros(500, np.uint8), NAMES).mistakes
    assert [mistake.row for mistake in found] == [3 * place for place in range(MISTAKES_KEPT)]


def test_top_confusions_are_the_largest_off_the_diagonal() -> None:
    labels = np.array([0] * 5 + [1] * 4 + [2] * 3, np.uint8)
    predicted = np.array([1, 1, 0, 0, 2, 0, 0, 1, 1, 2, 2, 1])
    found = judge(np.eye(3, dtype=np.float32)[predicted], labels, NAMES).confusions
    assert [(c.label, c.predicted, c.images) for c in found] == [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 1)]


def test_bins_hold_every_image_once_with_its_confidence() -> None:
    logits, labels = random_verdicts(3, 1000)
    verdict = judge(logits, labels, NAMES)
    confidence = softmax(logits.astype(np.float64), axis=1).max(axis=1)
    assert sum(one.images for one in verdict.calibration) == 1000
    for one in verdict.calibration:
        inside = (confidence > one.low) & (confidence <= one.high)
        assert one.images == inside.sum()
        if one.images:
            assert one.confidence == pytest.approx(confidence[inside].mean())
            assert one.accuracy == pytest.approx((logits.argmax(axis=1) == labels)[inside].mean())


@pytest.mark.parametrize("n_classes", [3, 5, 15])
def test_a_confidence_between_two_bins_is_in_the_lower(n_classes: int) -> None:
    verdict = judge(np.zeros((1, n_classes), np.float32), np.zeros(1, np.uint8), ("class",) * n_classes)
    [filled] = [one for one in verdict.calibration if one.images]
    assert filled.confidence == filled.high == 1 / n_classes


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_is_always_right_or_wrong(right: bool) -> None:
    labels = np.zeros(50, np.uint8)
    logits = np.tile(np.array([50, 0, 0] if right else [0, 50, 0], np.float32), (50, 1))
    verdict = judge(logits, labels, NAMES)
    assert verdict.accuracy == right
    assert (verdict.accuracy_low, verdict.accuracy_high) == pytest.approx(wilson(50 * right, 50))
    assert verdict.ece == pytest.approx(0 if right else 1, abs=1e-12)
    assert verdict.brier == pytest.approx(0 if right else 2, abs=1e-12)
    assert len(verdict.mistakes) == (0 if right else MISTAKES_KEPT)
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_no_images_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="no image was counted"):
        Tally(3).verdict(NAMES)


@given(one=st.integers(0, 300), other=st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test(one: int, other: int) -> None:
    expected = binomtest(min(one, other), one + other, 0.5).pvalue if one + other else 1.0
    assert mcnemar(one, other) == mcnemar(other, one) == pytest.approx(expected)
    if 0 < one + other < 40:
        tail = sum(math.comb(one + other, k) for k in range(min(one, other) + 1)) / 2 ** (one + other)
        assert mcnemar(one, other) == pytest.approx(min(1, 2 * tail))
