"""Searching a recipe's hyperparameters with Ray Tune: many trials, the poor ones ended early, judged on validation.

A trial trains in one process. As batches do not depend on the number of workers, what is best there is best for a run
of any size, and a cluster is used better by one trial on each core than by all cores on one trial.
"""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.tune
import torch
from pydantic import BaseModel, ConfigDict
from ray.tune.schedulers import ASHAScheduler

from lenet.recipe import Recipe
from lenet.step import metrics_of
from pipeline.cluster import ray_session
from pipeline.errors import PipelineError, TrainingError
from pipeline.loader import Place, ResidentLoader, augmented
from pipeline.memory import keep_memory
from pipeline.placement import ClusterConfig
from pipeline.recipe import Hyperparameter, TuneConfig, varied
from pipeline.shards import Manifest
from pipeline.signals import ended_by_sigterm
from pipeline.storage import Store, open_store
from pipeline.trainer import cause_of
from pipeline.worker import evaluate_split, load_share, open_learner

log = logging.getLogger(__name__)

REDUCTION = 3  # of three trials that have come equally far, one goes on
METRIC = "accuracy"


class Trial(BaseModel):
    """What one combination came to: accuracy on validation, 0 to 1, after so many epochs."""

    model_config = ConfigDict(frozen=True)

    parameters: dict[str, int | float]
    epochs: int
    accuracy: float


@dataclass(frozen=True)
class Tuned:
    """All trials, the best first, and the recipe that the best makes."""

    recipe: Recipe
    trials: list[Trial]


def tune(
    store: Store, manifest: Manifest, recipe: Recipe, seed: int, config: TuneConfig, cluster: ClusterConfig
) -> Tuned:
    """Try variations of `recipe` on a dataset with a validation split, as many at a time as `cluster` has workers.

    Poor ones end early by asynchronous successive halving (Li et al., 2018). The same seed tries the same combinations.
    When all trials fail, raises what one has met, or TrainingError; ConfigError or ClusterError when there is no room.
    """
    space: dict[str, Any] = {name: _range(recipe, name) for name in config.vary}
    with ray_session(cluster) as gpu, tempfile.TemporaryDirectory(prefix="lenet-") as folder:
        # Ray hides no GPU from a trial that has none of its own, so the trial could not tell.
        device = torch.device("cuda" if gpu else "cpu")
        train = partial(_train, store_url=store.url, manifest=manifest, recipe=recipe, seed=seed, device=device)
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(train, cluster.resources(gpu)),
            param_space=space,
            tune_config=ray.tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=config.trials,
                max_concurrent_trials=cluster.least_workers,
                scheduler=ASHAScheduler(max_t=recipe.epochs, reduction_factor=REDUCTION),
                search_alg=ray.tune.search.BasicVariantGenerator(random_state=seed % 2**32),
            ),
            run_config=ray.tune.RunConfig(name="tune", storage_path=folder, verbose=0, callbacks=[_Say(config.trials)]),
        )
        logging.getLogger(ray.tune.run.__module__).setLevel(logging.CRITICAL)  # which have failed, we tell
        with ended_by_sigterm():
            grid = tuner.fit()
    trials = [
        _trial(result.config or {}, result.metrics)
        for result in (grid[index] for index in range(len(grid)))
        if result.metrics and not result.error
    ]
    if not trials:
        error = grid.errors[0]
        cause = getattr(error, "cause", error)  # Ray's own has a traceback for a message
        if isinstance(cause, PipelineError):
            raise cause from None
        raise TrainingError(f"every trial failed: {cause_of(error)}") from None
    # One that was ended early may have been lucky; those that trained to the end are compared with each other.
    trials.sort(key=lambda trial: (trial.epochs, trial.accuracy), reverse=True)
    return Tuned(varied(recipe, {**trials[0].parameters, "name": f"{recipe.name}-tuned"}), trials)


def _train(
    parameters: Mapping[str, float],
    store_url: str,
    manifest: Manifest,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> None:
    """One trial: train in this process alone, and say how good it is after every epoch."""
    keep_memory()
    recipe = varied(recipe, parameters)
    place = Place(open_store(store_url), manifest, "train", seed, recipe.global_batch_size, 0, 1, device)
    model, gradient, optimization = open_learner(recipe, manifest, seed, device, place.steps)
    loader, held_out = ResidentLoader(place), load_share(place, "validation")
    done = 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        for batch in augmented(loader.batches(epoch), recipe.augment, seed, epoch):
            gradient(batch.images, batch.labels, global_batch=batch.size)
            optimization.step(done)
            done += 1
        with optimization.averaged():
            ray.tune.report({METRIC: metrics_of(evaluate_split(gradient, held_out)).accuracy})


def _range(recipe: Recipe, name: Hyperparameter) -> Any:
    """Where to look for a hyperparameter: around the recipe's own value, where that says something."""
    values = vars(recipe) | vars(recipe.augment)
    own = values[name]
    match name:
        case "lr":
            return ray.tune.loguniform(own / 4, own * 4)
        case "weight_decay":
            return ray.tune.loguniform(own / 4, own * 4) if own else ray.tune.loguniform(1e-5, 1e-2)
        case "global_batch_size":
            return ray.tune.choice([64, 128, 256, 512])
        case "momentum":
            return ray.tune.uniform(0.8, 0.98)
        case "averaging":
            return ray.tune.choice([0.0, 0.99, 0.998, 0.999, 0.9995])
        case "warmup":
            return ray.tune.uniform(0.02, 0.3)
        case "shift":
            return ray.tune.choice([0, 1, 2, 3])
        case "erase":
            return ray.tune.choice([0, 4, 8])
        case "flip":
            return ray.tune.choice([0.0, 0.5])
        case "rotate":
            return ray.tune.uniform(0, 15)
        case "label_smoothing" | "scale":
            return ray.tune.uniform(0, 0.15)


def _trial(parameters: Mapping[str, Any], metrics: Mapping[str, Any]) -> Trial:
    return Trial(parameters=dict(parameters), epochs=metrics["training_iteration"], accuracy=metrics[METRIC])


class _Say(ray.tune.Callback):
    """A line for each trial that has ended, or failed."""

    def __init__(self, trials: int) -> None:
        self.trials, self.ended = trials, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ended += 1
        found = _trial(trial.config, trial.last_result)
        settings = ", ".join(f"{name}={value:.4g}" for name, value in found.parameters.items())
        log.info("trial %d of %d: accuracy %.4f after %d epochs with %s", self.ended, self.trials, found.accuracy,
                 found.epochs, settings)  # fmt: skip

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ended += 1
        why = cause_of(RuntimeError(Path(trial.error_file).read_text()))
        log.warning("trial %d of %d failed: %s", self.ended, self.trials, why)
