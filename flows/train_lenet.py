"""The flow `train-lenet`: one task for each step, each task one call into `pipeline.run`."""

import contextlib
import logging
import re
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.tasks import Task

from flows.notify import notify, on_failure
from flows.parameters import with_parameters
from pipeline import run
from pipeline.checkpoint import EpochMetrics
from pipeline.config import config_of
from pipeline.errors import PipelineError, Terminated
from pipeline.evaluate import Evaluation, Exported
from pipeline.placement import ClusterConfig
from pipeline.progress import Now
from pipeline.promotion import Comparison, render_decision
from pipeline.publish import Published
from pipeline.report import curves_image, render_summary
from pipeline.run import RunConfig
from pipeline.shards import Manifest
from pipeline.train import Training

# By its full name: a deployment loads this file under a name that Prefect makes up.
log = logging.getLogger("flows.train")
# For a display in this process; too much for Prefect's log, which does not listen to it.
now_log = logging.getLogger("now")


def _may_pass(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """A wrong parameter or file stays wrong and Ray Train has retried training; anything else is tried again."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, PipelineError) and not error.may_pass:
        return False
    logging.getLogger(f"flows.{task.name}").warning("%s; this step is tried again", error)
    return True


@contextlib.contextmanager
def as_prefect_knows_it() -> Iterator[None]:
    """An end by SIGTERM, by which Prefect tells whether a flow run was cancelled or has to be run again."""
    try:
        yield
    except Terminated:
        raise TerminationSignal(signal.SIGTERM) from None


# Every step can be repeated, and finds in the store what it has done before. Prefect keeps no results: another worker
# has none of them, and they would outlive what they are about.
STEP: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [10, 60],
    "retry_condition_fn": _may_pass,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}
HOUR = 3600


def _may_come_back(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """A flow run that is taken up again may come before the cluster or the store is back, from what ended both. A new
    one hears at once what is wrong."""
    return (flow_run.run_count or 1) > 1 and _may_pass(task, task_run, state)


AWAITED = {"retries": 5, "retry_delay_seconds": [10, 60, 120, 240, 300], "retry_condition_fn": _may_come_back}


@task(**STEP | AWAITED)
def begin(config: RunConfig, run_id: str) -> RunConfig:
    """Check and record the run."""
    return run.begin(config, run_id)


@task(**STEP, timeout_seconds=HOUR)
def download(config: RunConfig) -> Path | None:
    """Bring the verified source files here, if the store does not hold the dataset yet."""
    return run.download(config)


@task(**STEP, timeout_seconds=HOUR)
def shard(config: RunConfig, source: Path | None) -> Manifest:
    """Write the Parquet shards, if need be, and prove every byte of them before a run trains on them."""
    return run.shard(config, source)


@task(**STEP)
def train(config: RunConfig, manifest: Manifest) -> Training:
    """Train on Ray, going on from the run's last checkpoint, and follow the epochs."""
    epochs = config.resolved().epochs
    artifact: Any = create_progress_artifact(progress=0, key="training-progress", description=config.run_id)

    def on_epoch(epoch: EpochMetrics) -> None:
        log.info("epoch %d of %d: %s", epoch.epoch, epochs, epoch, extra={"epoch": epoch, "epochs": epochs})
        update_progress_artifact(artifact, progress=100 * epoch.epoch / epochs)

    def on_now(now: Now) -> None:
        now_log.info("%s", now, extra={"now": now, "epochs": epochs, "images": manifest.rows("train")})

    with as_prefect_knows_it():
        return run.train(config, manifest, on_epoch, on_now)


@task(**STEP, timeout_seconds=HOUR)
def export(config: RunConfig, manifest: Manifest, training: Training) -> Exported:
    """Write the candidate as safetensors, ONNX and torch.export's archive."""
    return run.export(config, manifest, training)


@task(**STEP, timeout_seconds=HOUR)
def evaluate(config: RunConfig, manifest: Manifest, exported: Exported) -> Evaluation:
    """Judge all forms of the candidate in the store on the test shards."""
    return run.evaluate(config, manifest, exported)


@task(**STEP, timeout_seconds=HOUR)
def publish(config: RunConfig, manifest: Manifest, training: Training, evaluation: Evaluation) -> Published:
    """Publish model and report, and show both in Prefect."""
    published = run.publish(config, manifest, training, evaluation)
    create_markdown_artifact(render_summary(published.run_id, training, evaluation), key="training-report")
    create_image_artifact(curves_image(training.history), key="training-curves", description=config.run_id)
    create_link_artifact(published.report, key="report-page", link_text=f"Report of {config.run_id}")
    return published


@task(**STEP, timeout_seconds=HOUR)
def promote(config: RunConfig) -> Comparison:
    """Register the model, and make it the champion if it is better."""
    comparison = run.promote(config)
    create_markdown_artifact(render_decision(config.model, comparison), key="promotion")
    if config.promote and not comparison.promoted:
        notify(f"{config.run_id} is not the champion of {config.model}", "; ".join(comparison.reasons))
    return comparison


def name_run(parameters: dict[str, Any], started: datetime | None, flow_run_id: object) -> str:
    """The run id asked for, or one that stays the same however often the flow run is taken up again."""
    if asked := parameters.get("run_id"):
        return str(asked)
    recipe = re.sub(r"[^a-z0-9._-]+", "-", Path(parameters["recipe"]).stem.lower())[:32]  # a file's, perhaps
    return f"{parameters['dataset']}-{recipe}-{started:%Y%m%d-%H%M%S}-{str(flow_run_id)[:8]}"


def _flow_run_name() -> str:
    """Dataset, recipe and workers, as the runs' list shows them."""
    parameters = flow_run.parameters
    workers = ClusterConfig.model_validate({name: parameters[name] for name in ClusterConfig.model_fields}).wanted
    return f"{parameters['dataset']} {Path(parameters['recipe']).stem} on {workers} worker{'s' * (workers != 1)}"


@flow(name="train-lenet", flow_run_name=_flow_run_name, on_failure=[on_failure])
@with_parameters(RunConfig)
def train_lenet(**parameters: Any) -> Published:
    """Download a dataset, shard it to Parquet, train LeNet on Ray, evaluate, publish, promote the better."""
    for name in ("pipeline", "flows", "now"):
        logging.getLogger(name).setLevel(logging.INFO)
    run_id = name_run(parameters, flow_run.scheduled_start_time, flow_run.id)
    config = begin(config_of(parameters, RunConfig), run_id)
    source = download(config)
    manifest = shard(config, source)
    training = train(config, manifest)
    exported = export(config, manifest, training)
    evaluation = evaluate(config, manifest, exported)
    published = publish(config, manifest, training, evaluation)
    promote(config)
    return published
