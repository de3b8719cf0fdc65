"""Proves on a real Ray that the result depends on neither the number of workers nor on workers and drivers dying."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import safetensors.torch
import torch
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.worker_group.thread_runner import ThreadRunner
from torch.nn import functional as F

import pipeline.train
import pipeline.worker
from lenet.recipe import RECIPES
from lenet.step import evaluate_step, metrics_of
from pipeline.checkpoint import FILE_NAME, EpochMetrics, decode_model, read_state
from pipeline.errors import DataError, Terminated
from pipeline.idx import Pixels
from pipeline.lease import Lease, lease_key, read_lease
from pipeline.loader import LoadConfig, Loading
from pipeline.order import permutation
from pipeline.placement import ClusterConfig
from pipeline.recipe import TrainConfig
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest, read_rows
from pipeline.source import Source
from pipeline.storage import Store, open_store
from pipeline.train import Training, find_training, fit, staging
from pipeline.worker import train_worker
from tests.conftest import processes_with, refusal, wait_for
from tests.pipeline.conftest import assert_close

Splits = dict[str, tuple[Pixels, Pixels]]
Weights = dict[str, torch.Tensor]

SMALL_RUN = TrainConfig(epochs=12, global_batch_size=64, lr=0.5, seed=3)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    # Room for 4 workers, however many cores there are: the tests are about exactness, not speed.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def weights(store: Store, run_id: str) -> Weights:
    training = find_training(store, run_id)
    assert training is not None
    return safetensors.torch.load(store.read(training.candidate))


def plain_training(images: Pixels, labels: Pixels, config: TrainConfig) -> tuple[Weights, list[float]]:
    """The same training in the plainest words: one process, mean cross-entropy, w -= lr * gradient."""
    recipe = config.resolved()
    model = RECIPES["seed"].build_model(10, config.seed)
    losses = []
    for epoch in range(1, recipe.epochs + 1):
        order = permutation(len(labels), config.seed, epoch)
        total = 0.0
        for first in range(0, len(order), recipe.global_batch_size):
            rows = order[first : first + recipe.global_batch_size]
            x = torch.from_numpy(images[rows]).float().unsqueeze(1) / 255
            loss = F.cross_entropy(model(x), torch.from_numpy(labels[rows]).long())
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= recipe.lr * parameter.grad
            total += loss.item() * len(rows)
        losses.append(total / len(order))
    return {name: value.detach() for name, value in model.state_dict().items()}, losses


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def manifest(small_store: Store, small_manifest: Callable[[Store], Manifest]) -> Manifest:
    return small_manifest(small_store)


@pytest.fixture(scope="module")
def undisturbed(small_store: Store, manifest: Manifest) -> Weights:
    """What two workers give when nothing happens to them."""
    fit(small_store, "undisturbed", manifest, SMALL_RUN, ClusterConfig(workers=2, gpu="no"), LoadConfig())
    return weights(small_store, "undisturbed")


def test_two_workers_compute_what_a_plain_loop_computes(
    small_store: Store, manifest: Manifest, undisturbed: Weights, small_splits: Splits
) -> None:
    expected, losses = plain_training(*small_splits["train"], SMALL_RUN)
    assert_close(undisturbed, expected)
    training = find_training(small_store, "undisturbed")
    assert training is not None
    np.testing.assert_allclose([epoch.train_loss for epoch in training.history], losses, rtol=1e-5)
    assert [epoch.epoch for epoch in training.history] == list(range(1, 13))


@pytest.fixture(scope="module")
def full_store(tmp_path_factory: pytest.TempPathFactory, fashion_mnist: Source) -> tuple[Store, Manifest]:
    """All 60,000 and 10,000 images."""
    store = open_store(str(tmp_path_factory.mktemp("full")))
    return store, write_shards(store, fashion_mnist, ShardConfig())


def looked_at_slowly(config: dict[str, Any]) -> None:
    """The worker, in a process that Ray Train finds running, or not, a while after it has asked for a report."""
    is_running = ThreadRunner.is_running

    def late(runner: ThreadRunner) -> bool:
        time.sleep(1)
        return is_running(runner)

    ThreadRunner.is_running = late  # type: ignore[method-assign]
    train_worker(config)


def test_one_to_four_workers_agree_after_an_epoch_of_all_60000_images_and_so_do_two_then_one_then_three(
    full_store: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In mid-epoch, twice, the process that trains is killed, and another goes on with other workers, the second time
    from the checkpoint before the newest, which is damaged. And a worker that ends right after its last report, an
    epoch longer than a look, is heard."""
    store, manifest = full_store
    caplog.set_level(logging.INFO, "pipeline.worker")
    config = TrainConfig(epochs=1, shift=1, checkpoint_steps=20)

    def train(run_id: str, loading: Loading, workers: int) -> Training:
        load, cluster = LoadConfig(loading=loading), ClusterConfig(workers=workers, gpu="no")
        return fit(store, run_id, manifest, config, cluster, load)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.train, "train_worker", looked_at_slowly)
        trainings = {"streaming-1": train("streaming-1", "streaming", 1)}
    others: list[tuple[Loading, int]] = [("streaming", 4), ("resident", 1), ("resident", 2), ("resident", 3)]
    for loading, workers in others:
        trainings[f"{loading}-{workers}"] = train(f"{loading}-{workers}", loading, workers)
    for workers, checkpoints in ((2, 1), (1, 2)):
        kill_in_mid_epoch(store, "killed", manifest, workers, checkpoints)
    before = damage_the_newest(store, "killed")
    trainings["killed"] = train("killed", "streaming", 3)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.endswith("; going back to the one before")]
    assert [line for line in said if line.startswith("rank 0: on ") and line.endswith(f" epoch 1, step {before + 1}")]
    # A local Ray goes with its driver; but a process that was being started waits a minute for its server.
    wait_for(lambda: not processes_with("LENET_TEST", "killed"))
    for run_id, training in trainings.items():
        alike = "resident-1" if run_id.startswith("resident") else "streaming-1"  # each has an order of its own
        assert_close(weights(store, run_id), weights(store, alike))
        (epoch,), (expected,) = training.history, trainings[alike].history
        assert epoch.train_loss == pytest.approx(expected.train_loss, rel=1e-6)
        assert epoch.train_accuracy == pytest.approx(expected.train_accuracy, abs=2e-4)


def states(store: Store, run_id: str) -> dict[str, int]:
    """Key of each state that a run's checkpoints hold, and its step."""
    keys = [key for key in store.keys(f"{staging(run_id)}/ray") if key.endswith(FILE_NAME)]
    return {key: read_state(store.read(key))[1].step for key in keys}


def damage_the_newest(store: Store, run_id: str) -> int:
    """Flip a bit in the newest of a run's states, all of one epoch; the step of the one before."""
    *_, (before, _), (_, newest) = sorted((step, key) for key, step in states(store, run_id).items())
    data = bytearray(store.read(newest))
    data[len(data) // 2] ^= 1
    Path(store.path(newest)).write_bytes(data)
    return before


def kill_in_mid_epoch(store: Store, run_id: str, manifest: Manifest, workers: int, checkpoints: int) -> None:
    """Start a streaming training in a process of its own, and SIGKILL it when it has kept so many checkpoints."""
    script = f"""
from pipeline.placement import ClusterConfig
from pipeline.lease import Lease, lease_key, read_lease
from pipeline.loader import LoadConfig, Loading, Place
from pipeline.shards import require_manifest
from pipeline.storage import open_store
from pipeline.recipe import TrainConfig
from pipeline.train import fit
store = open_store({store.url!r})
manifest = require_manifest(store, {manifest.folder!r})
fit(store, {run_id!r}, manifest, TrainConfig(epochs=1, shift=1, checkpoint_steps=20),
    ClusterConfig(workers={workers}, cpus_per_worker=0.5, gpu="no"), LoadConfig(loading="streaming"))
"""
    before = set(store.keys(f"{staging(run_id)}/ray"))  # what an attempt before this one has left
    driver = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "LENET_TEST": run_id})
    seen: set[str] = set()

    def written() -> bool:
        # Two stay, so they are counted as they appear; a new attempt's names do not repeat the old ones.
        seen.update(key for key in store.keys(f"{staging(run_id)}/ray") if key.endswith(FILE_NAME))
        return len(seen - before) >= checkpoints

    wait_for(written)
    driver.kill()
    driver.wait()
    # Its workers outlive it by two seconds, and may keep one more state.
    wait_for(lambda: not processes_with("LENET_TEST", run_id, "RayTrainWorker"))
    assert find_training(store, run_id) is None, "it was over before it could be killed"
    assert seen


def test_more_workers_than_images_in_the_last_batch_agree_too(
    small_store: Store, manifest: Manifest, small_splits: Splits
) -> None:
    # Of 600, batches of 599 leave a last one of 1 image for 2 workers, so one worker has none.
    config = TrainConfig(epochs=2, global_batch_size=599, lr=0.5, seed=1)
    fit(small_store, "starved", manifest, config, ClusterConfig(workers=2, gpu="no"), LoadConfig())
    assert_close(weights(small_store, "starved"), plain_training(*small_splits["train"], config)[0])


def test_a_finished_training_is_not_repeated(
    small_store: Store, manifest: Manifest, undisturbed: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.train, "held", None)  # nothing begins: not even the lease is asked for
    found = fit(small_store, "undisturbed", manifest, SMALL_RUN, ClusterConfig(workers=2, gpu="no"), LoadConfig())
    assert found == find_training(small_store, "undisturbed")


def test_a_worker_killed_in_epoch_2_is_told_of_and_changes_no_byte(
    small_store: Store, manifest: Manifest, undisturbed: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[int] = []

    def kill_one(epoch: EpochMetrics) -> None:
        if epoch.epoch == 1 and not killed:
            worker = ray_processes("RayTrainWorker")[0]
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    training = fit(
        small_store, "worker-killed", manifest, SMALL_RUN, ClusterConfig(workers=2, gpu="no"), LoadConfig(), kill_one
    )
    assert len(killed) == 1
    told, *_ = [record.message for record in caplog.records if "start again" in record.message]
    # The rank that waited for it may have failed for that by the time Ray Train looks.
    assert re.search(r"rank \d: its process has died: it was killed, or it crashed[.;]", told)
    assert told.endswith(". All ranks start again, from the last checkpoint")
    assert [epoch.epoch for epoch in training.history] == list(range(1, 13))
    for name, value in weights(small_store, "worker-killed").items():
        assert torch.equal(value, undisturbed[name]), name
    first = find_training(small_store, "undisturbed")
    assert first is not None
    assert training.candidate_sha256 == first.candidate_sha256


def test_workers_of_whom_one_is_killed_while_they_meet_are_replaced(
    small_store: Store,
    manifest: Manifest,
    undisturbed: Weights,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on_start, killed = _TorchBackend.on_start, list[int]()

    def kill_one(backend: _TorchBackend, workers: Any, config: Any) -> None:
        if not killed:
            worker = ray_processes("RayTrainWorker")[0]
            worker.kill()
            worker.wait()
            killed.append(worker.pid)
        on_start(backend, workers, config)

    monkeypatch.setattr(_TorchBackend, "on_start", kill_one)
    all_there_is = ClusterConfig(workers=2, cpus_per_worker=2, gpu="no")  # so the places of the first are needed
    fit(small_store, "killed-meeting", manifest, SMALL_RUN, all_there_is, LoadConfig())
    assert len(killed) == 1
    assert_close(weights(small_store, "killed-meeting"), undisturbed)
    assert "its process has died: it was killed, or it crashed. All ranks start again" in caplog.text


def test_the_end_that_comes_too_late_for_the_workers_is_one_all_the_same(
    small_store: Store, manifest: Manifest, undisturbed: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = os.getpid()

    def end_the_driver(config: dict[str, Any]) -> None:
        train_worker(config)
        os.kill(driver, signal.SIGTERM)

    monkeypatch.setattr(pipeline.train, "train_worker", end_the_driver)
    one = ClusterConfig(workers=1, gpu="no")
    with pytest.raises(Terminated):
        fit(small_store, "late", manifest, SMALL_RUN, one, LoadConfig())
    assert_close(weights(small_store, "late"), undisturbed)
    fit(small_store, "late", manifest, SMALL_RUN, one, LoadConfig())  # and is there for whoever goes on


def test_the_modern_recipe_learns_the_same_with_workers_that_share_its_updates(
    small_store: Store, manifest: Manifest
) -> None:
    """Muon works in bfloat16, so that rounding tells: seen, 3e-5 of the loss."""
    losses = []
    for workers in (1, 2):
        cluster = ClusterConfig(workers=workers, gpu="no")
        config = TrainConfig(recipe="modern", epochs=3, checkpoint_steps=2)
        training = fit(small_store, f"modern-{workers}", manifest, config, cluster, LoadConfig())
        losses.append([epoch.train_loss for epoch in training.history])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_standardised_training_gives_a_model_for_plain_pixels_and_looks_at_no_test_images(
    tmp_path: Path, small_source: Source
) -> None:
    store = open_store(str(tmp_path))
    manifest = write_shards(store, small_source, ShardConfig(validation_fraction=0.2))
    for shard in manifest.splits["test"]:
        store.delete(f"{manifest.folder}/{shard.name}")
    config = SMALL_RUN.model_copy(update={"standardise": True, "epochs": 3})
    training = fit(store, "standard", manifest, config, ClusterConfig(workers=1, gpu="no"), LoadConfig())
    assert {epoch.held_out for epoch in training.history} == {"validation"}
    model = decode_model(store.read(training.candidate))
    images, labels = read_rows(store, manifest, "validation", 0, manifest.rows("validation"))
    found = metrics_of(evaluate_step(model, torch.from_numpy(images), torch.from_numpy(labels)))
    assert found.loss == pytest.approx(training.history[-1].held_out_loss, rel=1e-5)
    pixels = read_rows(store, manifest, "train", 0, manifest.rows("train"))[0] / 255
    assert (manifest.report.pixel_mean, manifest.report.pixel_std) == pytest.approx((pixels.mean(), pixels.std()))


def test_a_training_that_was_superseded_follows_and_takes_over_again(
    small_store: Store, manifest: Manifest, undisturbed: Weights
) -> None:
    """Its next checkpoint is refused before its own next beat finds out."""
    key, folder = lease_key(staging("superseded")), staging("superseded")
    one = f"{folder}/progress/00001.json"

    def take_over(epoch: EpochMetrics) -> None:
        lease = read_lease(small_store, key)
        assert lease is not None
        if lease.token == 1:  # by one who then gives up, and had not told of an epoch whose state it kept
            small_store.put(key, Lease(token=2, holder=None).encode())
            small_store.delete(one)

    training = fit(
        small_store, "superseded", manifest, SMALL_RUN, ClusterConfig(workers=1, gpu="no"), LoadConfig(), take_over
    )
    assert [epoch.epoch for epoch in training.history] == list(range(1, 13))
    assert_close(weights(small_store, "superseded"), undisturbed)
    assert small_store.exists(one)
    # Of the first holder, what the third began with; of the second nothing.
    assert {key.split("/")[3] for key in states(small_store, "superseded")} == {"1", "3"}


def test_a_damaged_shard_that_a_worker_comes_upon_is_told_and_not_come_upon_again(
    tmp_path: Path, small_source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    manifest = write_shards(store, small_source, ShardConfig())
    shard = f"{manifest.folder}/{manifest.splits['train'][0].name}"
    (tmp_path / shard).write_bytes(store.read(shard)[::-1])
    told = refusal(
        lambda: fit(store, "r", manifest, SMALL_RUN, ClusterConfig(workers=1, gpu="no"), LoadConfig()), DataError
    )
    assert told.startswith(store.locate(shard))
    assert "start again" not in caplog.text


def ray_processes(kind: str) -> list[psutil.Process]:
    """Processes of this test's own Ray whose title says `kind`."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    return [p for p in psutil.process_iter(["cmdline"]) if p.pid in mine and kind in " ".join(p.info["cmdline"] or [])]
