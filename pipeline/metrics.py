"""What predictions say of a model, in figures that sum up over parts of a test split: memory does not grow with it.

SciPy takes 0.7 s to import, which only who judges should wait for.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from pipeline.idx import Pixels

Logits = npt.NDArray[np.float32]
# Images uint8 (N, H, W) to logits float32 (N, n_classes).
Predictor = Callable[[Pixels], Logits]

CONFIDENCE = 0.95
CALIBRATION_BINS = 15
MISTAKES_KEPT = 24
CONFUSIONS_KEPT = 10


class Interval(BaseModel):
    """95% interval of a ratio, 0 to 1."""

    model_config = ConfigDict(frozen=True)

    low: float
    high: float


class ClassMetrics(BaseModel):
    """How well one class is recognised: ratios 0 to 1 with their intervals; support is its number of test images."""

    model_config = ConfigDict(frozen=True)

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    precision_interval: Interval
    recall_interval: Interval
    f1_interval: Interval


class CalibrationBin(BaseModel):
    """The images whose highest probability is above `low` and at most `high`: its mean, and the share that is right."""

    model_config = ConfigDict(frozen=True)

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


class Mistake(BaseModel):
    """A test image given the wrong class: its row in the split, both classes, and the two probabilities (0 to 1)."""

    model_config = ConfigDict(frozen=True)

    row: int
    label: int
    predicted: int
    probability: float
    label_probability: float


class Confusion(BaseModel):
    """How many images of one class are taken for another."""

    model_config = ConfigDict(frozen=True)

    label: int
    predicted: int
    images: int


class Verdict(BaseModel):
    """All that a model's predictions of a test split say of it.

    Accuracy with its Wilson interval; loss is the mean negative log likelihood, in nats per image; Brier score, 0 to 2;
    ECE, the expected calibration error (0 to 1), over 15 bins of equal width.
    """

    model_config = ConfigDict(frozen=True)

    images: int
    correct: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    brier: float
    ece: float
    calibration: list[CalibrationBin]
    classes: list[ClassMetrics]
    confusion: list[list[int]]
    confusions: list[Confusion]
    mistakes: list[Mistake]


class Tally:
    """Sums over images, and the worst mistakes among them."""

    def __init__(self, n_classes: int) -> None:
        self.confusion = np.zeros((n_classes, n_classes), np.int64)  # by label and predicted
        self.loss = self.brier = 0.0
        self.bins = np.zeros((3, CALIBRATION_BINS))  # images, sum of confidences, images that are right
        self.mistakes: list[Mistake] = []

    def add(self, logits: Logits, labels: Pixels, first_row: int) -> None:
        """Take in logits (n, n_classes) and labels (n,) of the rows from `first_row` on."""
        from scipy.special import log_softmax

        log_p = log_softmax(logits.astype(np.float64), axis=1)
        p = np.exp(log_p)
        n_classes, rows, predicted = logits.shape[1], np.arange(len(labels)), logits.argmax(axis=1)
        pairs = np.bincount(labels.astype(np.int64) * n_classes + predicted, minlength=n_classes**2)
        self.confusion += pairs.reshape(n_classes, n_classes)
        self.loss -= float(log_p[rows, labels].sum())
        self.brier += float(np.square(p).sum() + (1 - 2 * p[rows, labels]).sum())
        confidence, right = p[rows, predicted], predicted == labels
        edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
        place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, CALIBRATION_BINS - 1)
        for line, weights in zip(self.bins, (None, confidence, right.astype(np.float64)), strict=True):
            line += np.bincount(place, weights, CALIBRATION_BINS)
        wrong = np.flatnonzero(~right)
        surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES_KEPT]
        self._keep_worst(
            [
                Mistake(
                    row=first_row + int(row),
                    label=int(labels[row]),
                    predicted=int(predicted[row]),
                    probability=float(confidence[row]),
                    label_probability=float(p[row, labels[row]]),
                )
                for row in surest
            ]
        )

    def merge(self, other: "Tally") -> None:
        """Take in what was counted elsewhere."""
        self.confusion += other.confusion
        self.loss += other.loss
        self.brier += other.brier
        self.bins += other.bins
        self._keep_worst(other.mistakes)

    def _keep_worst(self, more: list[Mistake]) -> None:
        worst = sorted([*self.mistakes, *more], key=lambda mistake: (-mistake.probability, mistake.row))
        self.mistakes = worst[:MISTAKES_KEPT]

    def verdict(self, names: tuple[str, ...]) -> Verdict:
        """The figures, with the classes' names. ValueError when no image was counted."""
        images, correct = int(self.confusion.sum()), int(self.confusion.trace())
        if not images:
            raise ValueError("no image was counted")
        accuracy = wilson(correct, images)
        counts, confidences, right = self.bins
        filled = np.maximum(counts, 1)
        return Verdict(
            images=images,
            correct=correct,
            accuracy=correct / images,
            accuracy_low=accuracy.low,
            accuracy_high=accuracy.high,
            loss=self.loss / images,
            brier=self.brier / images,
            ece=float(np.abs(confidences - right).sum() / images),
            calibration=[
                CalibrationBin(
                    low=number / CALIBRATION_BINS,
                    high=(number + 1) / CALIBRATION_BINS,
                    images=int(counts[number]),
                    confidence=confidences[number] / filled[number],
                    accuracy=right[number] / filled[number],
                )
                for number in range(CALIBRATION_BINS)
            ],
            classes=_classes(self.confusion, names),
            confusion=self.confusion.tolist(),
            confusions=_confusions(self.confusion),
            mistakes=self.mistakes,
        )


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test, from how many images only one of two models gets right."""
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def wilson(hits: int, total: int) -> Interval:
    """The interval of Wilson's score of so many hits."""
    from scipy.stats import binomtest

    if not total:
        return Interval(low=0, high=1)
    interval = binomtest(hits, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(low=interval.low, high=interval.high)


def _f1_interval(hits: int, either: int) -> Interval:
    """The interval of F1, from how many images are of a class, taken for it, or both, and of how many it is both: F1
    grows with the share of these, the Jaccard index, and so do the ends of its interval."""
    jaccard = wilson(hits, either)
    return Interval(low=2 * jaccard.low / (1 + jaccard.low), high=2 * jaccard.high / (1 + jaccard.high))


def _classes(confusion: npt.NDArray[np.int64], names: tuple[str, ...]) -> list[ClassMetrics]:
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return [
        ClassMetrics(
            name=name,
            precision=hits[k] / max(1, predicted[k]),
            recall=hits[k] / max(1, support[k]),
            f1=2 * hits[k] / max(1, support[k] + predicted[k]),
            support=support[k],
            precision_interval=wilson(int(hits[k]), int(predicted[k])),
            recall_interval=wilson(int(hits[k]), int(support[k])),
            f1_interval=_f1_interval(int(hits[k]), int(support[k] + predicted[k] - hits[k])),
        )
        for k, name in enumerate(names)
    ]


def _confusions(confusion: npt.NDArray[np.int64]) -> list[Confusion]:
    found = [
        Confusion(label=int(label), predicted=int(predicted), images=int(confusion[label, predicted]))
        for label, predicted in np.argwhere(confusion)
        if label != predicted
    ]
    return sorted(found, key=lambda pair: -pair.images)[:CONFUSIONS_KEPT]
