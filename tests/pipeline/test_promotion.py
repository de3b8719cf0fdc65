"""Proves that a model becomes the champion only if it is better by more than chance and worse in nothing guarded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics import Interval, Verdict
from pipeline.promotion import Comparison, PromoteConfig, compare, first, incomparable, render_decision, shown_p
from tests.pipeline.conftest import judge

NAMES = ("shirt", "shoe", "bag")
LABELS = np.repeat(np.arange(3, dtype=np.uint8), 400)


def verdict(wrong: int, of: int | None = None, certainty: float = 4.0) -> Verdict:
    """Of a model that gets the first `wrong` images wrong, of all classes in turn or of one."""
    logits = np.zeros((1200, 3), np.float32)
    logits[np.arange(1200), LABELS] = certainty
    rows = np.flatnonzero(of == LABELS)[:wrong] if of is not None else np.arange(1200).reshape(3, -1).T.ravel()[:wrong]
    logits[rows, LABELS[rows]] = 0
    logits[rows, (LABELS[rows] + 1) % 3] = certainty
    return judge(logits, LABELS, NAMES)


def test_the_first_is_promoted() -> None:
    assert first(PromoteConfig()) == Comparison(promoted=True, reasons=["there was no champion before"])
    assert not first(PromoteConfig(promote=False)).promoted


def test_what_is_asked_of_a_gain_and_guarded_if_nothing_is_said() -> None:
    assert PromoteConfig().model_dump() == {
        "model": "lenet", "promote": True, "min_gain": 0, "max_p": 0.05, "max_f1_drop": 0.05, "max_ece_rise": 0.05
    }  # fmt: skip


def test_a_plain_gain_is_promoted_with_its_figures() -> None:
    found = compare(PromoteConfig(), "lenet version 1 (r)", verdict(100), verdict(60), 10, 50)
    assert found.promoted
    assert (found.champion, found.only_champion, found.only_candidate) == ("lenet version 1 (r)", 10, 50)
    assert found.gain == pytest.approx(40 / 1200)
    assert found.champion_accuracy == pytest.approx(1100 / 1200)
    assert found.p is not None
    assert found.p < 1e-6
    assert found.reasons == [f"it recognises 40 images more, p = {found.p:.2g}"]


@pytest.mark.parametrize(
    ("p", "shown"),
    [(1.0, "p = 1"), (0.0456, "p = 0.046"), (1e-12, "p = 1e-12"), (9e-13, "p < 1e-12"), (0.0, "p < 1e-12")],
)
def test_a_p_is_never_shown_as_0(p: float, shown: str) -> None:
    assert shown_p(p) == shown


def test_a_gain_whose_exact_test_is_rounded_to_0_is_no_certainty() -> None:
    found = compare(PromoteConfig(), "champion", verdict(1200), verdict(0), 0, 1200)
    assert found.p == 0
    assert found.reasons == ["it recognises 1200 images more, p < 1e-12"]
    assert "1200 images are right in this one alone, 0 in the champion alone, p < 1e-12." in render_decision("m", found)


@pytest.mark.parametrize(
    ("old", "new", "alone", "config", "reason"),
    [
        (verdict(60), verdict(60), (20, 20), {}, "it recognises as many images as the champion"),
        (verdict(60), verdict(65), (25, 20), {}, "it recognises 5 images fewer than the champion"),
        (verdict(60), verdict(54), (20, 26), {}, "such a gain comes by chance with p = 0.461, and max_p is 0.05"),
        (verdict(60), verdict(50), (2, 12), {"max_p": 1e-4}, "such a gain comes by chance with p = 0.0129, and max_p"),
        (verdict(60), verdict(20), (0, 40), {"max_p": 1e-13}, "such a gain comes by chance with p = 1.82e-12, and"),
        (
            verdict(4),
            verdict(2),
            (0, 2),
            {},
            "such a gain comes by chance with p = 0.5, and max_p is 0.05, which no model",
        ),
        (verdict(100), verdict(60), (10, 50), {"min_gain": 0.04}, "it gains 0.0333 and min_gain is 0.04"),
        (verdict(100), verdict(60), (10, 50), {"promote": False}, "promote is off for this run"),
        (verdict(100), verdict(80, of=1), (60, 80), {"max_p": 1}, "F1 of shoe falls from 0.91"),
        (verdict(100), verdict(60, certainty=0.5), (10, 50), {}, "the calibration error rises from"),
    ],
)
def test_what_is_refused_says_why(
    old: Verdict, new: Verdict, alone: tuple[int, int], config: dict[str, float], reason: str
) -> None:
    found = compare(PromoteConfig.model_validate({"max_f1_drop": 0.02, **config}), "champion", old, new, *alone)
    assert not found.promoted
    assert any(said.startswith(reason) for said in found.reasons), found.reasons
    assert reason.split(",")[0] in render_decision("lenet", found)


def test_a_class_that_falls_by_no_more_than_chance_is_no_reason() -> None:
    old, new = verdict(100), verdict(60)
    few = old.classes[0].model_copy(update={"f1": 0.8})
    fallen = {"f1": 0.7, "f1_interval": Interval(low=0.5, high=0.85)}  # of a class of some twenty images
    for high, promoted in ((0.85, True), (0.79, False)):
        fallen["f1_interval"] = Interval(low=0.5, high=high)
        one = new.model_copy(update={"classes": [new.classes[0].model_copy(update=fallen), *new.classes[1:]]})
        other = old.model_copy(update={"classes": [few, *old.classes[1:]]})
        assert compare(PromoteConfig(), "champion", other, one, 10, 50).promoted == promoted


@given(only_champion=st.integers(0, 200), only_candidate=st.integers(0, 200))
def test_a_model_that_is_not_better_is_never_promoted(only_champion: int, only_candidate: int) -> None:
    same = verdict(60)
    found = compare(PromoteConfig(max_p=1), "champion", same, same, only_champion, only_candidate)
    assert found.promoted == (only_candidate > only_champion)
    assert found.reasons


def test_what_cannot_be_compared_is_refused() -> None:
    found = incomparable("lenet version 1 (r)", "the champion was judged by other test images")
    assert (found.promoted, found.gain) == (False, None)
    assert "promote it by hand" in found.reasons[0]
