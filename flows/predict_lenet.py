"""The flow `predict-lenet`: one task, one call into `pipeline.batch`."""

import logging
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from flows.notify import on_failure
from flows.parameters import with_parameters
from flows.train_lenet import STEP, as_prefect_knows_it
from pipeline import batch
from pipeline.batch import BatchReport, PredictConfig, render_batch
from pipeline.config import config_of


@task(**STEP)  # as long as it takes: a job that broke off goes on where it stopped
def predict(config: PredictConfig) -> BatchReport:
    """Predict all images of the source, and show in Prefect what came of it."""
    with as_prefect_knows_it():
        report = batch.predict_batch(config)
    create_markdown_artifact(render_batch(report), key="predictions")
    return report


@flow(name="predict-lenet", on_failure=[on_failure])
@with_parameters(PredictConfig)
def predict_lenet(**parameters: Any) -> BatchReport:
    """Predict pictures or Parquet with a published model, on Ray, and publish the predictions as Parquet."""
    logging.getLogger("pipeline").setLevel(logging.INFO)
    return predict(config_of(parameters, PredictConfig))
