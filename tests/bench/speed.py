"""`make bench`: the whole pipeline against the textbook loop, alternating, in one run; writes docs/benchmarks.md.

Each round runs the textbook's ten epochs in a fresh process, then `lenet train` with the same ten epochs on two
workers, from a store that holds no shards, with a Prefect home that is set up (as after a first run).
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import App, Parameter
from textbook import link_raw_files, textbook_loop

from pipeline.download import SourceConfig, fetch

ROOT = Path(__file__).parents[2]
IMAGES = 60_000
app = App(help=__doc__)


@app.default
def main(
    rounds: Annotated[int, Parameter(help="Rounds of both.")] = 3,
    epochs: Annotated[int, Parameter(help="Epochs in each.")] = 10,
    output: Annotated[Path, Parameter(help="Where the table goes.")] = ROOT / "docs" / "benchmarks.md",
) -> None:
    """Measure and write the table."""
    measured: dict[str, list[float]] = {"textbook_wall": [], "textbook_rate": [], "ours_wall": [], "ours_rate": []}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        link_raw_files(fetch(SourceConfig()), root)
        run_ours(root / "warm-up", 1)  # Prefect's database, bytecode
        for number in range(1, rounds + 1):
            wall, rates = run_textbook(root, epochs)
            measured["textbook_wall"].append(wall)
            measured["textbook_rate"].append(statistics.median(rates))
            wall, rates = run_ours(root / f"round-{number}", epochs)
            measured["ours_wall"].append(wall)
            measured["ours_rate"].append(statistics.median(rates))
            print(number, {name: round(values[-1], 1) for name, values in measured.items()}, flush=True)
    text = table(measured, rounds, epochs)
    output.write_text(text)
    print(text)


@app.command(name="textbook", show=False)
def textbook_process(root: Path, epochs: int) -> None:
    """The textbook loop alone, in a process of its own."""
    started = time.perf_counter()
    history = textbook_loop(root, epochs)
    rates = [IMAGES / epoch.seconds for epoch in history]
    print(json.dumps({"seconds": time.perf_counter() - started, "rates": rates}))


def run_textbook(root: Path, epochs: int) -> tuple[float, list[float]]:
    """Seconds of the loop itself (no imports), and images/s of each epoch's training."""
    command = [sys.executable, __file__, "textbook", str(root), str(epochs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], result["rates"]


def run_ours(store: Path, epochs: int) -> tuple[float, list[float]]:
    """Seconds of the whole command, from process start to published report, and images/s of each epoch."""
    command = [str(Path(sys.executable).with_name("lenet")), "train", "--epochs", str(epochs), "--storage", str(store)]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall = time.perf_counter() - started
    latest = json.loads((store / "runs/latest.json").read_text())
    report = json.loads((store / "runs" / latest["run_id"] / "report.json").read_text())
    return wall, [epoch["images_per_second"] for epoch in report["history"]]


def table(measured: dict[str, list[float]], rounds: int, epochs: int) -> str:
    """The figures as Markdown: median and range, and the ratios round by round."""
    speed = [ours / theirs for ours, theirs in zip(measured["ours_rate"], measured["textbook_rate"], strict=True)]
    whole = [ours / theirs for ours, theirs in zip(measured["ours_wall"], measured["textbook_wall"], strict=True)]

    def row(name: str, values: list[float], digits: int) -> str:
        low, middle, high = min(values), statistics.median(values), max(values)
        return f"| {name} | {middle:,.{digits}f} | {low:,.{digits}f} to {high:,.{digits}f} |"

    return f"""\
# Speed

Written by `make bench`: {rounds} rounds, each the textbook loop and then `lenet train` with two workers, on
{platform.processor() or platform.machine()} with {torch.get_num_threads()} cores and no GPU, torch {torch.__version__}.

The textbook loop is torchvision's Fashion-MNIST with ToTensor and a DataLoader with two processes
([tests/bench/textbook.py](../tests/bench/textbook.py)), timed without its imports. `lenet train` is timed from process
start to published report: Prefect, Ray, download check, sharding, {epochs} epochs, evaluation and publishing.

| n = {rounds} | median | range |
| --- | --- | --- |
{row("textbook loop, images/s while training", measured["textbook_rate"], 0)}
{row("lenet train, images/s while training", measured["ours_rate"], 0)}
{row("ratio of the two (higher is better)", speed, 2)}
{row(f"textbook loop, {epochs} epochs, s", measured["textbook_wall"], 1)}
{row("lenet train, everything, s", measured["ours_wall"], 1)}
{row("ratio of the two (lower is better)", whole, 2)}
"""


if __name__ == "__main__":
    app()
