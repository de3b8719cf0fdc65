"""Publishing a run: model and report first, then the manifest that makes them a run, then the pointer to the latest.

    runs/<run id>/model.safetensors, report.json, report.html, events.out.tfevents.lenet
                                                                 conditional create, each read back and compared
    runs/<run id>/manifest.json                                  conditional create: from here on the run is published
    runs/latest.json                                             conditional replace: never goes back in time

A reader starts at a manifest or at latest.json and sees all of a run or nothing of it.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from lenet.model import layer_table
from pipeline.errors import DataError, StorageError
from pipeline.evaluate import Evaluation, load_model
from pipeline.report import DatasetFacts, LayerFacts, Report, render_events, render_html
from pipeline.shards import Manifest, read_rows
from pipeline.storage import Store, sha256
from pipeline.train import Training

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MODEL = "model.safetensors"
EVENTS = "events.out.tfevents.lenet"  # TensorBoard looks for tfevents
LATEST = "runs/latest.json"
LATEST_ATTEMPTS = 50


class Artifact(BaseModel):
    """One published object: its size in bytes and sha256 (hex)."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class RunManifest(BaseModel):
    """What a published run consists of, by name beside the manifest, and what names its content."""

    model_config = ConfigDict(frozen=True)

    format_version: int
    run_id: str
    finished: datetime
    accuracy: float
    dataset_digest: str
    artifacts: dict[str, Artifact]


class Latest(BaseModel):
    """The pointer: the run finished last among those published, and its manifest's sha256 (hex)."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    finished: datetime
    accuracy: float
    manifest: str
    manifest_sha256: str


class Published(BaseModel):
    """Where the run can be seen."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    accuracy: float
    report: str
    manifest: str


def run_folder(run_id: str) -> str:
    """Key of the folder that a run is published in."""
    return f"runs/{run_id}"


def publish(
    store: Store,
    run_id: str,
    parameters: dict[str, Any],
    versions: dict[str, str],
    manifest: Manifest,
    training: Training,
    evaluation: Evaluation,
) -> Published:
    """Publish the run, or find it published; either way `latest` points to it or to a later one.

    Nothing under runs/<run id>/ is ever overwritten: of several attempts at the same run, whichever was first with an
    object has written it for all. Raises DataError when the parts do not belong together, StorageError when the store
    fails.
    """
    if evaluation.candidate_sha256 != training.candidate_sha256 or evaluation.dataset_digest != manifest.digest:
        raise DataError(f"run {run_id}: the evaluation is of another model or dataset; run anew with another run_id")
    folder = run_folder(run_id)
    if find_run(store, run_id) is None:
        rendered = _render(store, run_id, parameters, versions, manifest, training, evaluation)
        kept = {name: store.keep(f"{folder}/{name}", data) for name, data in rendered.items()}
        if sha256(kept[MODEL]) != training.candidate_sha256:
            raise DataError(f"{store.locate(folder)}: holds another model already; run anew with another run_id")
        content = RunManifest(
            format_version=FORMAT_VERSION,
            run_id=run_id,
            finished=training.finished,
            accuracy=evaluation.accuracy,
            dataset_digest=manifest.digest,
            artifacts={name: Artifact(bytes=len(data), sha256=sha256(data)) for name, data in kept.items()},
        )
        store.keep(f"{folder}/manifest.json", content.model_dump_json(indent=2).encode())
    verify_run(store, run_id)
    _point_latest(store, run_id)
    log.info("%s published and verified in %s", run_id, store.locate(folder))
    return Published(
        run_id=run_id,
        accuracy=evaluation.accuracy,
        report=store.locate(f"{folder}/report.html"),
        manifest=store.locate(f"{folder}/manifest.json"),
    )


def find_run(store: Store, run_id: str) -> RunManifest | None:
    """The manifest of a published run; None before it is published."""
    key = f"{run_folder(run_id)}/manifest.json"
    return RunManifest.model_validate_json(store.read(key)) if store.exists(key) else None


def verify_run(store: Store, run_id: str) -> RunManifest:
    """Read every artifact of a published run and compare size and sha256. Raises DataError naming what differs."""
    manifest = find_run(store, run_id)
    if manifest is None:
        raise DataError(f"{store.locate(run_folder(run_id))}: holds no published run")
    for name, artifact in manifest.artifacts.items():
        key = f"{run_folder(run_id)}/{name}"
        data = store.read(key)
        if len(data) != artifact.bytes or sha256(data) != artifact.sha256:
            raise DataError(f"{store.locate(key)}: its sha256 is not the manifest's; it was altered, do not use it")
    return manifest


def read_latest(store: Store) -> Latest | None:
    """The pointer to the latest run; None before the first."""
    return Latest.model_validate_json(store.read(LATEST)) if store.exists(LATEST) else None


def _render(
    store: Store,
    run_id: str,
    parameters: Mapping[str, Any],
    versions: dict[str, str],
    manifest: Manifest,
    training: Training,
    evaluation: Evaluation,
) -> dict[str, bytes]:
    """The bytes of every artifact, by name."""
    model = load_model(store, training.candidate, training.candidate_sha256)
    report = Report(
        format_version=FORMAT_VERSION,
        run_id=run_id,
        finished=training.finished,
        parameters=dict(parameters),
        dataset=DatasetFacts(
            name=manifest.dataset,
            digest=manifest.digest,
            rows={split: manifest.rows(split) for split in manifest.splits},
            licence=manifest.licence,
            homepage=manifest.homepage,
        ),
        layers=[LayerFacts(**asdict(row)) for row in layer_table(model, manifest.image_shape[0])],
        history=training.history,
        world_size=training.world_size,
        device=training.device,
        training_seconds=training.wall_seconds,
        evaluation=evaluation,
        versions=versions,
    )
    images, _ = read_rows(store, manifest, "test")
    return {
        MODEL: store.read(training.candidate),
        EVENTS: render_events(training.history),
        "report.json": report.model_dump_json(indent=2).encode(),
        "report.html": render_html(report, [images[mistake.row] for mistake in evaluation.mistakes]).encode(),
    }


def _point_latest(store: Store, run_id: str) -> None:
    """Move the pointer to this run, unless it is at a run that finished later."""
    key = f"{run_folder(run_id)}/manifest.json"
    data = store.read(key)
    run = RunManifest.model_validate_json(data)
    pointer = Latest(
        run_id=run_id,
        finished=run.finished,
        accuracy=run.accuracy,
        manifest=key,
        manifest_sha256=sha256(data),
    )
    for _ in range(LATEST_ATTEMPTS):
        current = store.read(LATEST) if store.exists(LATEST) else None
        if current is not None and Latest.model_validate_json(current).finished > run.finished:
            return
        if store.replace(LATEST, pointer.model_dump_json(indent=2).encode(), expected=current):
            return
    raise StorageError(f"{store.locate(LATEST)}: changed under every one of {LATEST_ATTEMPTS} attempts; run again")
