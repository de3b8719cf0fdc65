"""Predictions of any number of images: Parquet to wherever they are wanted, with a manifest that is written last.

predictions/<content>/   the predictions; <content> names what is predicted and by which model, so a job that broke
receipts/<content>/      off goes on where it stopped
manifest.json            conditional create: from here on these are the predictions, and the receipts go
"""

import logging
import re
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipeline import jobs, scorer
from pipeline.documents import find_document
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.feed import Feed, find_feed, source_digest
from pipeline.placement import MAX_WORKERS, ClusterConfig
from pipeline.predict import Invert
from pipeline.scorer import PREDICTIONS, RECEIPTS, Job, Part, Predicted
from pipeline.served import Served, open_model
from pipeline.storage import LocalStore, Store, open_store, sha256

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONTENT = re.compile(rf"({PREDICTIONS}|{RECEIPTS})/[0-9a-f]{{16}}/[0-9]{{6}}[^/]*$")  # what we write, and nobody else


class PredictConfig(BaseModel):
    """What to predict, by which model, and where to put it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="The images: a folder or s3://bucket/prefix of pictures (PNG, JPEG) or of Parquet files, one such "
        "file, or a pattern like shards/test-*.parquet.",
        min_length=1,
    )
    output: str = Field(
        description="Where the predictions go, as Parquet with a manifest: a folder or s3://bucket/prefix.",
        min_length=1,
    )
    model: str = Field(
        "./store",
        description="The model: a store (the champion of its model lenet), or in one models/NAME, "
        "models/NAME/versions/N or runs/ID.",
        min_length=1,
    )
    image_column: str = Field(
        "image", min_length=1, description="Column of Parquet that has the images: encoded, or as raw pixels."
    )
    invert: Invert = Field(
        "auto",
        description="Exchange light and dark in pictures: auto (of what is on a light background; but a model that was "
        "trained on pictures of your own takes these as it took those), yes or no. Raw pixels are taken as they are.",
    )
    workers: int = Field(
        2, ge=1, le=MAX_WORKERS, description="Processes that predict, each on a CPU; fewer if other work has the CPUs."
    )
    ray_address: str | None = Field(
        None,
        description="Ray cluster to predict on: auto or host:port connects to it, http://host:8265 of its dashboard "
        "submits a Ray job, which outlives this process. A local Ray is started if not given.",
    )

    @property
    def cluster(self) -> ClusterConfig:
        """The same for Ray."""
        return ClusterConfig(workers=self.workers, cpus_per_worker=1, gpu="no", ray_address=self.ray_address)


class BatchReport(BaseModel):
    """What came of it. `seconds` are those of predicting, with the start of the processes but not of Ray; the rate is
    of the images that were predicted in them, not of those that an earlier attempt has left."""

    model_config = ConfigDict(frozen=True)

    source: str
    output: str
    model: str
    version: int | None
    run_id: str
    model_sha256: str
    images: int
    unreadable: int
    predicted: dict[str, int]
    seconds: float
    images_per_second: float
    files: int


class BatchManifest(BatchReport):
    """The report, and what the predictions consist of. `content` names what was predicted and by which model."""

    format_version: int
    finished: datetime
    content: str
    source_digest: str
    image_column: str
    invert: Invert
    classes: tuple[str, ...]
    columns: dict[str, str]
    folder: str
    parts: list[Part]


def predict_batch(config: PredictConfig) -> BatchReport:
    """Predict all images of the source and publish the predictions; the report of before if they are there already.

    Raises ConfigError, before any work, for a source with nothing to predict and for an output that holds other
    predictions, or other things where they go; DataError for a source that is torn or changes meanwhile; ClusterError
    when no CPU comes free.
    """
    output = open_store(config.output, "output")
    cluster = config.cluster
    jobs.check(cluster)
    served = open_model(config.model)
    feed = find_feed(config.source, config.image_column, served.image_shape[0])
    if feed.whole and _is_inside(output, feed.store):
        raise ConfigError("output", config.output, "it is inside the source", "name a folder outside of it")
    content = _content(config, served, feed)
    if (done := _find(output, config, content)) is not None:
        log.info("%s: %s images were predicted before, nothing to do", done.output, f"{done.images:,}")
        return _report(done)
    if strange := [key for key in _written(output) if not CONTENT.fullmatch(key)]:
        raise ConfigError("output", config.output, f"it holds {strange[0]}, which is not ours", "name another folder")
    output.check_writable("output")
    if cluster.by_job:
        return _report(jobs.run_job(str(cluster.ray_address), _work(output, config, served, content)))
    job = Job(feed.store, output, served, config.image_column, served.form(config.invert), content)
    changed = False
    try:
        predicted = scorer.predict_units(job, feed, cluster)
        if changed := source_digest(config.source) != feed.digest:
            raise DataError(f"{config.source}: changed while it was read; let it rest and run again")
    except PipelineError:
        # Another job of the same may have published, and taken away the receipts that this one was at.
        if (done := _overtaken(config, job)) is not None:
            return _report(done)
        if changed:
            _forget(job)
        raise
    manifest = _publish(config, job, feed, predicted)
    log.info(
        "%s images predicted by %s, %s a second: %s",
        f"{manifest.images:,}", manifest.model, f"{manifest.images_per_second:,.0f}", manifest.output,
    )  # fmt: skip
    return _report(manifest)


def read_manifest(output: Store) -> BatchManifest | None:
    """The manifest of predictions in a folder; None before there is one. Raises DataError for one that is damaged."""
    return find_document(output, MANIFEST, BatchManifest)


def render_batch(report: BatchReport) -> str:
    """The report in a few lines of Markdown."""
    lines = [
        f"# {report.images:,} images predicted by {report.model}",
        "",
        f"From {report.source} to {report.output}: {report.files:,} files in {report.seconds:.1f} s, "
        f"{report.images_per_second:,.0f} images a second.",
        "",
        f"{report.unreadable:,} images could not be read; column `error` says why." if report.unreadable else "",
        "",
        "| class | images |",
        "| --- | ---: |",
        *(f"| {name} | {count:,} |" for name, count in report.predicted.items()),
    ]
    return "\n".join([*lines, ""])


def _is_inside(output: Store, source: Store) -> bool:
    """Whether it is the source, or a part of it, by whatever links and dots it is named."""
    if isinstance(output, LocalStore) and isinstance(source, LocalStore):
        return Path(output.root).resolve().is_relative_to(Path(source.root).resolve())
    return f"{output.root}/".startswith(f"{source.root}/")


def _content(config: PredictConfig, served: Served, feed: Feed) -> str:
    """A name for what is predicted, by which model and how."""
    made_of = [FORMAT_VERSION, feed.digest, [unit.rows for unit in feed.units], config.image_column]
    return sha256(repr([*made_of, served.form(config.invert), served.place, served.model_sha256]).encode())[:16]


def _work(output: Store, config: PredictConfig, served: Served, content: str) -> jobs.Work[BatchManifest]:
    """The same by the same model as a job, which has a working directory of its own."""
    places = {
        name: place if "://" in place else str(Path(place).expanduser().absolute())
        for name, place in {"source": config.source, "output": output.url, "model": served.url}.items()
    }
    return jobs.Work(
        name=f"predict-{content}-{sha256(output.url.encode())[:8]}",
        asked={"work": "predict", "parameters": config.model_dump(mode="json") | places, "versions": jobs.versions()},
        metadata={"source": config.source, "storage": output.url},
        find=lambda: _find(output, config, content),
    )


def _find(output: Store, config: PredictConfig, content: str) -> BatchManifest | None:
    found = read_manifest(output)
    if found is not None and found.content != content:
        raise ConfigError(
            "output",
            config.output,
            f"it holds predictions of other images or by another model ({found.images:,} by {found.model})",
            "name another folder",
        )
    return found


def _publish(config: PredictConfig, job: Job, feed: Feed, predicted: Predicted) -> BatchManifest:
    """Create the manifest, or find that another job of the same content has; then remove what no manifest names."""
    served, output, parts = job.served, job.output, predicted.parts
    images = sum(part.rows for part in parts)
    if images != feed.images:
        raise DataError(f"{config.source}: {images:,} images where its files promise {feed.images:,}; write them again")
    manifest = BatchManifest(
        source=config.source,
        output=output.locate("").rstrip("/"),
        model=served.place,
        version=None if served.version is None else served.version.version,
        run_id=served.run_id,
        model_sha256=served.model_sha256,
        images=images,
        unreadable=sum(part.unreadable for part in parts),
        predicted={name: sum(part.predicted[number] for part in parts) for number, name in enumerate(served.classes)},
        seconds=predicted.seconds,
        images_per_second=predicted.images_now / predicted.seconds,
        files=len(parts),
        format_version=FORMAT_VERSION,
        finished=datetime.now(UTC),
        content=job.content,
        source_digest=feed.digest,
        image_column=config.image_column,
        invert=config.invert,
        classes=served.classes,
        columns={field.name: str(field.type) for field in scorer.schema_of(len(served.classes))},
        folder=job.folder,
        parts=parts,
    )
    if not output.create(MANIFEST, manifest.model_dump_json(indent=2).encode()):
        return _overtaken(config, job) or manifest
    ours = {key.rpartition("/")[0] for key in _written(output) if CONTENT.fullmatch(key)}
    for left in ours - {job.folder}:
        output.delete(left)
    return manifest


def _overtaken(config: PredictConfig, job: Job) -> BatchManifest | None:
    """What another job of the same has published meanwhile, if one has: not a file of that may go."""
    try:
        found = _find(job.output, config, job.content)
    except ConfigError:
        _forget(job)  # other predictions are there, and nobody will ever name these
        raise
    if found is not None:
        job.output.delete(job.receipts)  # written after the other had removed its own
    return found


def _written(output: Store) -> list[str]:
    """Keys where predictions and receipts go."""
    return [*output.keys(PREDICTIONS), *output.keys(RECEIPTS)]


def _forget(job: Job) -> None:
    job.output.delete(job.folder)
    job.output.delete(job.receipts)


def _report(manifest: BatchManifest) -> BatchReport:
    return BatchReport.model_validate(manifest.model_dump(include=set(BatchReport.model_fields)))
