"""`make parity`: does the pipeline learn what a plain PyTorch loop learns? Writes docs/parity.md.

The seed recipe with three seeds in a plain single-process loop and in the pipeline with 1, 2 and 3 workers. The loop
shares no code with the pipeline and draws its own weights and order, so its runs differ as seeds differ.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import ray
import torch
from cyclopts import App, Parameter
from textbook import tensor_loop

from pipeline import run
from pipeline.config import config_of
from pipeline.download import SourceConfig, fetch
from pipeline.source import SPLITS, open_source

ROOT = Path(__file__).parents[2]
WORKERS = (1, 2, 3)
app = App(help=__doc__)

Result = tuple[float, float, float]


@app.default
def main(
    seeds: Annotated[int, Parameter(help="Seeds for each.")] = 3,
    epochs: Annotated[int, Parameter(help="Epochs in each.")] = 10,
    output: Annotated[Path, Parameter(help="Where the table goes.")] = ROOT / "docs" / "parity.md",
) -> None:
    """Run all and write the table."""
    results: dict[str, list[Result]] = {}
    source = open_source(fetch(SourceConfig()))
    (train_x, train_y), (test_x, test_y) = (
        (
            torch.from_numpy(source.read(split, np.arange(source.rows(split)))),
            torch.from_numpy(source.labels(split).copy()).long(),
        )
        for split in SPLITS
    )
    # One local Ray for all runs, with room for three workers whatever the number of cores.
    ray.init(
        address="local", num_cpus=max(WORKERS), include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    with tempfile.TemporaryDirectory() as store:
        for seed in range(seeds):
            last = tensor_loop(train_x, train_y, (test_x, test_y), epochs, seed)[-1]
            _note(results, "plain PyTorch loop", (last.train_loss, last.train_accuracy, last.test_accuracy))
            for workers in WORKERS:
                _note(
                    results, f"pipeline, {workers} worker{'s' * (workers > 1)}", _pipeline(store, workers, seed, epochs)
                )
    text = table(results, seeds, epochs)
    output.write_text(text)
    print(text)


def _pipeline(store: str, workers: int, seed: int, epochs: int) -> Result:
    given = {"storage": store, "workers": workers, "cpus_per_worker": 0.5, "gpu": "no", "seed": seed, "epochs": epochs}
    config = config_of(given, run.RunConfig)
    config = run.begin(config, f"workers-{workers}-seed-{seed}")
    last = run.train(config, run.shard(config, run.download(config)), lambda epoch: None).history[-1]
    return last.train_loss, last.train_accuracy, last.held_out_accuracy


def _note(results: dict[str, list[Result]], name: str, result: Result) -> None:
    results.setdefault(name, []).append(result)
    print(name, [f"{value:.4f}" for value in result], flush=True)


def table(results: dict[str, list[Result]], seeds: int, epochs: int) -> str:
    """Mean and sample standard deviation of each, as Markdown, and every worker count's distance from the loop."""
    lines = []
    for name, runs in results.items():
        cells = [f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in zip(*runs, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return f"""\
# The same result as a plain loop

Written by `make parity`: the seed recipe after {epochs} epochs, mean ± standard deviation over {seeds} seeds. The
[plain loop](../tests/bench/textbook.py) shares no code with the pipeline and draws its own weights and order. The
pipeline's rows start from the same weights and see the same batches at every worker count, so they differ from each
other only by rounding.

| | train loss | train accuracy | test accuracy |
| --- | --- | --- | --- |
{chr(10).join(lines)}
"""


if __name__ == "__main__":
    app()
