"""Proves that only those failures of a step are tried again that may pass, and that a person is told of it; and that a
run always has a name."""

import logging
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from prefect.states import Failed

from flows.train_lenet import _may_pass, name_run, shard
from pipeline.errors import ClusterError, ConfigError, DataError, StorageError, TrainingError
from pipeline.run import RunConfig


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (StorageError("s3://bucket: store failed"), True),
        (StorageError("store: no room", may_pass=False), False),
        (ClusterError("no CPU came free"), True),
        (OSError("anything else"), True),
        (ConfigError("lr", 0, "too low", "raise it"), False),
        (DataError("a torn shard"), False),
        (TrainingError("the loss is not finite"), False),
    ],
)
def test_what_may_pass_is_tried_again(error: Exception, again: bool, caplog: pytest.LogCaptureFixture) -> None:
    task_run: Any = None
    logger = logging.getLogger("flows.shard")
    logger.addHandler(caplog.handler)
    try:
        assert _may_pass(shard, task_run, Failed(data=error)) is again
    finally:
        logger.removeHandler(caplog.handler)
    assert (f"{error}; this step is tried again" in caplog.text) is again


@pytest.mark.parametrize("recipe", ["modern", "./mine/Tuned on müde.json", f"/{'x' * 99}.json"])
def test_a_run_without_a_name_gets_one_that_can_be_asked_for_again(recipe: str) -> None:
    parameters = {"dataset": "d" * 64, "recipe": recipe}
    run_id = name_run(parameters, datetime.now(UTC), uuid4())
    assert RunConfig.model_validate({"run_id": run_id}).run_id == run_id
