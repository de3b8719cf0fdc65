"""Proves that only those failures of a step are tried again that may pass, and that a person is told of it."""

import logging
from typing import Any

import pytest
from prefect.states import Failed

from flows.train_lenet import _may_pass, shard
from pipeline.errors import ClusterError, ConfigError, DataError, StorageError, TrainingError


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
