"""Judging a candidate: every form of it, as it lies in the store, on every test shard, apart from training.

    staging/<run id>/export/<form>                 the forms, by `export`
    staging/<run id>/predictions/<shard>.parquet   what was predicted of every test image, with the logits
    staging/<run id>/evaluation.json               the verdict, written last

Shards are judged one by one, and what they gave is summed: memory does not grow with the test split.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from lenet.model import LeNet
from pipeline.artifacts import (
    FORMS,
    ONNX,
    PT2,
    SAFETENSORS,
    Artifact,
    artifact_of,
    encode_onnx,
    encode_pt2,
    open_form,
    read_checked,
)
from pipeline.checkpoint import decode_model
from pipeline.documents import find_document, keep_document
from pipeline.errors import DataError
from pipeline.metrics import Logits, Predictor, Tally, Verdict
from pipeline.predictions import decode_predictions, digest_of_rows, encode_predictions, sum_of_rows
from pipeline.probe import Robustness, Speed, robustness, speed
from pipeline.shards import Manifest, pick_rows, read_shard
from pipeline.storage import Store
from pipeline.train import Training, staging

log = logging.getLogger(__name__)

# How far the logits of two forms of one model may be `apart`: float32 sums in another order are by 4e-6 here.
TOLERANCE = 1e-4
PROBED = 10_000  # test images for robustness
ON_RAY_FROM = 500_000  # test images; below, starting Ray takes longer than judging them

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class Exported(BaseModel):
    """The receipt of an export: the forms under staging/<run id>/export/."""

    model_config = ConfigDict(frozen=True)

    candidate_sha256: str
    forms: dict[str, Artifact]


class FormCheck(Artifact):
    """One form as it was opened from the store: how far its logits are `apart` from those of model.safetensors at
    most, of any test image, and how many test images it recognises."""

    model_config = ConfigDict(frozen=True)

    largest_difference: float
    correct: int


class Evaluation(Verdict):
    """The verdict on one candidate and one dataset version, both named by digest."""

    model_config = ConfigDict(frozen=True)

    candidate_sha256: str
    dataset_digest: str
    test_digest: str
    forms: dict[str, FormCheck]
    predictions: dict[str, Artifact]
    robustness: list[Robustness]
    speed: list[Speed]
    seconds: float


def export(store: Store, run_id: str, manifest: Manifest, training: Training) -> Exported:
    """Write the candidate in every form that is published, beside the candidate.

    Raises DataError when the candidate's bytes are not those that training stored.
    """
    if done := find_export(store, run_id):
        return done
    started = time.perf_counter()
    model = load_model(store, training.candidate, training.candidate_sha256)
    side = manifest.image_shape[0]
    forms = {
        SAFETENSORS: store.read(training.candidate),
        ONNX: encode_onnx(model, side),
        PT2: encode_pt2(model, side),
    }
    kept = {name: store.keep(exported_key(run_id, name), data) for name, data in forms.items()}
    exported = Exported(
        candidate_sha256=training.candidate_sha256, forms={name: artifact_of(data) for name, data in kept.items()}
    )
    log.info("%s written in %.1f s", ", ".join(FORMS), time.perf_counter() - started)
    return keep_document(store, f"{staging(run_id)}/export.json", exported)


def find_export(store: Store, run_id: str) -> Exported | None:
    """The receipt of the run's export, or None while there is none."""
    key = f"{staging(run_id)}/export.json"
    return find_document(store, key, Exported)


def exported_key(run_id: str, name: str) -> str:
    """Key of one form of a run's candidate."""
    return f"{staging(run_id)}/export/{name}"


def find_evaluation(store: Store, run_id: str) -> Evaluation | None:
    """The run's evaluation, or None while there is none."""
    key = f"{staging(run_id)}/evaluation.json"
    return find_document(store, key, Evaluation)


def evaluate(
    store: Store, run_id: str, manifest: Manifest, exported: Exported, on_ray: Mapper | None = None
) -> Evaluation:
    """Predict the whole test split with every form of the candidate, and keep predictions and verdict beside it.

    `on_ray` maps a function over tasks, for a large split. Raises DataError when a form is not what was exported, or
    does not agree with model.safetensors.
    """
    if done := find_evaluation(store, run_id):
        return done
    started = time.perf_counter()
    judge = JudgeShard(store, manifest, {exported_key(run_id, name): form for name, form in exported.forms.items()})
    mapper: Mapper = on_ray if on_ray is not None and manifest.rows("test") >= ON_RAY_FROM else map
    total = ShardVerdict.of_nothing(len(manifest.classes))
    predictions = {}
    for number, part in enumerate(mapper(judge, range(len(manifest.splits["test"])))):
        name = f"predictions/{number:05d}.parquet"
        data = store.keep(f"{staging(run_id)}/{name}", part.predictions)
        predictions[name] = artifact_of(data)
        # An earlier attempt's, perhaps by another kind of CPU: its figures are what counts.
        if data != part.predictions:
            kept = decode_predictions(data)
            part.tally = Tally(len(manifest.classes))
            part.tally.add(kept.logits, kept.labels, kept.first_row)
        total.add(part)
    verdict = total.tally.verdict(manifest.classes)
    require_agreement(total.differences)
    checks = {
        name: FormCheck(**form.model_dump(), largest_difference=total.differences[name], correct=total.correct[name])
        for name, form in exported.forms.items()
    }
    images, labels = pick_rows(store, manifest, "test", _probed(manifest.rows("test")))
    evaluation = Evaluation(
        **verdict.model_dump(),
        candidate_sha256=exported.candidate_sha256,
        dataset_digest=manifest.digest,
        test_digest=digest_of_rows(total.rows_digest, manifest),
        forms=checks,
        predictions=predictions,
        robustness=robustness(judge.forms[ONNX], images, labels),  # the same model, and the fastest
        speed=speed(judge.forms[SAFETENSORS], images[:1]),
        seconds=time.perf_counter() - started,
    )
    log.info(
        "%d of %d test images right: accuracy %.4f, 95%% interval %.4f to %.4f; %d forms agree",
        evaluation.correct,
        evaluation.images,
        evaluation.accuracy,
        evaluation.accuracy_low,
        evaluation.accuracy_high,
        len(checks),
    )
    return keep_document(store, f"{staging(run_id)}/evaluation.json", evaluation)


def _probed(rows: int) -> list[int]:
    """Which of so many test rows are changed, from first to last: of data of one's own, they are sorted by class."""
    found: list[int] = np.linspace(0, rows - 1, min(PROBED, rows)).round().astype(int).tolist()
    return found


@dataclass
class ShardVerdict:
    """What one test shard gave, or several together; `predictions` is the Parquet file of one."""

    tally: Tally
    differences: dict[str, float]
    correct: dict[str, int]
    rows_digest: int
    predictions: bytes = b""

    @classmethod
    def of_nothing(cls, n_classes: int) -> "ShardVerdict":
        """What no shard gives."""
        return cls(Tally(n_classes), dict.fromkeys(FORMS, 0.0), dict.fromkeys(FORMS, 0), 0)

    def add(self, later: "ShardVerdict") -> None:
        """Take in the shard after those that are in."""
        self.tally.merge(later.tally)
        for name in FORMS:
            # Unlike Python's, this maximum of a number and of what is none is none.
            self.differences[name] = float(np.maximum(self.differences[name], later.differences[name]))
            self.correct[name] += later.correct[name]
        self.rows_digest = (self.rows_digest + later.rows_digest) % 2**256


class JudgeShard:
    """Judges one test shard by its number; opens the forms, by key and what they have to be, when it first does so."""

    def __init__(self, store: Store, manifest: Manifest, keys: dict[str, Artifact]) -> None:
        self.store, self.manifest, self.keys = store, manifest, keys

    @cached_property
    def forms(self) -> dict[str, Predictor]:
        """The opened forms. Raises DataError for one that is missing, altered or not a model."""
        return {key.rpartition("/")[2]: _open(self.store, key, form) for key, form in self.keys.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "forms"}

    def __call__(self, number: int) -> ShardVerdict:
        images, labels = read_shard(self.store, self.manifest, "test", number)
        first_row = sum(shard.rows for shard in self.manifest.splits["test"][:number])
        logits = {name: predict(images) for name, predict in self.forms.items()}
        reference = logits[SAFETENSORS]
        tally = Tally(len(self.manifest.classes))
        tally.add(reference, labels, first_row)
        return ShardVerdict(
            tally=tally,
            differences={name: float(apart(found, reference).max()) for name, found in logits.items()},
            correct={name: int((found.argmax(axis=1) == labels).sum()) for name, found in logits.items()},
            rows_digest=sum_of_rows(images, labels, first_row),
            predictions=encode_predictions(reference, labels, first_row),
        )


def apart(found: Logits, reference: Logits) -> Logits:
    """The largest difference of logits (n, n_classes) for each image, (n,); as part of the largest logit, where that is
    above 1: rounding errors grow with it."""
    difference: Logits = np.abs(found - reference).max(axis=1) / np.maximum(np.abs(reference).max(axis=1), 1)
    return difference


def require_agreement(differences: dict[str, float]) -> None:
    """DataError unless all forms are one model: logits no further `apart` than TOLERANCE. Where a model holds two
    classes for as likely to 4 digits, its forms may still decide for one each."""
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # not a number is not agreement either
            raise DataError(
                f"{name}: its logits differ from those of {SAFETENSORS} by up to {difference:.2g}, "
                f"more than {TOLERANCE:g}; it is another model, export it anew, or so near to diverging that rounding "
                "decides, train it with a lower lr"
            )


def load_model(store: Store, key: str, expected_sha256: str) -> LeNet:
    """The LeNet in a safetensors object, once its sha256 (hex) is what it should be."""
    data = store.read(key)
    if artifact_of(data).sha256 != expected_sha256:
        raise DataError(f"{store.locate(key)}: its sha256 is not the recorded {expected_sha256[:12]}…; run anew")
    try:
        return decode_model(data)
    except DataError as error:
        raise DataError(f"{store.locate(key)}: {error}; run anew") from None


def _open(store: Store, key: str, form: Artifact) -> Predictor:
    data = read_checked(store, key, form)
    try:
        return open_form(key.rpartition("/")[2], data)
    except DataError as error:
        raise DataError(f"{store.locate(key)}: {error}; export it anew") from None
