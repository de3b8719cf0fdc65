"""`make bench`: the whole pipeline against the textbook loop and Ray's own way, alternating; writes docs/benchmarks.md.

Each round runs the textbook's ten epochs in a fresh process, then `lenet train` with the same ten epochs on two
workers, from a store that holds no shards, with a Prefect home that is set up (as after a first run); then three epochs
as Ray Train's example has them, and three with one worker; and for what the machine can do, a matrix product, and the
gradient in one process and in two with nothing in common.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ray
import torch
from cyclopts import App, Parameter
from textbook import link_raw_files, rays_loop, textbook_loop

from lenet.fused import open_gradient
from lenet.recipe import RECIPES
from lenet.step import flatten
from pipeline.download import SourceConfig, fetch
from pipeline.memory import keep_memory

ROOT = Path(__file__).parents[2]
IMAGES = 60_000
SHORT = 3  # epochs of what is not timed as a whole
FLOP_PER_IMAGE = 2.4e6  # of LeNet's convolutions and linear layers, forward and backward
app = App(help=__doc__)


@app.default
def main(
    rounds: Annotated[int, Parameter(help="Rounds of both.")] = 3,
    epochs: Annotated[int, Parameter(help="Epochs in each.")] = 10,
    output: Annotated[Path, Parameter(help="Where the table goes.")] = ROOT / "docs" / "benchmarks.md",
) -> None:
    """Measure and write the table."""
    names = "textbook_wall textbook_rate ours_wall ours_rate ahead after one_rate rays_rate roofline apart"
    measured: dict[str, list[float]] = {name: [] for name in names.split()}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        link_raw_files(fetch(SourceConfig()), root)
        run_ours(root / "warm-up", 1)  # Prefect's database, bytecode
        for number in range(1, rounds + 1):
            wall, rates = run_textbook(root, epochs)
            measured["textbook_wall"].append(wall)
            measured["textbook_rate"].append(statistics.median(rates))
            ours = run_ours(root / f"round-{number}", epochs)
            measured["ours_wall"].append(ours.wall)
            measured["ours_rate"].append(ours.rate)
            measured["ahead"].append(ours.ahead)
            measured["after"].append(ours.after)
            measured["one_rate"].append(run_ours(root / f"one-{number}", SHORT, workers=1).rate)
            measured["rays_rate"].append(statistics.median(IMAGES / seconds for seconds in run_rays(root)))
            measured["roofline"].append(sgemm_flops() / FLOP_PER_IMAGE)
            measured["apart"].append(sum(run_apart(2)) / sum(run_apart(1)))
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


@app.command(name="rays", show=False)
def rays_process(root: Path) -> None:
    """Ray Train's way alone, in a process of its own."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print(json.dumps(rays_loop(root, SHORT)))


@app.command(name="gradient", show=False)
def gradient_process(seconds: float = 5) -> None:
    """Images/s of the gradient alone, of slices of 128 images, in one thread."""
    torch.set_num_threads(1)
    keep_memory()
    model = RECIPES["seed"].build_model(10, 0)
    gradient = open_gradient(model, flatten(model))
    images, labels = torch.randint(256, (128, 28, 28), dtype=torch.uint8), torch.randint(10, (128,))
    started, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        gradient(images, labels, global_batch=256)
        done += len(images)
    print(json.dumps(done / passed))


def run_apart(processes: int) -> list[float]:
    """Images/s of each of so many processes with the gradient alone, at the same time."""
    command = [sys.executable, __file__, "gradient"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]


def run_rays(root: Path) -> list[float]:
    """Seconds of each epoch of Ray Train's way."""
    done = subprocess.run([sys.executable, __file__, "rays", str(root)], check=True, capture_output=True, text=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def sgemm_flops(side: int = 2048, seconds: float = 2) -> float:
    """Floating-point operations per second of the best matrix product of that side, on all cores."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    best, ended = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ended:
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def run_textbook(root: Path, epochs: int) -> tuple[float, list[float]]:
    """Seconds of the loop itself (no imports), and images/s of each epoch's training."""
    command = [sys.executable, __file__, "textbook", str(root), str(epochs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], result["rates"]


@dataclass(frozen=True)
class Ours:
    """Seconds of the whole command, from process start to its end; those until the workers begin and from the last
    epoch to the published report; and images/s, the median of the epochs."""

    wall: float
    ahead: float
    after: float
    rate: float


def run_ours(store: Path, epochs: int, *options: str, workers: int = 2) -> Ours:
    """Run the command, and hear what it says when."""
    lenet = str(Path(sys.executable).with_name("lenet"))
    command = [lenet, "train", "--epochs", str(epochs), "--storage", str(store), "--workers", str(workers), *options]
    started, at, line = time.perf_counter(), dict[str, float](), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            step, _, rest = line.strip().partition("  ")
            said = f"epoch {epochs}" if rest.startswith(f"epoch {epochs} of") else step
            at[said] = time.perf_counter() - started
    wall = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {line}")
    latest = json.loads((store / "runs/latest.json").read_text())
    report = json.loads((store / "runs" / latest["run_id"] / "report.json").read_text())
    rate = statistics.median(epoch["images_per_second"] for epoch in report["history"])
    return Ours(wall, at["worker"], at["publish"] - at[f"epoch {epochs}"], rate)


def table(measured: dict[str, list[float]], rounds: int, epochs: int) -> str:
    """The figures as Markdown: median and range, and the ratios round by round."""
    whole = [ours / theirs for ours, theirs in zip(measured["ours_wall"], measured["textbook_wall"], strict=True)]

    def ratio(theirs: str) -> list[float]:
        return [ours / other for ours, other in zip(measured["ours_rate"], measured[theirs], strict=True)]

    def row(name: str, values: list[float], digits: int) -> str:
        low, middle, high = min(values), statistics.median(values), max(values)
        return f"| {name} | {middle:,.{digits}f} | {low:,.{digits}f} to {high:,.{digits}f} |"

    return f"""\
# Speed

Written by `make bench`: {rounds} rounds, each the textbook loop and then `lenet train` with two workers, on
{platform.processor() or platform.machine()} with {torch.get_num_threads()} cores and no GPU, torch {torch.__version__}.

The textbook loop is torchvision's Fashion-MNIST with ToTensor and a DataLoader with two processes
([tests/bench/textbook.py](../tests/bench/textbook.py)), timed without its imports. `lenet train` is timed from its
process's start to its end: Prefect, Ray, download check, sharding, {epochs} epochs, evaluation and publishing. Images/s
are the median of the epochs. Ray Train's way is its own Fashion-MNIST example with this LeNet:
`prepare_data_loader`, `prepare_model`, two workers. The matrix product is torch's of
2048 x 2048 float32 on all cores; training takes 2.4 million operations for each image.
(On AMD's processors torch's product does not use AVX-512, which the convolutions do: they can be faster than it.)
Processes with nothing in common compute the gradient and no more, with no Ray beside them: two workers can't gain more.
While `lenet train` trains, in some 7 s, it also imports what comes after, 2 s of a core, which two workers have to
share and one has not; of training alone, [scaling.md](scaling.md) has two workers over one.

| n = {rounds} | median | range |
| --- | --- | --- |
{row("textbook loop, images/s while training", measured["textbook_rate"], 0)}
{row("lenet train, images/s while training", measured["ours_rate"], 0)}
{row("ratio of the two (higher is better)", ratio("textbook_rate"), 2)}
{row("Ray Train's way, two workers, images/s", measured["rays_rate"], 0)}
{row("lenet train over Ray Train's way", ratio("rays_rate"), 2)}
{row("lenet train with one worker, images/s", measured["one_rate"], 0)}
{row("two workers over one", ratio("one_rate"), 2)}
{row("two processes with nothing in common over one", measured["apart"], 2)}
{row("what the matrix product would allow, images/s", measured["roofline"], 0)}
{row("lenet train over that", ratio("roofline"), 2)}
{row(f"textbook loop, {epochs} epochs, s", measured["textbook_wall"], 1)}
{row("lenet train, everything, s", measured["ours_wall"], 1)}
{row("ratio of the two (lower is better)", whole, 2)}
{row("from the command to the first step, s", measured["ahead"], 1)}
{row("from the last epoch to the published report, s", measured["after"], 1)}
"""


if __name__ == "__main__":
    app()
