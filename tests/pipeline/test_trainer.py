"""Proves how a failure is told, and what is made of it."""

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import ControllerError, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig

from pipeline.errors import DataError, StorageError
from pipeline.trainer import Elastic, Failures, cause_of, mistake_of


def test_of_a_page_about_memory_a_line_is_left() -> None:
    page = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: e0e4ad) "
        "was 7.20GB used / 23.54GB limit (0.305837)\nOOM kill reason: Memory usage exceeded\nRefer to the documentation"
    )
    assert cause_of(OutOfMemoryError(page)) == (
        "10.0.0.7 has run out of memory (7.20GB of 23.54GB used): ask for fewer workers, or more memory"
    )


def test_of_a_traceback_the_message_is_left() -> None:
    assert (
        cause_of(RuntimeError("Traceback (most recent call last):\n  File ...\nDataError: torn\n")) == "DataError: torn"
    )
    assert cause_of(KeyError()) == "KeyError"


def test_of_a_guess_why_a_process_has_died_a_line_is_left() -> None:
    page = (
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
        "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called."
    )
    assert cause_of(RuntimeError(page)) == "its process has died: it was killed, or it crashed"


def test_of_several_workers_each_is_told_by_its_rank() -> None:
    failure = WorkerGroupError("a page", {1: DataError("torn"), 0: RuntimeError("connection closed by peer.")})
    assert cause_of(failure) == "rank 0: connection closed by peer; rank 1: torn"


def test_what_a_user_has_to_mend_is_found_among_what_came_of_it() -> None:
    torn = DataError("torn")
    assert mistake_of(WorkerGroupError("", {0: RuntimeError("connection closed by peer"), 1: torn})) is torn


@pytest.mark.parametrize(
    ("nodes", "room"), [([1.0], 5), ([0.6, 0.7], 6), ([0.1], 0), ([9.0], 8)], ids=["one", "two", "none", "most"]
)
def test_a_range_of_workers_that_share_cores_finds_the_room_there_is(nodes: list[float], room: int) -> None:
    policy = Elastic(ScalingConfig(num_workers=(5, 8), resources_per_worker={"CPU": 0.2}))
    assert policy._count_possible_workers({str(node): {"CPU": cpus} for node, cpus in enumerate(nodes)}) == room


def test_failures_are_counted_since_the_last_checkpoint() -> None:
    kept = 0
    policy = Failures(FailureConfig(max_failures=2), lambda: kept)
    lost = WorkerGroupError("", {0: RuntimeError("its worker process has died")})
    assert [policy.make_decision(lost) for _ in range(2)] == [FailureDecision.RETRY] * 2
    kept = 3
    found = [policy.make_decision(lost) for _ in range(3)]
    assert found == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]


def test_workers_that_die_before_they_train_are_not_started_without_end() -> None:
    policy = Failures(FailureConfig(max_failures=2), lambda: 0)
    found = [policy.make_decision(WorkerGroupError("its process has died", {})) for _ in range(3)]
    assert found == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]


def test_what_may_pass_is_no_mistake() -> None:
    assert mistake_of(WorkerGroupError("", {0: RuntimeError(), 1: StorageError("it is away")})) is None
    assert mistake_of(ControllerError(RuntimeError())) is None
