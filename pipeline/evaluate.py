"""Judging a candidate: the weights as they lie in the store, on the test shards, apart from training."""

import logging
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

from lenet.model import LeNet
from lenet.step import predict_step
from pipeline.checkpoint import decode_model
from pipeline.errors import DataError
from pipeline.idx import Pixels
from pipeline.shards import Manifest, read_rows
from pipeline.storage import Store, sha256
from pipeline.train import Training, staging

log = logging.getLogger(__name__)

BATCH = 1000
CONFIDENCE = 0.95
MISTAKES_KEPT = 24

Probabilities = npt.NDArray[np.float64]


class ClassMetrics(BaseModel):
    """How well one class is recognised: ratios 0 to 1; support is its number of test images."""

    model_config = ConfigDict(frozen=True)

    name: str
    precision: float
    recall: float
    f1: float
    support: int


class Mistake(BaseModel):
    """A test image given the wrong class: its row in the split, both classes, and the two probabilities (0 to 1)."""

    model_config = ConfigDict(frozen=True)

    row: int
    label: int
    predicted: int
    probability: float
    label_probability: float


class Evaluation(BaseModel):
    """The verdict on one candidate and one dataset version, both named by digest."""

    model_config = ConfigDict(frozen=True)

    candidate_sha256: str
    dataset_digest: str
    images: int
    correct: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    classes: list[ClassMetrics]
    confusion: list[list[int]]
    mistakes: list[Mistake]
    seconds: float


def find_evaluation(store: Store, run_id: str) -> Evaluation | None:
    """The run's evaluation, or None while there is none."""
    key = f"{staging(run_id)}/evaluation.json"
    return Evaluation.model_validate_json(store.read(key)) if store.exists(key) else None


def evaluate(store: Store, run_id: str, manifest: Manifest, training: Training) -> Evaluation:
    """Load the candidate from the store, predict the whole test split, keep the verdict beside the candidate.

    Raises DataError when the candidate's bytes are not those that training stored.
    """
    if done := find_evaluation(store, run_id):
        return done
    started = time.perf_counter()
    model = load_model(store, training.candidate, training.candidate_sha256)
    images, labels = read_rows(store, manifest, "test")
    verdict = judge(predict(model, images), labels, manifest.classes)
    evaluation = Evaluation(
        candidate_sha256=training.candidate_sha256,
        dataset_digest=manifest.digest,
        seconds=time.perf_counter() - started,
        **verdict,
    )
    log.info(
        "%d of %d test images right: accuracy %.4f, 95%% interval %.4f to %.4f",
        evaluation.correct,
        evaluation.images,
        evaluation.accuracy,
        evaluation.accuracy_low,
        evaluation.accuracy_high,
    )
    receipt = store.keep(f"{staging(run_id)}/evaluation.json", evaluation.model_dump_json(indent=2).encode())
    return Evaluation.model_validate_json(receipt)


def load_model(store: Store, key: str, expected_sha256: str) -> LeNet:
    """The LeNet in a safetensors object, once its sha256 (hex) is what it should be."""
    data = store.read(key)
    if sha256(data) != expected_sha256:
        raise DataError(f"{store.locate(key)}: its sha256 is not the recorded {expected_sha256[:12]}…; run anew")
    try:
        return decode_model(data)
    except DataError as error:
        raise DataError(f"{store.locate(key)}: {error}; run anew") from None


def predict(model: LeNet, images: Pixels) -> Probabilities:
    """Probabilities float64 (N, n_classes) for images uint8 (N, height, width)."""
    batches = torch.split(torch.from_numpy(images), BATCH)
    return torch.cat([predict_step(model, batch) for batch in batches]).numpy()


def judge(probabilities: Probabilities, labels: Pixels, names: tuple[str, ...]) -> dict[str, Any]:
    """All that the probabilities (N, n_classes) say against the labels (N,): the fields of an Evaluation."""
    predicted = probabilities.argmax(axis=1)
    every_class = list(range(len(names)))
    correct = int((predicted == labels).sum())
    interval = binomtest(correct, len(labels)).proportion_ci(CONFIDENCE, method="wilson")
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=every_class, zero_division=0
    )
    return {
        "images": len(labels),
        "correct": correct,
        "accuracy": correct / len(labels),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "loss": log_loss(labels, probabilities, labels=every_class),
        "classes": [
            ClassMetrics(name=name, precision=p, recall=r, f1=f, support=s)
            for name, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)
        ],
        "confusion": confusion_matrix(labels, predicted, labels=every_class).tolist(),
        "mistakes": worst_mistakes(probabilities, labels),
    }


def worst_mistakes(probabilities: Probabilities, labels: Pixels) -> list[Mistake]:
    """The wrong predictions the model was surest of, worst first; ties in row order."""
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:MISTAKES_KEPT]
    return [
        Mistake(
            row=int(row),
            label=int(labels[row]),
            predicted=int(predicted[row]),
            probability=float(probabilities[row, predicted[row]]),
            label_probability=float(probabilities[row, labels[row]]),
        )
        for row in surest
    ]
