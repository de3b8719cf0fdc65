"""Proves on a real Ray that a search looks where it is told to, at validation alone, and gives back its best."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.tune
from lenet.recipe import RECIPES
from pipeline.errors import DataError, PipelineError, Terminated, TrainingError
from pipeline.placement import ClusterConfig
from pipeline.recipe import TrainConfig, TuneConfig, encode_recipe, varied
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest
from pipeline.source import Source
from pipeline.storage import Store, open_store
from pipeline.tune import Tuned, tune
from pipeline.tune import _train as train
from tests.conftest import refusal

# With sigmoids, nine epochs of 480 images teach nothing.
BASE = varied(RECIPES["classic"], {"epochs": 9, "global_batch_size": 32})
SEARCH = TuneConfig(vary=("lr", "momentum", "shift"), trials=4)


def on_a_machine_with_a_gpu(parameters: dict[str, Any], **given: Any) -> None:
    """The trial, where torch finds a GPU, though it was given none."""
    torch.cuda.is_available = lambda: True
    train(parameters, **given)


def finding_a_torn_shard(parameters: dict[str, Any], **given: Any) -> None:
    raise DataError("train-00000.parquet: torn; shard again")


def going_wrong(parameters: dict[str, Any], **given: Any) -> None:
    raise ZeroDivisionError("division by zero")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("tune")))


@pytest.fixture(scope="module")
def manifest(store: Store, small_source: Source) -> Manifest:
    manifest = write_shards(store, small_source, ShardConfig(validation_fraction=0.2))
    for shard in manifest.splits["test"]:
        store.delete(f"{manifest.folder}/{shard.name}")  # whoever looks at the test images fails
    return manifest


@pytest.fixture(scope="module")
def tuned(store: Store, manifest: Manifest) -> Tuned:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline.tune, "_train", on_a_machine_with_a_gpu)
        return tune(store, manifest, BASE, 0, SEARCH, ClusterConfig(workers=2, gpu="no"))


def test_every_trial_lies_within_the_ranges(tuned: Tuned) -> None:
    assert len(tuned.trials) == SEARCH.trials
    for trial in tuned.trials:
        assert list(trial.parameters) == list(SEARCH.vary)
        assert BASE.lr / 4 <= trial.parameters["lr"] <= BASE.lr * 4
        assert 0.8 <= trial.parameters["momentum"] <= 0.98
        assert trial.parameters["shift"] in {0, 1, 2, 3}
        assert 0 <= trial.accuracy <= 1
    assert len({trial.parameters["lr"] for trial in tuned.trials}) == SEARCH.trials


def test_poor_trials_end_early_and_the_best_trained_to_the_end(tuned: Tuned) -> None:
    epochs = [trial.epochs for trial in tuned.trials]
    assert epochs[0] == BASE.epochs
    assert epochs[-1] < BASE.epochs
    finished = [trial.accuracy for trial in tuned.trials if trial.epochs == BASE.epochs]
    assert tuned.trials[0].accuracy == max(finished)


def test_the_recipe_is_the_best_trials_and_a_run_accepts_its_file(tuned: Tuned, tmp_path: Path) -> None:
    best = tuned.trials[0].parameters
    assert tuned.recipe == varied(BASE, {**best, "name": "classic-tuned"})
    file = tmp_path / "tuned.json"
    file.write_bytes(encode_recipe(tuned.recipe))
    assert TrainConfig(recipe=str(file)).resolved() == tuned.recipe


@pytest.mark.parametrize(
    ("trial", "kind", "said"),
    [
        (finding_a_torn_shard, DataError, "train-00000.parquet: torn; shard again"),
        (going_wrong, TrainingError, "every trial failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_search_whose_trials_all_fail_says_why_in_a_line(
    store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    trial: Callable[..., None], kind: type[PipelineError], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline.tune, "_train", trial)
    monkeypatch.setattr(logging.getLogger("ray.tune"), "parent", logging.getLogger())  # for caplog
    few, cluster = TuneConfig(vary=("lr",), trials=2), ClusterConfig(workers=2, gpu="no")
    assert refusal(lambda: tune(store, manifest, BASE, 0, few, cluster), kind) == said
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "it has a traceback"
    one, other = [message for message in caplog.messages if " failed: " in message]
    assert one.startswith("trial 1 of 2 failed: ")
    assert other.startswith("trial 2 of 2 failed: ")
    assert other.endswith(said.removeprefix("every trial failed: "))


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
@pytest.mark.usefixtures("interruptible")
def test_a_search_that_is_to_end_does(
    store: Store, manifest: Manifest, number: signal.Signals, raised: type[BaseException]
) -> None:
    class EndUs(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("trial 1 of"):
                os.kill(os.getpid(), number)

    handler, log = EndUs(), logging.getLogger("pipeline.tune")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    many = TuneConfig(vary=("lr",), trials=100)
    try:
        with pytest.raises(KeyboardInterrupt) as ended:
            tune(store, manifest, BASE, 0, many, ClusterConfig(workers=2, gpu="no"))
    finally:
        log.removeHandler(handler)
    assert type(ended.value) is raised
