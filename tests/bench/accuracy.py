"""`make accuracy`: how good the recipes are over seeds, and what each part of `modern` is worth; into docs/accuracy.md.

Parts are judged on validation images, held out of the training images. Only then are the recipes trained on all
training images and the test images looked at, once a training, after its end.
"""

import json
import math
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import App, Parameter

from pipeline.cluster import ray_session
from pipeline.download import SourceConfig, fetch
from pipeline.evaluate import evaluate, export
from pipeline.loader import LoadConfig
from pipeline.placement import ClusterConfig
from pipeline.recipe import TrainConfig
from pipeline.sharding import ShardConfig, write_shards
from pipeline.source import open_source
from pipeline.storage import open_store
from pipeline.train import fit

ROOT = Path(__file__).parents[2]
WITHOUT: dict[str, dict[str, Any]] = {
    "modern, as it is": {},
    "SGD with momentum in place of Muon": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
    "largest of four pixels in place of their mean": {"pooling": "max"},
    "tanh in place of ReLU": {"activation": "tanh", "weights": "xavier"},
    "flips of every other image": {"flip": 0.5},
    "no shifts": {"shift": 0},
    "no label smoothing": {"label_smoothing": 0},
    "no weight decay": {"weight_decay": 0},
    "no averaging of weights": {"averaging": 0},
    "a constant learning rate": {"schedule": "constant"},
}
app = App(help=__doc__)


@app.default
def main(
    seeds: Annotated[int, Parameter(help="Trainings of each recipe.")] = 5,
    ablation_epochs: Annotated[int, Parameter(help="Epochs of each training that lacks a part; 0 for none.")] = 30,
    recipes: Annotated[list[str], Parameter(help="Recipes to judge.")] = ["seed", "classic", "modern"],  # noqa: B006
    results: Annotated[Path, Parameter(help="Kept here until all have come; what is there is not done again.")] = Path(
        "accuracy.json"
    ),
    output: Annotated[Path, Parameter(help="Where the tables go.")] = ROOT / "docs" / "accuracy.md",
) -> None:
    """Measure and write the tables."""
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    source = open_source(fetch(SourceConfig()))
    cluster = ClusterConfig(workers=1, gpu="no")  # any number has the same batches
    with tempfile.TemporaryDirectory() as temporary, ray_session(cluster):
        store = open_store(temporary)
        held_out = write_shards(store, source, ShardConfig(validation_fraction=1 / 6))
        every = write_shards(store, source, ShardConfig())

        def keep(name: str, value: dict[str, float]) -> None:
            found[name] = value
            results.write_text(json.dumps(found, indent=2))
            print(name, value, flush=True)

        for number, (part, changes) in enumerate(WITHOUT.items() if ablation_epochs else ()):
            if (name := part_name(part, ablation_epochs)) not in found:
                config = TrainConfig(recipe="modern", epochs=ablation_epochs, **changes)
                training = fit(store, f"part-{number}", held_out, config, cluster, LoadConfig())
                keep(name, {"accuracy": training.history[-1].held_out_accuracy})
        for recipe in recipes:
            for seed in range(seeds):
                if (name := f"{recipe} {seed}") not in found:
                    config = TrainConfig(recipe=recipe, seed=seed)
                    run_id = name.replace(" ", "-")
                    training = fit(store, run_id, every, config, cluster, LoadConfig())
                    verdict = evaluate(store, run_id, every, export(store, run_id, every, training))
                    keep(name, {"accuracy": verdict.accuracy, "seconds": training.wall_seconds})
    text = report(found, seeds, ablation_epochs, recipes)
    output.write_text(text)
    results.unlink()  # the next time is to measure anew
    print(text)


def part_name(part: str, epochs: int) -> str:
    """What the training that lacks a part is kept by."""
    return f"{part}, {epochs} epochs"


def report(found: dict[str, Any], seeds: int, ablation_epochs: int, recipes: list[str]) -> str:
    """The tables as Markdown."""
    rows, chance = [], ""
    for recipe in recipes:
        accuracy = [found[f"{recipe} {seed}"]["accuracy"] for seed in range(seeds)]
        seconds = [found[f"{recipe} {seed}"]["seconds"] for seed in range(seeds)]
        spread = statistics.stdev(accuracy) if seeds > 1 else 0.0
        if recipe == "modern" and spread:
            chance = (
                f" Two trainings that nothing but chance tells apart differ by more than\n"
                f"{2 * math.sqrt(2) * spread:.3f} once in twenty times, as the standard deviation of `modern` says."
            )
        rows.append(
            f"| {recipe} | {TrainConfig(recipe=recipe).resolved().epochs} | {statistics.mean(accuracy):.4f} | "
            f"{spread:.4f} | {min(accuracy):.4f} to {max(accuracy):.4f} | {statistics.median(seconds):.0f} |"
        )
    names = {part: part_name(part, ablation_epochs) for part in WITHOUT}
    parts = [f"| {part} | {found[name]['accuracy']:.4f} |" for part, name in names.items() if name in found]
    ablation = f"""
## What each part of `modern` is worth

One training of {ablation_epochs} epochs for each, on 50,000 images; accuracy on the 10,000 held out.
One seed.{chance}

| | validation accuracy |
| --- | --- |
{chr(10).join(parts)}
"""
    return f"""\
# Accuracy

Written by `make accuracy` on {platform.machine()}, {torch.get_num_threads()} cores, no GPU, torch {torch.__version__}.

Fashion-MNIST, all 60,000 training images, one worker, {seeds} seeds of each recipe. One forward pass for each of the
10,000 test images, by the model as it is published: 61,706 parameters. Nothing was chosen by the test images.

| recipe | epochs | mean test accuracy | standard deviation | range | training, s (median, with start-up) |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
{ablation if parts else ""}"""


if __name__ == "__main__":
    app()
