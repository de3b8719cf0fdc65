"""`make gpu-check`: what only a machine with a GPU can show. Compares results with the CPU's and prints images/s."""

import sys
import tempfile
import time
from dataclasses import replace
from typing import Annotated

import torch
from cyclopts import App, Parameter

from lenet.augment import augment
from lenet.fused import open_gradient
from lenet.optimize import Optimization
from lenet.recipe import RECIPES, Recipe
from lenet.step import GraphedGradient, flatten
from pipeline.cluster import ClusterConfig
from pipeline.download import SourceConfig, fetch
from pipeline.loader import LoadConfig
from pipeline.recipe import TrainConfig
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import read_rows
from pipeline.source import open_source
from pipeline.storage import open_store
from pipeline.train import fit

STEPS = 100
app = App(help=__doc__)


def losses(recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, device: str) -> torch.Tensor:
    """Mean loss of each of 100 steps on that device, with and without a slice that is one image short."""
    model = recipe.build_model(10, 0, 0.286, 0.353).to(device).to(memory_format=torch.channels_last)
    flat = flatten(model)
    gradient = open_gradient(model, flat, recipe.label_smoothing, recipe.precision == "bfloat16")
    assert isinstance(gradient, GraphedGradient) == (device == "cuda")
    optimization = Optimization(recipe, model, flat, STEPS)
    found = []
    for step in range(STEPS):
        rows = torch.arange(step * 256, step * 256 + 256 - step % 2) % len(labels)
        batch = augment(images[rows].to(device), rows.to(device), recipe.augment, 0, 1)
        counts = gradient(batch, labels[rows].to(device), global_batch=len(rows))
        found.append(counts[0] / len(rows))
        optimization.step(step)
    return torch.stack(found).cpu()


@app.default
def main(workers: Annotated[int, Parameter(help="GPUs to train on.")] = 1) -> None:
    """Check, and print what was seen; exit code 1 if there is no GPU or it computes something else."""
    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no GPU here")
    print(torch.cuda.get_device_name(), torch.__version__)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        store = open_store(temporary)
        manifest = write_shards(store, open_source(fetch(SourceConfig())), ShardConfig())
        images, labels = (torch.from_numpy(array) for array in read_rows(store, manifest, "train"))
        for name, precision, tolerance in (
            ("seed", "float32", 1e-3),
            ("classic", "float32", 1e-3),
            ("modern", "float32", 2e-2),
            ("seed", "bfloat16", 2e-2),
        ):
            recipe = replace(RECIPES[name], precision=precision)
            cpu = losses(replace(recipe, precision="float32"), images, labels, "cpu")
            gpu = losses(recipe, images, labels, "cuda")
            apart = float(((gpu - cpu) / cpu).abs().max())
            failed |= apart > tolerance
            print(f"{name}, {precision}: losses of {STEPS} steps apart by {apart:.1e} (allowed {tolerance:g})")
        for name, precision in (("seed", "float32"), ("seed", "bfloat16"), ("modern", "float32")):
            started = time.perf_counter()
            config = TrainConfig.model_validate({"recipe": name, "epochs": 10, "precision": precision})
            cluster = ClusterConfig(workers=workers, gpu="yes")
            training = fit(store, f"{name}-{precision}", manifest, config, cluster, LoadConfig())
            last = training.history[-1]
            print(f"{name}, {precision}, {workers} GPUs: {last.images_per_second:,.0f} images/s, accuracy "
                  f"{last.held_out_accuracy:.4f} after 10 epochs, {time.perf_counter() - started:.0f} s")  # fmt: skip
    sys.exit(failed)


if __name__ == "__main__":
    app()
