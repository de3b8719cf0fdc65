"""Proves on a real Ray of several nodes that training survives what happens to machines, and that the weights are those
of a training that nothing happened to."""

import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util.placement_group import placement_group, remove_placement_group

import pipeline.train
import pipeline.worker
from pipeline.checkpoint import FILE_NAME, EpochMetrics, decode_model, read_state
from pipeline.errors import ClusterError, ConfigError, Terminated
from pipeline.lease import ask_to_stop, lease_key
from pipeline.loader import LoadConfig, Place, ResidentLoader
from pipeline.placement import ClusterConfig
from pipeline.recipe import TrainConfig
from pipeline.shards import Manifest
from pipeline.storage import Store, open_store
from pipeline.train import Training, find_training, fit, staging
from pipeline.worker import Job, open_learner, train_worker
from tests.conftest import wait_for
from tests.pipeline.conftest import TOLERANCE

# Long enough to be disturbed, and so gentle that float32's rounding does not grow.
EPOCHS = 60
RUN = TrainConfig(epochs=EPOCHS, global_batch_size=64, lr=0.1, seed=3)
TWO_ON_A_CLUSTER = ClusterConfig(workers=2, gpu="no", ray_address="auto")
WhenEpoch = Callable[[EpochMetrics], None]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("faults")))


@pytest.fixture(scope="module")
def manifest(store: Store, small_manifest: Callable[[Store], Manifest]) -> Manifest:
    return small_manifest(store)


@pytest.fixture(scope="module")
def _cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each, and this process connected."""
    ray.shutdown()
    cluster = Cluster(
        initialize_head=True, shutdown_at_exit=False, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    """The cluster, as soon as it has two CPUs, whatever has gone of it."""
    wait_for(lambda: ray.cluster_resources().get("CPU") == 2)  # type: ignore[no-untyped-call]
    return _cluster


@pytest.fixture(scope="module")
def undisturbed() -> Callable[[Manifest, Store, TrainConfig], dict[str, torch.Tensor]]:
    """Function that gives the weights after the same training in this process alone, to which nothing happens."""

    def train(manifest: Manifest, store: Store, config: TrainConfig) -> dict[str, torch.Tensor]:
        recipe, device = config.resolved(), torch.device("cpu")
        place = Place(store, manifest, "train", config.seed, recipe.global_batch_size, 0, 1, device)
        model, gradient, optimization = open_learner(recipe, manifest, config.seed, device, place.steps)
        loader = ResidentLoader(place)
        for epoch in range(1, recipe.epochs + 1):
            for batch in loader.batches(epoch):
                gradient(batch.images, batch.labels, global_batch=batch.size)
                optimization.step(0)
        return model.state_dict()

    return train


Undisturbed = Callable[[Manifest, Store, TrainConfig], dict[str, torch.Tensor]]


def assert_same(store: Store, training: Training, expected: dict[str, torch.Tensor], epochs: int) -> None:
    found = decode_model(store.read(training.candidate)).state_dict()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=TOLERANCE, msg=name)
    assert [epoch.epoch for epoch in training.history] == list(range(1, epochs + 1))


def once_after(epochs: int, act: Callable[[], None]) -> tuple[WhenEpoch, list[Future[None]]]:
    """A callback that acts after so many epochs, in a thread of its own, and what came of it."""
    pool = ThreadPoolExecutor(1)
    acted: list[Future[None]] = []

    def on_epoch(epoch: EpochMetrics) -> None:
        if epoch.epoch >= epochs and not acted:
            acted.append(pool.submit(act))

    return on_epoch, acted


def positions(store: Store, run_id: str) -> list[tuple[int, int]]:
    """Epoch and step of the checkpoints there are."""
    keys = [key for key in store.keys(f"{staging(run_id)}/ray") if key.endswith(FILE_NAME)]
    found = [read_state(store.read(key))[1] for key in keys]
    return [(position.epoch, position.step) for position in found]


def test_more_workers_than_there_is_room_for_are_refused_at_once(
    store: Store, manifest: Manifest, cluster: Cluster
) -> None:
    started = time.monotonic()
    with pytest.raises((ConfigError, ClusterError), match=r"^workers=\S+: Ray has room for 2 on 2 CPUs"):
        fit(store, "crowded", manifest, RUN, ClusterConfig(workers=3, gpu="no", ray_address="auto"), LoadConfig())
    assert time.monotonic() - started < 30


def finding_its_checkpoint_torn(config: dict[str, Any]) -> None:
    """The worker; when it has been started again, the checkpoint to go on from is torn."""
    job: Job = config["job"]
    if newest := ray.train.get_checkpoint():
        Path(open_store(job.store_url).path(job.state_key(Path(newest.path).name))).write_bytes(b"")
    train_worker(config)


def test_a_node_killed_in_mid_training_changes_nothing_nor_does_a_checkpoint_torn_meanwhile(
    store: Store, manifest: Manifest, undisturbed: Undisturbed, cluster: Cluster, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline.train, "train_worker", finding_its_checkpoint_torn)

    def kill_one() -> None:
        wait_for(lambda: caplog.text.count("from epoch 1, step") == 2)
        # The second of the list: the first is the head, and it is the workers' nodes that fail.
        cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
        cluster.add_node(num_cpus=1)  # after it: training may be over before a node has come

    caplog.set_level(logging.INFO)
    on_epoch, acted = once_after(2, kill_one)
    training = fit(store, "node-killed", manifest, RUN, TWO_ON_A_CLUSTER, LoadConfig(), on_epoch)
    [killed] = acted
    killed.result()
    assert "going back to the one before" in caplog.text
    begun = [int(epoch) for epoch in re.findall(r"rank \d: on cpu of .*, from epoch (\d+), step", caplog.text)]
    assert begun[:2] == [1, 1]
    assert min(begun[2:]) > 1, "the one before was whole"
    assert_same(store, training, undisturbed(manifest, store, RUN), EPOCHS)


def taking_its_time(config: dict[str, Any]) -> None:
    """The worker, whose epoch of 38 steps takes 19 s on any machine."""
    word = pipeline.worker.Watch.word

    def wait(watch: Any, loss: torch.Tensor, step: int) -> torch.Tensor:
        time.sleep(0.5)
        return word(watch, loss, step)

    pipeline.worker.Watch.word = wait  # type: ignore[method-assign]
    train_worker(config)


def test_a_node_about_to_go_is_left_with_a_checkpoint(
    store: Store, manifest: Manifest, undisturbed: Undisturbed, cluster: Cluster, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """What a cloud does with a spot machine: a notice, and soon after the end."""
    monkeypatch.setattr(pipeline.train, "train_worker", taking_its_time)

    def drain_one() -> None:
        wait_for(lambda: caplog.text.count("from epoch 1, step 1") == 2)
        node, why = cluster.list_all_nodes()[1].node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        end = time.time_ns() // 1_000_000 + 8_000
        accepted, refusal = GcsClient(cluster.address).drain_node(node, why, "spot", end)
        assert accepted, refusal
        cluster.add_node(num_cpus=1)

    caplog.set_level(logging.INFO)
    config = RUN.model_copy(update={"epochs": 1, "global_batch_size": 16, "checkpoint_seconds": 1e6})
    drained = ThreadPoolExecutor(1).submit(drain_one)
    training = fit(store, "drained", manifest, config, TWO_ON_A_CLUSTER, LoadConfig())
    drained.result()
    assert "the machine of rank" in caplog.text
    begun = [int(step) for step in re.findall(r"rank \d: on cpu of .*, from epoch 1, step (\d+)", caplog.text)]
    assert begun[:2] == [1, 1]
    assert begun[2:], "the node did not go"
    assert min(begun[2:]) > 1, "there was no checkpoint in mid-epoch"
    assert_same(store, training, undisturbed(manifest, store, config), 1)


def test_asked_to_stop_a_training_of_one_step_an_epoch_ends_with_a_checkpoint(
    store: Store, manifest: Manifest, cluster: Cluster
) -> None:
    config = RUN.model_copy(update={"global_batch_size": 600, "epochs": 500})
    on_epoch, _ = once_after(1, lambda: ask_to_stop(store, lease_key(staging("one-step")), None))
    with pytest.raises(Terminated):
        fit(store, "one-step", manifest, config, ClusterConfig(workers=1, gpu="no"), LoadConfig(), on_epoch)
    assert positions(store, "one-step")


def test_asked_to_stop_while_no_worker_can_be_placed_it_ends(
    store: Store, manifest: Manifest, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    others = placement_group([{"CPU": 1}] * 2)
    ray.get(others.ready())
    key = lease_key(staging("waiting"))

    def ask() -> None:
        wait_for(lambda: store.exists(key))
        ask_to_stop(store, key, None)

    pool = ThreadPoolExecutor(1)
    pool.submit(ask)
    try:
        with pytest.raises(Terminated):
            fit(store, "waiting", manifest, RUN, ClusterConfig(workers=1, gpu="no"), LoadConfig())
    finally:
        remove_placement_group(others)


def waiting_for_a_third(config: dict[str, Any]) -> None:
    """The worker, which after three epochs with two workers waits for what becomes of it."""
    save = pipeline.worker._save

    def wait(session: Any, position: Any, metrics: dict[str, Any]) -> None:
        save(session, position, metrics)
        if position.epoch > 3 and session.place.world_size == 2:
            time.sleep(300)

    pipeline.worker._save = wait
    train_worker(config)


def test_a_range_of_workers_starts_with_those_there_is_room_for_and_grows(
    store: Store, manifest: Manifest, undisturbed: Undisturbed, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.RESIZE_S", 1)
    monkeypatch.setattr(pipeline.train, "train_worker", waiting_for_a_third)
    on_epoch, acted = once_after(1, lambda: cluster.add_node(num_cpus=1) and None)
    elastic = ClusterConfig(workers="2-3", gpu="no", ray_address="auto")
    config = RUN.model_copy(update={"epochs": 10})
    sizes: list[int] = []

    def watch(epoch: EpochMetrics) -> None:
        on_epoch(epoch)
        sizes.append(epoch.world_size)

    training = fit(store, "elastic", manifest, config, elastic, LoadConfig(), watch)
    [added] = acted
    added.result()
    assert (sizes[0], training.history[-1].world_size) == (2, 3)
    assert sizes == sorted(sizes)
    assert_same(store, training, undisturbed(manifest, store, config), 10)


DRIVER = """
from pipeline.placement import ClusterConfig
from pipeline.loader import LoadConfig, Place, ResidentLoader
from pipeline.recipe import TrainConfig
from pipeline.shards import require_manifest
from pipeline.storage import open_store
from pipeline.train import fit
store = open_store({url!r})
fit(store, {run_id!r}, require_manifest(store, {folder!r}), TrainConfig.model_validate({config!r}),
    ClusterConfig(workers=2, cpus_per_worker=0.5, gpu="no"), LoadConfig())
"""


def start_driver(store: Store, run_id: str, manifest: Manifest, config: TrainConfig) -> subprocess.Popen[str]:
    """A process of its own that trains on a local Ray."""
    given = config.model_dump(exclude_none=True)
    script = DRIVER.format(url=store.url, run_id=run_id, folder=manifest.folder, config=given)
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def test_sigterm_ends_training_with_a_checkpoint_in_mid_epoch(
    store: Store, manifest: Manifest, undisturbed: Undisturbed
) -> None:
    # Of a third of a second each, where the workers look every two seconds whether they are to end.
    config = RUN.model_copy(update={"epochs": 24, "global_batch_size": 1, "lr": 0.001})
    driver = start_driver(store, "terminated", manifest, config)
    wait_for(lambda: store.exists(f"{staging('terminated')}/progress/00002.json"))
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=600)
    assert driver.returncode != 0
    assert "pipeline.errors.Terminated" in err
    assert find_training(store, "terminated") is None
    epoch, step = max(positions(store, "terminated"))
    assert epoch > 2
    assert 0 < step < 600
    training = fit(store, "terminated", manifest, config, ClusterConfig(workers=1, gpu="no"), LoadConfig())
    assert_same(store, training, undisturbed(manifest, store, config), 24)
