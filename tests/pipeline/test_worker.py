"""Proves on a real Ray that each worker follows the recipe, and that a loss which is not finite stops all of them,
as does what goes wrong again and again."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch

import pipeline.train
import pipeline.worker
from lenet.optimize import Optimization
from lenet.recipe import RECIPES
from lenet.step import PlainGradient, evaluate_step, flatten, metrics_of
from pipeline.checkpoint import FILE_NAME, Position, decode_model, encode_model, read_state
from pipeline.errors import TrainingError
from pipeline.loader import LoadConfig, Place, ResidentLoader
from pipeline.placement import ClusterConfig
from pipeline.recipe import TrainConfig
from pipeline.shards import Manifest, read_rows
from pipeline.storage import Store, open_store
from pipeline.train import MAX_FAILURES, find_training, fit, staging
from pipeline.worker import Job, Session, Watch, train_worker
from tests.conftest import refusal
from tests.pipeline.conftest import assert_close

RUN = TrainConfig(epochs=12, global_batch_size=64, lr=0.5, seed=3)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("worker")))


@pytest.fixture(scope="module")
def manifest(store: Store, small_manifest: Callable[[Store], Manifest]) -> Manifest:
    return small_manifest(store)


def test_a_schedule_averaged_weights_and_smoothed_labels_reach_the_workers(store: Store, manifest: Manifest) -> None:
    config = TrainConfig(epochs=3, global_batch_size=64, lr=0.3, momentum=0.9, schedule="one-cycle", warmup=0.2,
                         averaging=0.9, label_smoothing=0.1)  # fmt: skip
    training = fit(store, "recipe", manifest, config, ClusterConfig(workers=2, gpu="no"), LoadConfig())
    recipe, place = config.resolved(), Place(store, manifest, "train", config.seed, 64, 0, 1, torch.device("cpu"))
    model = recipe.build_model(10, config.seed)
    flat = flatten(model)
    gradient = PlainGradient(model, flat, recipe.label_smoothing)
    optimization = Optimization(recipe, model, flat, 3 * place.steps)
    loader = ResidentLoader(place)
    for number, batch in enumerate(itertools.chain.from_iterable(map(loader.batches, (1, 2, 3)))):
        gradient(batch.images, batch.labels, global_batch=batch.size)
        optimization.step(number)
    images, labels = (torch.from_numpy(rows) for rows in read_rows(store, manifest, "test"))
    with optimization.averaged():
        assert_close(decode_model(store.read(training.candidate)).state_dict(), model.state_dict())
        expected = metrics_of(evaluate_step(model, images, labels))
    assert training.history[-1].held_out_loss == pytest.approx(expected.loss, rel=1e-4)


def listening_now_and_then(config: dict[str, Any]) -> None:
    """The worker, as on a GPU."""
    pipeline.worker.LISTENS_EVERY["cpu"] = 50
    train_worker(config)


@pytest.mark.parametrize(
    ("worker", "changes", "step", "workers", "ranks"),
    [
        (train_worker, {}, 2, 2, "0, 1"),
        (listening_now_and_then, {"checkpoint_steps": 4}, 4, 1, "0"),
        # A step is an epoch: by its update the model explodes, and by nothing that was trained on.
        (train_worker, {"global_batch_size": 600, "activation": "relu"}, 1, 1, "0"),
    ],
    ids=["in the next step", "on a GPU", "at an epoch's end"],
)
def test_a_loss_that_explodes_is_named_and_its_weights_are_not_kept(
    store: Store, manifest: Manifest, worker: Callable[[dict[str, Any]], None], changes: dict[str, Any],
    step: int, workers: int, ranks: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline.train, "train_worker", worker)
    config = RUN.model_copy(update={"lr": 1e38, **changes})
    run_id = f"exploded-{step}"
    with pytest.raises(TrainingError) as raised:
        fit(store, run_id, manifest, config, ClusterConfig(workers=workers, gpu="no"), LoadConfig())
    assert str(raised.value) == (
        f"the loss became infinite or undefined at step {step} of epoch 1 on rank {ranks} with lr=1e+38; "
        "the last good checkpoint is none; lower lr"
    )
    assert find_training(store, run_id) is None
    assert not [key for key in store.keys(staging(run_id)) if key.endswith(FILE_NAME)]


def undefined_on_rank_1(config: dict[str, Any]) -> None:
    """The worker; rank 1 finds its loss undefined in the third step. The model that each rank ends with is kept."""
    begin, begun = pipeline.worker._begin, list[Session]()

    def spoilt(job: Job) -> tuple[Session, Position]:
        session, position = begin(job)
        compute, steps = type(session.gradient).__call__, itertools.count(1)

        def undefined(*args: Any, **kwargs: Any) -> torch.Tensor:
            counts = compute(*args, **kwargs)
            return counts * math.nan if next(steps) == 3 and session.place.rank == 1 else counts

        type(session.gradient).__call__ = undefined  # type: ignore[method-assign]
        begun.append(session)
        return session, position

    pipeline.worker._begin = spoilt
    train_worker(config)
    [session] = begun
    session.place.store.put(f"ended/{session.place.rank}", encode_model(session.model))


def test_a_loss_undefined_on_one_rank_alone_is_told_of_it_and_stops_all_before_the_update(
    store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.train, "train_worker", undefined_on_rank_1)
    config = RUN.model_copy(update={"checkpoint_steps": 2})
    with pytest.raises(
        TrainingError, match="undefined at step 3 of epoch 1 on rank 1 with .* after step 2 of epoch 1;"
    ):
        fit(store, "undefined", manifest, config, ClusterConfig(workers=2, gpu="no"), LoadConfig())
    [kept] = [key for key in store.keys(staging("undefined")) if key.endswith(FILE_NAME)]
    before, _ = read_state(store.read(kept))
    for rank in (0, 1):
        assert_close(decode_model(store.read(f"ended/{rank}")).state_dict(), before, atol=0)


def going_wrong(config: dict[str, Any]) -> None:
    raise ZeroDivisionError("division by zero")


def test_what_goes_wrong_again_and_again_ends_training_with_a_line(
    store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline.train, "train_worker", going_wrong)
    config = ClusterConfig(workers=1, gpu="no")
    message = refusal(lambda: fit(store, "hopeless", manifest, RUN, config, LoadConfig()), TrainingError)
    assert message == "training failed for good: rank 0: division by zero"
    assert caplog.text.count("All ranks start again, from the last checkpoint") == MAX_FAILURES
    assert find_training(store, "hopeless") is None


@pytest.mark.parametrize(
    ("every", "checkpoint_steps", "heard"), [(50, None, [10]), (50, 4, [4, 8, 10]), (7, 4, [4, 7, 8, 10])]
)
def test_ranks_listen_now_and_then_before_a_checkpoint_and_at_the_end_of_an_epoch(
    store: Store, manifest: Manifest, every: int, checkpoint_steps: int | None, heard: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(pipeline.worker.LISTENS_EVERY, "cpu", every)
    place = Place(store, manifest, "train", 0, 64, rank=1, world_size=2, device=torch.device("cpu"))
    job = Job(store.url, staging("r"), manifest, RECIPES["seed"], 0, "resident", checkpoint_steps, 60, 1, None)
    watch = Watch(job, place)
    assert [step for step in range(1, place.steps + 1) if watch.listens(step)] == heard
