"""Publishing a run: model and report first, then the manifest that makes them a run, then the pointer to the latest.

    staging/<run id>/publishing.json                             written anew by each publisher: the run is not old
    runs/<run id>/model.safetensors, model.onnx, model.pt2, predictions/, report.json, report.html, README.md, events
                                                                 conditional create, each read back and compared
    runs/<run id>/manifest.json                                  conditional create: from here on the run is published
    runs/latest.json                                             conditional replace: never goes back in time

A reader starts at a manifest or at latest.json and sees all of a run or nothing of it.
"""

import functools
import importlib.metadata
import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from lenet.model import layer_table
from pipeline.artifacts import FORMS, SAFETENSORS, Artifact, artifact_of, read_checked
from pipeline.card import render_card
from pipeline.documents import find_document, parse_document
from pipeline.errors import ConfigError, DataError
from pipeline.evaluate import Evaluation, exported_key, load_model
from pipeline.promotion import Comparison
from pipeline.report import Report, facts_of, render_events, render_html
from pipeline.shards import Manifest, pick_rows
from pipeline.storage import Store, sha256
from pipeline.train import Training, staging

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
REPORT, PAGE = "report.json", "report.html"
EVENTS = "events.out.tfevents.lenet"  # TensorBoard looks for tfevents
CARD = "README.md"  # where model hubs look for it
LATEST = "runs/latest.json"
DRAWN_WITH = ("jinja2", "matplotlib", "numpy", "pillow", "huggingface_hub")


class Headline(BaseModel):
    """What a list of runs says of each beside its accuracy, whose 95% interval is from `accuracy_low` to
    `accuracy_high`. In small objects, so that nobody has to read reports to make a list."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    recipe: str
    workers: int
    accuracy_low: float
    accuracy_high: float


class RunManifest(BaseModel):
    """What a published run consists of, by name beside the manifest, and what names its content.

    `test_digest` names the images it was judged by, `dataset_folder` is the key of the dataset they are from, `made_by`
    is `code_of_pages` of whoever published, if he wrote all pages. Runs of before there was a headline have none, nor
    that.
    """

    model_config = ConfigDict(frozen=True)

    format_version: int
    run_id: str
    finished: datetime
    accuracy: float
    dataset_folder: str = ""
    dataset_digest: str
    test_digest: str = ""
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, int] = (28, 28)
    headline: Headline | None = None
    made_by: str = ""
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


def run_folder(run_id: str) -> str:
    """Key of the folder that a run is published in."""
    return f"runs/{run_id}"


def publish(
    store: Store,
    run_id: str,
    parameters: Mapping[str, Any],
    versions: dict[str, str],
    lineage: Mapping[str, str],
    manifest: Manifest,
    training: Training,
    evaluation: Evaluation,
    comparison: Comparison,
) -> Published:
    """Publish the run, or find it published; either way `latest` points to it or to a later one.

    Nothing under runs/<run id>/ is ever overwritten: of several attempts at the same run, whichever was first with an
    object has written it for all. Raises DataError when the parts do not belong together, StorageError when the store
    fails.
    """
    if evaluation.candidate_sha256 != training.candidate_sha256 or evaluation.dataset_digest != manifest.digest:
        raise DataError(f"run {run_id}: the evaluation is of another model or dataset; run anew with another run_id")
    folder = run_folder(run_id)
    # What is there already is kept as it is, and as old as it is: by this, strays and retention see that it is wanted.
    store.put(f"{staging(run_id)}/publishing.json", b"{}")
    if find_run(store, run_id) is None:
        artifacts = _copy_evaluated(store, run_id, evaluation)
        # Of several attempts at the same run, the first has said what page and card are to say.
        said = _report(store, run_id, parameters, versions, lineage, manifest, training, evaluation, comparison)
        key = f"{folder}/{REPORT}"
        kept = {REPORT: store.keep(key, said.model_dump_json(indent=2).encode())}
        report = parse_document(store, key, Report, kept[REPORT])
        mistakes, _ = pick_rows(store, manifest, "test", [mistake.row for mistake in report.evaluation.mistakes])
        rendered = {
            EVENTS: render_events(report.history),
            PAGE: render_html(report, list(mistakes)).encode(),
            CARD: render_card(report, manifest.image_shape[0]).encode(),
        }
        kept |= {name: store.keep(f"{folder}/{name}", data) for name, data in rendered.items()}
        artifacts |= {name: artifact_of(data) for name, data in kept.items()}
        # Other code may have begun to publish, or have come to the disk since this was loaded.
        alike = all(kept[name] == rendered[name] for name in (PAGE, CARD))
        made_by = code_of_pages() if alike and code_of_pages() == code_on_disk() else ""
        content = RunManifest(
            format_version=FORMAT_VERSION,
            run_id=run_id,
            finished=training.finished,
            accuracy=evaluation.accuracy,
            dataset_folder=manifest.folder,
            dataset_digest=manifest.digest,
            test_digest=evaluation.test_digest,
            classes=manifest.classes,
            image_shape=manifest.image_shape,
            headline=headline_of(report),
            made_by=made_by,
            artifacts=artifacts,
        )
        store.keep(f"{folder}/manifest.json", content.model_dump_json(indent=2).encode())
    verify_run(store, run_id)
    _point_latest(store, run_id)
    log.info("%s published and verified in %s", run_id, store.locate(folder))
    return Published(
        run_id=run_id,
        accuracy=evaluation.accuracy,
        report=store.locate(f"{folder}/report.html"),
    )


def find_run(store: Store, run_id: str) -> RunManifest | None:
    """The manifest of a published run; None before it is published. DataError for one of another run, or damaged."""
    key = f"{run_folder(run_id)}/manifest.json"
    manifest = find_document(store, key, RunManifest)
    if manifest is not None and manifest.run_id != run_id:
        raise DataError(f"{store.locate(key)}: is the manifest of run {manifest.run_id}; do not use this folder")
    return manifest


def require_run(store: Store, run_id: str) -> RunManifest:
    """The manifest of a published run; DataError when there is none."""
    manifest = find_run(store, run_id)
    if manifest is None:
        raise DataError(f"{store.locate(run_folder(run_id))}: no published run; lenet runs lists them")
    return manifest


def verify_run(store: Store, run_id: str) -> RunManifest:
    """Read every artifact of a published run and compare size and sha256. Raises DataError naming what differs."""
    manifest = require_run(store, run_id)
    for name, artifact in manifest.artifacts.items():
        read_checked(store, f"{run_folder(run_id)}/{name}", artifact)
    return manifest


def read_report(store: Store, run_id: str) -> Report:
    """The report of a published run. DataError for a run that is not published, and one from before format 2."""
    key = f"{run_folder(run_id)}/{REPORT}"
    return parse_document(store, key, Report, read_checked(store, key, _artifacts(store, run_id)[REPORT]))


def headline_of(report: Report) -> Headline:
    """What a list says of the run with this report."""
    return Headline(
        dataset=report.dataset.name,
        recipe=str(report.parameters.get("recipe")),
        workers=report.world_size,
        accuracy_low=report.evaluation.accuracy_low,
        accuracy_high=report.evaluation.accuracy_high,
    )


@functools.cache
def code_of_pages() -> str:
    """What decides, beside a report, the bytes of its page and card: this package and those that it draws with, as they
    were when this process first asked. SHA-256 in hex."""
    return code_on_disk()


def code_on_disk() -> str:
    """The same as it is now: a run takes hours, and somebody may put another version there meanwhile."""
    own = sorted(file for file in Path(__file__).parent.iterdir() if file.suffix in (".py", ".j2"))
    parts = [f"{file.name} {sha256(file.read_bytes())}" for file in own]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in DRAWN_WITH]
    return sha256("\n".join(parts).encode())


def copy_run(store: Store, run_id: str, output: Path) -> list[Path]:
    """Write the model of a published run, in every form, with its card, to a folder on this machine; the files.

    ConfigError for a folder that cannot be written to or has other files of these names, DataError as `read_report`.
    """
    artifacts = _artifacts(store, run_id)
    found = {
        output / name: read_checked(store, f"{run_folder(run_id)}/{name}", artifacts[name]) for name in (*FORMS, CARD)
    }
    try:
        for file, data in found.items():
            if file.exists() and file.read_bytes() != data:
                rule = f"has another {file.name}, which stays as it is"
                raise ConfigError("output", str(output), rule, "name an empty folder")
        output.mkdir(parents=True, exist_ok=True)
        for file, data in found.items():
            file.write_bytes(data)
    except OSError as error:
        raise ConfigError("output", str(output), str(error.strerror), "name a folder to write to") from None
    return list(found)


def read_latest(store: Store) -> Latest | None:
    """The pointer to the latest run; None before the first."""
    return find_document(store, LATEST, Latest)


def _artifacts(store: Store, run_id: str) -> dict[str, Artifact]:
    """Of a published run; DataError for one from before format 2."""
    manifest = require_run(store, run_id)
    if manifest.format_version < FORMAT_VERSION:
        raise DataError(f"run {run_id}: published in format {manifest.format_version}, from before this; run it again")
    return manifest.artifacts


def _copy_evaluated(store: Store, run_id: str, evaluation: Evaluation) -> dict[str, Artifact]:
    """Publish what was evaluated, byte for byte, one object after the other: its artifacts by name."""
    copies: dict[str, tuple[str, Artifact]] = {
        name: (exported_key(run_id, name), Artifact(bytes=form.bytes, sha256=form.sha256))
        for name, form in evaluation.forms.items()
    }
    copies |= {name: (f"{staging(run_id)}/{name}", part) for name, part in evaluation.predictions.items()}
    artifacts = {}
    for name, (source, artifact) in copies.items():
        key = f"{run_folder(run_id)}/{name}"
        if artifact_of(store.keep(key, read_checked(store, source, artifact))) != artifact:
            raise DataError(f"{store.locate(key)}: is of another model already; run anew with another run_id")
        artifacts[name] = artifact
    return artifacts


def _report(
    store: Store,
    run_id: str,
    parameters: Mapping[str, Any],
    versions: dict[str, str],
    lineage: Mapping[str, str],
    manifest: Manifest,
    training: Training,
    evaluation: Evaluation,
    comparison: Comparison,
) -> Report:
    model = load_model(store, exported_key(run_id, SAFETENSORS), training.candidate_sha256)
    return Report(
        format_version=FORMAT_VERSION,
        run_id=run_id,
        finished=training.finished,
        parameters=dict(parameters),
        dataset=facts_of(manifest),
        layers=layer_table(model, manifest.image_shape[0]),
        history=training.history,
        world_size=training.world_size,
        device=training.device,
        training_seconds=training.wall_seconds,
        evaluation=evaluation,
        comparison=comparison,
        versions=versions,
        lineage={
            **lineage,
            "dataset": f"{manifest.dataset} {manifest.digest}",
            "test images": evaluation.test_digest,
            "recipe": str(parameters.get("recipe")),
            "seed": str(parameters.get("seed")),
            "checkpoint": training.candidate,
            "model": training.candidate_sha256,
        },
    )


def _point_latest(store: Store, run_id: str) -> None:
    """Move the pointer to this run, unless it is at a run that finished later."""
    key = f"{run_folder(run_id)}/manifest.json"
    data = store.read(key)
    run = parse_document(store, key, RunManifest, data)
    pointer = Latest(
        run_id=run_id,
        finished=run.finished,
        accuracy=run.accuracy,
        manifest=key,
        manifest_sha256=sha256(data),
    )
    for current in store.attempts(LATEST):
        if current is not None and parse_document(store, LATEST, Latest, current).finished > run.finished:
            return
        if store.replace(LATEST, pointer.model_dump_json(indent=2).encode(), expected=current):
            return
