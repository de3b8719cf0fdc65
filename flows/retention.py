"""The flow `retention`: one task, one call into `pipeline.retention`."""

import logging
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from flows.notify import on_failure
from flows.parameters import with_parameters
from flows.train_lenet import STEP
from pipeline.config import config_of
from pipeline.retention import Plan, RetentionConfig, retain


@task(**STEP)
def clean(config: RetentionConfig) -> Plan:
    """Find what is old, remove it if that is asked for, and show in Prefect what went or would go."""
    plan = retain(config)
    create_table_artifact(plan.table(), key="retention", description=str(plan))
    return plan


@flow(name="retention", on_failure=[on_failure])
@with_parameters(RetentionConfig)
def retention(**parameters: Any) -> Plan:
    """List, or remove, old runs that are no version of a model, and checkpoints and copies of other old ones."""
    logging.getLogger("pipeline").setLevel(logging.INFO)
    return clean(config_of(parameters, RetentionConfig))
