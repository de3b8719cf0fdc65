"""The runs in a store: what state each is in, and how two of them differ."""

from collections import defaultdict
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.checkpoint import EpochMetrics
from pipeline.errors import DataError
from pipeline.progress import ENDED, PROGRESS
from pipeline.publish import find_run, run_folder
from pipeline.report import Report
from pipeline.run import RunRecord
from pipeline.storage import Store

State = Literal["begun", "training", "ended", "trained", "evaluated", "published"]


class RunSummary(BaseModel):
    """One run: how far it has come, and how good it is.

    `state` is ended when training stopped before its last epoch. Accuracies are 0 to 1: of the last epoch on the
    split it looks at, and, of a published run, on the test split.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    state: State
    dataset: str
    recipe: str
    epochs_done: int
    epochs: int
    held_out_accuracy: float | None
    accuracy: float | None
    finished: datetime | None


class Difference(BaseModel):
    """One thing in which two runs differ, by what each has."""

    model_config = ConfigDict(frozen=True)

    what: str
    first: Any
    second: Any


def list_runs(store: Store) -> list[RunSummary]:
    """All runs ever begun in the store, by name."""
    keys: dict[str, list[str]] = defaultdict(list)
    for key in store.keys("staging"):
        _, run_id, rest = key.split("/", 2)
        keys[run_id].append(rest)
    return [_summary(store, run_id, set(found)) for run_id, found in sorted(keys.items()) if "run.json" in found]


def compare_runs(store: Store, first: str, second: str) -> list[Difference]:
    """All in which two published runs differ: parameters, versions, data, then results. DataError for one that is
    not published."""
    one, other = read_report(store, first), read_report(store, second)
    return [
        Difference(what=what, first=value, second=theirs)
        for (what, value), (_, theirs) in zip(_facts(one, other), _facts(other, one), strict=True)
        if value != theirs
    ]


def read_report(store: Store, run_id: str) -> Report:
    """The report of a published run."""
    if find_run(store, run_id) is None:
        raise DataError(f"{store.locate(run_folder(run_id))}: no published run; lenet runs lists them")
    return Report.model_validate_json(store.read(f"{run_folder(run_id)}/report.json"))


def _summary(store: Store, run_id: str, found: set[str]) -> RunSummary:
    folder = f"staging/{run_id}"
    parameters = RunRecord.model_validate_json(store.read(f"{folder}/run.json")).parameters
    epochs = sorted(name for name in found if name.startswith(f"{PROGRESS}/"))
    last = EpochMetrics.model_validate_json(store.read(f"{folder}/{epochs[-1]}")) if epochs else None
    published = find_run(store, run_id)
    state: State = "begun"
    for name, reached in ((PROGRESS, "training"), (ENDED, "ended"), ("training.json", "trained"),
                          ("evaluation.json", "evaluated")):  # fmt: skip
        if name in found or (name == PROGRESS and epochs):
            state = reached  # type: ignore[assignment]
    return RunSummary(
        run_id=run_id,
        state="published" if published else state,
        dataset=parameters["dataset"],
        recipe=parameters["recipe"],
        epochs_done=len(epochs),
        epochs=parameters["epochs"],
        held_out_accuracy=last.held_out_accuracy if last else None,
        accuracy=published.accuracy if published else None,
        finished=published.finished if published else None,
    )


def _facts(report: Report, other: Report) -> list[tuple[str, Any]]:
    """What can be compared, in an order that two reports share."""
    evaluation, last = report.evaluation, report.history[-1]
    parameters = sorted(report.parameters.keys() | other.parameters.keys() - {"run_id", "storage"})
    versions = sorted(report.versions.keys() | other.versions.keys())
    classes = sorted({found.name for found in (*evaluation.classes, *other.evaluation.classes)})
    f1 = {found.name: found.f1 for found in evaluation.classes}
    return [
        *((name, report.parameters.get(name)) for name in parameters if name not in {"run_id", "storage"}),
        *((f"version of {name}", report.versions.get(name)) for name in versions),
        ("dataset version", report.dataset.digest[:12]),
        ("workers", report.world_size),
        ("device", report.device),
        ("training, s", round(report.training_seconds, 1)),
        ("images/s, last epoch", round(last.images_per_second)),
        ("train loss, last epoch", round(last.train_loss, 4)),
        ("train accuracy, last epoch", round(last.train_accuracy, 4)),
        ("test accuracy", round(evaluation.accuracy, 4)),
        ("test accuracy, 95% from", round(evaluation.accuracy_low, 4)),
        ("test accuracy, 95% to", round(evaluation.accuracy_high, 4)),
        ("test loss", round(evaluation.loss, 4)),
        *((f"F1 of {name}", None if name not in f1 else round(f1[name], 4)) for name in classes),
    ]
