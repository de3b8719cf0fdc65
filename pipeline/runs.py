"""The runs in a store: what state each is in, and how two of them differ."""

from collections import defaultdict
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.checkpoint import EpochMetrics
from pipeline.documents import read_document
from pipeline.errors import StorageError
from pipeline.progress import ENDED, PROGRESS
from pipeline.publish import find_run, read_report
from pipeline.record import read_record
from pipeline.report import Report
from pipeline.storage import Store
from pipeline.train import staging

State = Literal["begun", "training", "ended", "trained", "evaluated", "published"]
# What each file in a run's folder says of its state, the later over the earlier.
RECEIPTS: dict[str, State] = {ENDED: "ended", "training.json": "trained", "evaluation.json": "evaluated"}


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
        _, run_id, *rest = key.split("/", 2)
        if run_id and rest:  # .DS_Store lies beside the runs, as does the empty object that AWS's console makes
            keys[run_id] += rest
    there = [(run_id, set(found)) for run_id, found in sorted(keys.items()) if "run.json" in found]
    return [summary for run in there if (summary := _find_summary(store, *run))]


def compare_runs(store: Store, first: str, second: str) -> list[Difference]:
    """All in which two published runs differ: parameters, versions, data, then results. DataError for one that is
    not published."""
    one, other = _facts(read_report(store, first)), _facts(read_report(store, second))
    # In the order of the first's facts; those that only the second has come last.
    return [
        Difference(what=what, first=one.get(what), second=other.get(what))
        for what in one | other
        if one.get(what) != other.get(what)
    ]


def _find_summary(store: Store, run_id: str, found: set[str]) -> RunSummary | None:
    try:
        return _summary(store, run_id, found)
    except StorageError:
        if store.exists(f"{staging(run_id)}/run.json"):
            raise
        return None  # removed since it was listed


def _summary(store: Store, run_id: str, found: set[str]) -> RunSummary:
    parameters = read_record(store, run_id).parameters
    epochs = sorted(name for name in found if name.startswith(f"{PROGRESS}/"))
    last = read_document(store, f"{staging(run_id)}/{epochs[-1]}", EpochMetrics) if epochs else None
    published = find_run(store, run_id)
    state: State = "training" if epochs else "begun"
    for receipt, reached in RECEIPTS.items():
        if receipt in found:
            state = reached
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


def _facts(report: Report) -> dict[str, Any]:
    """What can be compared."""
    evaluation, last = report.evaluation, report.history[-1]
    return {
        **{name: value for name, value in sorted(report.parameters.items()) if name not in {"run_id", "storage"}},
        **{f"version of {name}": value for name, value in sorted(report.versions.items())},
        "dataset version": report.dataset.digest[:12],
        "workers": report.world_size,
        "device": report.device,
        "training, s": round(report.training_seconds, 1),
        "images/s, last epoch": round(last.images_per_second),
        "train loss, last epoch": round(last.train_loss, 4),
        "train accuracy, last epoch": round(last.train_accuracy, 4),
        "test accuracy": round(evaluation.accuracy, 4),
        "test accuracy, 95% from": round(evaluation.accuracy_low, 4),
        "test accuracy, 95% to": round(evaluation.accuracy_high, 4),
        "test loss": round(evaluation.loss, 4),
        **{f"F1 of {found.name}": round(found.f1, 4) for found in evaluation.classes},
    }
