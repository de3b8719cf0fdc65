"""One run: its configuration, and the steps from a source to a published model and perhaps a champion.

Each step is safe to repeat: it finds what an earlier attempt finished and goes on from there.
"""

import contextlib
import logging
from collections.abc import Iterator
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

import pipeline.cluster
import pipeline.download
import pipeline.evaluate
import pipeline.index
import pipeline.jobs
import pipeline.publish
import pipeline.registry
import pipeline.train
from lenet.model import LeNet
from lenet.recipe import RECIPES
from pipeline import imports
from pipeline.artifacts import encode_onnx
from pipeline.catalog import CATALOG
from pipeline.cluster import check_cluster, run_on_ray
from pipeline.documents import find_document, keep_document
from pipeline.download import check_source
from pipeline.errors import ConfigError
from pipeline.evaluate import Evaluation, Exported
from pipeline.loader import LoadConfig
from pipeline.placement import AUTO, ClusterConfig, Workers, local_resources
from pipeline.predictions import read_predictions
from pipeline.progress import Now, OnEpoch, OnNow
from pipeline.promotion import Comparison, PromoteConfig
from pipeline.publish import Published
from pipeline.recipe import RecipeConfig, TrainConfig, TuneConfig, encode_recipe
from pipeline.record import (
    RunDataset,
    RunRecord,
    dataset_of,
    keep_dataset,
    keep_record,
    lineage,
    read_record,
    versions,
)
from pipeline.sharding import ShardConfig, dataset_folder, run_in_threads, write_shards
from pipeline.shards import Manifest, find_manifest, require_manifest, verify_shards
from pipeline.source import SourceConfig, open_source
from pipeline.storage import StorageConfig, Store, open_store
from pipeline.train import Training, staging

if TYPE_CHECKING:
    from pipeline.tune import Tuned

log = logging.getLogger(__name__)

# A run that goes on may do so on other workers, from another source; whatever decides its result has to stay.
MAY_CHANGE = {
    "storage",
    "source",
    "checkpoint_steps",
    "checkpoint_seconds",
    *ClusterConfig.model_fields,
    *PromoteConfig.model_fields,
}
RAY_FROM_BYTES = 2**30
# With more, imports for later have a core to themselves while workers start; a GPU may be done before they are.
FEW_CORES = 4


class DataConfig(StorageConfig, ShardConfig, SourceConfig):
    """All parameters of a dataset in the store."""


class RunConfig(PromoteConfig, ClusterConfig, TrainConfig, LoadConfig, DataConfig):
    """All parameters of a run: the flow's, the command line's and the record's."""

    run_id: str | None = Field(
        None,
        description="Name of the run. Give an earlier one to go on where it stopped; made up if not given.",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$",
    )


class TuneRunConfig(TuneConfig, ClusterConfig, RecipeConfig, DataConfig):
    """All parameters of a search."""

    workers: Workers = Field(
        AUTO,
        description="Trials at a time, from 1 to 10000; each has a process of its own. auto is one for each GPU of "
        "this machine, or else two, or one on a single core; on a cluster it is two.",
    )
    ray_address: str | None = Field(
        None,
        description="Ray cluster to search on: auto or host:port connects to it, from one of its machines. A local Ray "
        "is started if not given.",
    )
    validation_fraction: float = Field(
        0.1, gt=0, le=0.5, description="Part of each class's training images to judge the trials by."
    )


def parameters_of(record: RunRecord) -> dict[str, Any]:
    """Of a run's parameters those that there are today, but for a recipe's file: its values are among them, and it may
    be gone."""
    return {
        name: value
        for name, value in record.parameters.items()
        if name in RunConfig.model_fields and (name != "recipe" or value in RECIPES)
    }


def check(config: RunConfig) -> Store:
    """Check all that can be checked before any work; the store, ready for use.

    Raises ConfigError for parameters that cannot work on this machine, StorageError for a store out of reach.
    """
    store = open_store(config.storage)
    if dataset_of(store, config.run_id) is None:  # else the source is not needed any more
        check_source(config)
    pipeline.jobs.check(config)
    store.check_writable()
    return store


def begin(config: RunConfig, run_id: str) -> RunConfig:
    """Check and record the run; its configuration with the run id.

    Raises what `check` raises, and ConfigError for parameters other than those the run was begun with.
    """
    config = config.model_copy(update={"run_id": run_id})
    pipeline.publish.code_of_pages()  # the code that has just been loaded will write the pages
    store = check(config)
    parameters = config.model_dump(mode="json") | config.spelled_out()
    record = RunRecord(parameters=parameters, versions=versions(), lineage=lineage())
    begun = keep_record(store, run_id, record)
    _require_same(begun.parameters, record.parameters)
    log.info("%s", run_id)
    return config


def download(config: DataConfig) -> Path | None:
    """The folder with the verified source; None when the store holds the dataset, so that it is not needed."""
    folder = _published_folder(config)
    if folder is not None and find_manifest(open_store(config.storage), folder):
        return None
    return pipeline.download.fetch(config)


def shard(config: RunConfig, folder: Path | None) -> Manifest:
    """The dataset's manifest, its shards written if need be and every byte of them verified.

    Raises ConfigError when it is not the version that the run was begun with.
    """
    manifest = _shard(config, folder, config.connectable)
    found = RunDataset(folder=manifest.folder, digest=manifest.digest)
    kept = keep_dataset(open_store(config.storage), _run_id(config), found)
    if kept.digest != found.digest:
        raise ConfigError(
            "source",
            config.source,
            f"version {manifest.version} comes of it, and run {config.run_id} was begun with {kept.digest[:12]}",
            "give it as it was, or use another run_id",
        )
    return manifest


def prepare(config: DataConfig) -> Manifest:
    """Download and shard a dataset, with no run in mind."""
    check_source(config)
    open_store(config.storage).check_writable()
    return _shard(config, download(config), None)


def _shard(config: DataConfig, folder: Path | None, ray_address: str | None) -> Manifest:
    store = open_store(config.storage)
    if folder is None:
        published = _published_folder(config)
        assert published is not None, "without a source, download() has found the dataset in the store"
        manifest = require_manifest(store, published)
    else:
        source = open_source(folder)
        # Below a gigabyte, starting Ray takes longer than sharding.
        on_ray = partial(run_on_ray, ClusterConfig(workers=1, cpus_per_worker=1, gpu="no", ray_address=ray_address))
        manifest = write_shards(
            store, source, config, on_ray if source.pixel_bytes > RAY_FROM_BYTES else run_in_threads
        )
    verify_shards(store, manifest)
    return manifest


def ray_ahead(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """Starts a local Ray in the background while other steps are at work, if there is training to be done."""
    if config.run_id and pipeline.train.find_training(open_store(config.storage), config.run_id):
        return contextlib.nullcontext()
    return pipeline.cluster.ray_ahead(config)


def train(
    config: RunConfig,
    manifest: Manifest,
    on_epoch: OnEpoch = lambda epoch: None,
    on_now: OnNow = lambda now: None,
) -> Training:
    """Train the candidate; `on_epoch` hears of every epoch, `on_now` of how far one is."""
    store, run_id = open_store(config.storage), _run_id(config)
    # The first export takes 0.9 s longer than a second, whatever the weights.
    get_ready = cache(partial(imports.ahead, lambda: encode_onnx(LeNet(), 28)))
    if local_resources()["CPU"] > FEW_CORES:
        get_ready()

    def heard(now: Now) -> None:
        get_ready()  # the workers have started: on two cores they would have waited for it, 3 s of 22
        on_now(now)

    if config.by_job:
        # All values, and not the name: of a file, perhaps, which is not there or another one. The store in full: the
        # job's working directory is another.
        parameters = config.model_dump(mode="json", exclude={"recipe"}) | config.spelled_out() | {"storage": store.url}
        work = pipeline.jobs.training(store, run_id, parameters, manifest.folder, on_epoch, heard)
        return pipeline.jobs.run_job(str(config.ray_address), work)
    return pipeline.train.fit(store, run_id, manifest, config, config, config, on_epoch, heard)


def stop(config: RunConfig, run_id: str, before: datetime) -> bool:
    """End a training that was submitted as a job before then, with a checkpoint if it leaves one in time; whether there
    was any."""
    if not config.by_job:
        return False
    work = pipeline.jobs.training(open_store(config.storage), run_id, {}, "")
    return pipeline.jobs.stop(str(config.ray_address), work, before)


def export(config: RunConfig, manifest: Manifest, training: Training) -> Exported:
    """Write the candidate in every form that is published."""
    return pipeline.evaluate.export(open_store(config.storage), _run_id(config), manifest, training)


def evaluate(config: RunConfig, manifest: Manifest, exported: Exported) -> Evaluation:
    """Judge the candidate, in all its forms, as it lies in the store."""
    cluster = ClusterConfig(workers=1, cpus_per_worker=1, gpu="no", ray_address=config.connectable)
    on_ray = partial(run_on_ray, cluster)
    return pipeline.evaluate.evaluate(open_store(config.storage), _run_id(config), manifest, exported, on_ray)


def publish(config: RunConfig, manifest: Manifest, training: Training, evaluation: Evaluation) -> Published:
    """Publish model and report under runs/<run id>/ and let `latest` point there.

    What the report says of the champion is what is found now, and kept: another attempt says the same. It also says
    which versions are others now than when the run was begun.
    """
    store, run_id = open_store(config.storage), _run_id(config)
    record = read_record(store, run_id)
    key = f"{staging(run_id)}/comparison.json"
    comparison = find_document(store, key, Comparison)
    if comparison is None:  # of a run published long ago, the predictions here may be gone (pipeline.retention)
        found = pipeline.registry.held_against_champion(
            store, config, evaluation, lambda: read_predictions(store, staging(run_id), evaluation.predictions)
        )
        comparison = keep_document(store, key, found)
    found_now = versions()
    differ = {f"{name}, when published": now for name, now in found_now.items() if now != record.versions.get(name)}
    return pipeline.publish.publish(
        store,
        run_id,
        record.parameters,
        record.versions | differ,
        record.lineage,
        manifest,
        training,
        evaluation,
        comparison,
    )


def promote(config: RunConfig) -> Comparison:
    """Register the published run as a version of its model, and let it be the champion if it is better. Either way
    the index shows it."""
    store = open_store(config.storage)
    version = pipeline.registry.register(store, config.model, _run_id(config))
    comparison = pipeline.registry.promote(store, config, version)
    pipeline.index.refresh_index(store)
    return comparison


def tune(config: TuneRunConfig) -> "Tuned":
    """Search a recipe's hyperparameters on a dataset, brought here if need be; the best is left in a recipe file."""
    import pipeline.tune  # with it comes all of Ray Tune: 2 s that no other command needs

    output = Path(config.output).absolute()
    with _writing(output):
        new = not output.exists()
        output.open("ab").close()  # what is there stays until there is a better one
        if new:
            output.unlink()
    check_cluster(config)
    manifest = prepare(config)
    tuned = pipeline.tune.tune(open_store(config.storage), manifest, config.resolved(), config.seed, config, config)
    with _writing(output):
        output.write_bytes(encode_recipe(tuned.recipe))
    return tuned


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """ConfigError for a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError("output", str(output), str(error.strerror), "name a file that can be written") from None


def _published_folder(config: DataConfig) -> str | None:
    """Where the store keeps the dataset that a run is about, or a catalogued one; None for the user's own, which has to
    be read to know."""
    if isinstance(config, RunConfig) and (begun := dataset_of(open_store(config.storage), config.run_id)):
        return begun.folder
    known = CATALOG.get(config.dataset)
    return None if known is None else dataset_folder(known.name, known.made_of, known.conversion, config)


def _run_id(config: RunConfig) -> str:
    assert config.run_id is not None, "begin() gives every run its id"
    return config.run_id


def _require_same(begun: dict[str, Any], now: dict[str, Any]) -> None:
    # Of two files the values decide, which are parameters too.
    decided = {"recipe"} if RECIPES.keys().isdisjoint((begun.get("recipe"), now["recipe"])) else set()
    for name, value in now.items():
        # A parameter that there was not when the run was begun has no value to keep.
        if name in begun and name not in MAY_CHANGE | decided and begun[name] != value:
            raise ConfigError(
                name,
                value,
                f"run {now['run_id']} was begun with {begun[name]!r}",
                "keep that, or use another run_id",
            )
