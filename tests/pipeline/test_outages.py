"""Proves that streamed training outlives an S3 server that goes away for a while, and names what it lost for good."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ray

from pipeline.checkpoint import FILE_NAME, EpochMetrics, read_state
from pipeline.errors import StorageError
from pipeline.loader import LoadConfig
from pipeline.placement import ClusterConfig
from pipeline.progress import PROGRESS
from pipeline.recipe import TrainConfig
from pipeline.shards import Manifest
from pipeline.storage import Store, open_store
from pipeline.train import fit, staging

if TYPE_CHECKING:
    from tests.conftest import S3Server

SMALL_RUN = TrainConfig(epochs=12, global_batch_size=64, lr=0.5, seed=3)


@contextlib.contextmanager
def own_ray(env: dict[str, str]) -> Iterator[None]:
    """A Ray whose processes have these variables."""
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": env},
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def streamed_from_s3(
    own_s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch, small_manifest: Callable[[Store], Manifest]
) -> tuple[Store, Manifest]:
    """The small splits on an S3 server that the test may stop; Ray's workers have its credentials too."""
    for name, value in own_s3_server.env.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{own_s3_server.bucket}/run")
    return store, small_manifest(store)


STREAMING = LoadConfig(loading="streaming")


def test_the_s3_server_stopped_for_10_seconds_in_mid_epoch_is_waited_for(
    streamed_from_s3: tuple[Store, Manifest], own_s3_server: "S3Server", tmp_path: Path
) -> None:
    store, manifest = streamed_from_s3
    cluster = ClusterConfig(workers=2, gpu="no")
    outages: list[Future[datetime]] = []

    def outage() -> datetime:
        own_s3_server.stop()
        time.sleep(10)
        own_s3_server.start()
        return datetime.now(UTC)

    # The server dies with the thread that started it, so that one outlives the training.
    with ThreadPoolExecutor(1) as pool, own_ray(own_s3_server.env):

        def begin_outage(epoch: EpochMetrics) -> None:
            if epoch.epoch == 2:
                outages.append(pool.submit(outage))

        # So many that it is not over when word of the second comes here.
        config = SMALL_RUN.model_copy(update={"epochs": 40})
        training = fit(store, "outage", manifest, config, cluster, STREAMING, begin_outage)
        back = outages[0].result()
        told = store.listing(f"{staging('outage')}/{PROGRESS}")
        after = [key for key, file in told.items() if file.written > back]
        copy = copied(store, open_store(str(tmp_path)), manifest)
        spared = fit(copy, "spared", manifest, config, cluster, STREAMING)
    assert [epoch.epoch for epoch in training.history] == list(range(1, 41))
    assert len(after) > 10, "nobody had to wait"
    assert training.candidate_sha256 == spared.candidate_sha256


def copied(store: Store, into: Store, manifest: Manifest) -> Store:
    """The other store, with the dataset in it."""
    for key in store.keys(manifest.folder):
        into.put(key, store.read(key))
    return into


def test_the_s3_server_stopped_for_good_ends_in_an_error_that_names_the_object(
    streamed_from_s3: tuple[Store, Manifest], own_s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch
) -> None:
    store, manifest = streamed_from_s3
    monkeypatch.setattr("pipeline.train.MAX_FAILURES", 1)  # each start anew takes as long
    stopped: list[float] = []
    patience = {"LENET_S3_OUTAGE_S": "4"}  # one after the other, several requests wait for so long
    monkeypatch.setenv(*next(iter(patience.items())))

    def stop(epoch: EpochMetrics) -> None:
        if epoch.epoch == 2:
            own_s3_server.stop()
            stopped.append(time.monotonic())

    config = SMALL_RUN.model_copy(update={"epochs": 2000})
    with own_ray(own_s3_server.env | patience), pytest.raises(StorageError) as raised:
        fit(store, "lost", manifest, config, ClusterConfig(workers=2, gpu="no"), STREAMING, stop)
    assert time.monotonic() - stopped[0] < 300
    assert re.match(r"(storage=')?s3://lenet-tests/run\S*: store failed", str(raised.value))
    own_s3_server.start()
    last = max(key for key in store.keys(f"{staging('lost')}/ray") if key.endswith(FILE_NAME))  # of one holder
    assert len(read_state(store.read(last))[1].history) >= 2
