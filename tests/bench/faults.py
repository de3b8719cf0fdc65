"""`make faults`: trainings whose workers, nodes and drivers are killed at random times; writes docs/faults.md.

Each training runs in a process of its own on a real Ray of a head and three nodes. When it is under way, one after the
other in random order, a worker process, a node (its raylet) with a worker and the driver get SIGKILL; the two nodes
that are left have room for both workers, and a killed driver is started again at once. Every training has to end, with
the weights of one that nothing happened to.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
from cyclopts import App, Parameter
from ray.cluster_utils import Cluster

from pipeline.checkpoint import FILE_NAME, Position, decode_model, read_state
from pipeline.download import SourceConfig, fetch
from pipeline.errors import PipelineError
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest
from pipeline.source import open_source
from pipeline.storage import Store, open_store
from pipeline.train import find_training, staging

ROOT = Path(__file__).parents[2]
EPOCHS, CHECKPOINT_STEPS, STEPS_PER_EPOCH = 12, 20, 235
TOLERANCE = 5e-5  # after 2,820 steps of SGD 0.1; float32 sums in another order on other workers
KINDS = ("worker", "node", "driver")
PATIENCE_S = 180
app = App(help=__doc__)

DRIVER = f"""
import sys
from pipeline.placement import ClusterConfig
from pipeline.loader import LoadConfig
from pipeline.recipe import TrainConfig
from pipeline.shards import require_manifest
from pipeline.storage import open_store
from pipeline.train import fit
url, folder, run_id, address = sys.argv[1:]
store = open_store(url)
config = TrainConfig(epochs={EPOCHS}, lr=0.1, checkpoint_steps={CHECKPOINT_STEPS})
fit(store, run_id, require_manifest(store, folder), config,
    ClusterConfig(workers=2, gpu="no", ray_address=address or None), LoadConfig())
"""


@dataclass
class Kill:
    """What was killed, the steps that had to be done again, at most, and the seconds until training went on."""

    kind: str
    steps_lost: int
    recovery_s: float


@dataclass
class Training:
    """One training that was disturbed, and the largest difference of a weight from the undisturbed one's."""

    kills: list[Kill] = field(default_factory=list)
    difference: float = float("inf")


def start(store: Store, manifest: Manifest, run_id: str, address: str) -> subprocess.Popen[bytes]:
    """The driver, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, store.url, manifest.folder, run_id, address]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest(store: Store, run_id: str) -> tuple[int, float]:
    """Steps done at the newest checkpoint, over all epochs, and when it was written; (0, 0) while there is none."""
    found = (0, 0.0)
    for key in store.keys(f"{staging(run_id)}/ray"):
        if not key.endswith(FILE_NAME):
            continue
        try:
            written, position = Path(store.path(key)).stat().st_mtime, read_state(store.read(key))[1]
        except (OSError, PipelineError):
            continue  # Ray Train has just deleted it
        found = max(found, (steps_at(position), written))
    return found


def steps_at(position: Position) -> int:
    """Steps done, over all epochs."""
    return (position.epoch - 1) * STEPS_PER_EPOCH + position.step


def wait_for(condition: Callable[[], bool], what: str) -> float:
    """Seconds until it holds."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > PATIENCE_S:
            raise SystemExit(f"after {PATIENCE_S} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - started


def disturb(store: Store, manifest: Manifest, run_id: str, kinds: list[str], chance: random.Random) -> Training:
    """Train, killing one thing after the other."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        driver = start(store, manifest, run_id, cluster.address)
        training = Training()
        wait_for(lambda: newest(store, run_id)[0] > 0, "no checkpoint")
        for kind in kinds:
            time.sleep(chance.uniform(0.5, 4))
            rate = pace(store, run_id)
            _, written = newest(store, run_id)
            before = workers()
            victim = chance.choice(before)
            node = node_of(cluster, victim)
            killed, began = time.time(), time.monotonic()
            if kind == "driver":
                driver.kill()
                driver.wait()
                driver = start(store, manifest, run_id, cluster.address)
            elif kind == "node":
                cluster.remove_node(node, allow_graceful=False)
            else:
                os.kill(victim.pid, signal.SIGKILL)
            wait_until_back(store, run_id, before)
            seconds = time.monotonic() - began
            training.kills.append(Kill(kind, min(round((killed - written) * rate), STEPS_PER_EPOCH), seconds))
            print(run_id, training.kills[-1], flush=True)
        if driver.wait(PATIENCE_S):
            raise SystemExit(f"{run_id}: the driver failed")
    finally:
        cluster.shutdown()
    return training


def wait_until_back(store: Store, run_id: str, before: list[psutil.Process]) -> None:
    """Until other workers than these have done a step: those of before may still have some on the way to the store."""
    wait_for(lambda: bool(workers()) and not set(workers()) & set(before), "no new workers")
    done, _ = newest(store, run_id)
    wait_for(lambda: newest(store, run_id)[0] > done, "no step by new workers")


def pace(store: Store, run_id: str) -> float:
    """Steps per second just now."""
    (first, _), started = newest(store, run_id), time.monotonic()
    wait_for(lambda: newest(store, run_id)[0] > first, "training stands still")
    second, _ = newest(store, run_id)
    return (second - first) / (time.monotonic() - started)


def node_of(cluster: Cluster, worker: psutil.Process) -> Any:
    """The Ray node that a worker process belongs to."""
    above = {parent.pid for parent in worker.parents()}
    return next(node for node in cluster.list_all_nodes() if node.all_processes["raylet"][0].process.pid in above)


def workers() -> list[psutil.Process]:
    """The training's worker processes: all are children of this process's raylets."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended since
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def difference(store: Store, one: str, other: str) -> float:
    """The largest of any weight of two finished trainings."""
    first, second = (find_training(store, run_id) for run_id in (one, other))
    assert first is not None
    assert second is not None
    mine, theirs = (decode_model(store.read(t.candidate)).state_dict() for t in (first, second))
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


@app.default
def main(
    kills: Annotated[int, Parameter(help="How many in all.")] = 21,
    seed: Annotated[int, Parameter(help="Decides what is killed when.")] = 0,
    output: Annotated[Path, Parameter(help="Where the table goes.")] = ROOT / "docs" / "faults.md",
) -> None:
    """Measure and write the table; exit code 1 when a training did not end as the undisturbed one."""
    chance = random.Random(seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as temporary:
        store = open_store(temporary)
        manifest = write_shards(store, open_source(fetch(SourceConfig())), ShardConfig())
        if start(store, manifest, "undisturbed", "").wait():
            raise SystemExit("the undisturbed training failed")
        trainings = []
        while (left := kills - len(KINDS) * len(trainings)) > 0:
            kinds = chance.sample(KINDS, min(left, len(KINDS)))
            run_id = f"disturbed-{len(trainings) + 1}"
            trainings.append(disturb(store, manifest, run_id, kinds, chance))
            trainings[-1].difference = difference(store, run_id, "undisturbed")
            print(run_id, trainings[-1].difference, flush=True)
    text = table(trainings)
    output.write_text(text)
    print(text)
    if any(training.difference > TOLERANCE for training in trainings):
        sys.exit(1)


def table(trainings: list[Training]) -> str:
    """The score as Markdown."""
    every = [kill for training in trainings for kill in training.kills]
    equal = sum(training.difference <= TOLERANCE for training in trainings)
    lines = []
    for kind in KINDS:
        mine = [kill for kill in every if kill.kind == kind]
        if mine:
            seconds = sorted(kill.recovery_s for kill in mine)
            p95 = seconds[min(len(seconds) - 1, round(0.95 * len(seconds)))]
            lines.append(
                f"| {kind} | {len(mine)} | {len(mine)} | {statistics.median(kill.steps_lost for kill in mine):.0f} "
                f"(at most {max(kill.steps_lost for kill in mine)}) | {statistics.median(seconds):.1f} | {p95:.1f} |"
            )
    worst = max(training.difference for training in trainings)
    return f"""\
# What a training survives

Written by `make faults`: {len(trainings)} trainings of {EPOCHS} epochs on two workers, with a checkpoint after every
{CHECKPOINT_STEPS} steps, on a Ray of a head and three nodes on one machine. In each, at random times, a worker, a node
with a worker and the driver get SIGKILL; two nodes are left, and the driver is started again.

| killed | injected | survived | steps done again | back at work after, s (p50) | p95 |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}

{equal} of {len(trainings)} trainings ended with the undisturbed training's weights: the largest difference of any
weight is {worst:.1e} (allowed: {TOLERANCE:g}).
"""


if __name__ == "__main__":
    app()
