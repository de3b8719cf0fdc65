"""`make drill`: what a person does with the local stack, done by a script: up, a run, another, a schedule that fires,
the same run twice and ten at once, the report read back from S3, down. Writes docs/stack.md.

Exit code 1 unless every part of it came out right.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prefect.client.schemas.actions import DeploymentUpdate

from pipeline.download import SourceConfig, fetch
from pipeline.errors import PipelineError
from pipeline.progress import PROGRESS
from pipeline.publish import verify_run
from pipeline.registry import find_champion, list_versions
from pipeline.source import IMAGES, LABELS, open_source
from pipeline.storage import Store, open_store
from pipeline.train import find_training, staging
from tests.conftest import idx_bytes, wait_for
from tests.infra.stack import Running

DEPLOYMENT = "train-lenet/train-lenet"
AT_ONCE = 10
LONG = 400  # epochs, which are not over when another worker comes
PATIENCE_S = 900


class Drill:
    """The stack, and what was seen of it."""

    def __init__(self, folder: Path) -> None:
        self.running = Running(folder)
        self.seen: list[tuple[str, float, str]] = []
        self.silences = 0  # how often Prefect's API did not answer for 30 s

    def step(self, what: str, act: Callable[[], str]) -> None:
        """Do it, and note how long it took and what was seen."""
        started, silences = time.monotonic(), self.silences
        outcome = act()
        if self.silences > silences:
            outcome += f"; requests that Prefect's API did not answer within 30 s: {self.silences - silences}"
        self.seen.append((what, time.monotonic() - started, outcome))
        print(f"{what}: {self.seen[-1][1]:.0f} s, {outcome}", flush=True)

    @property
    def store(self) -> Store:
        return open_store(self.running.env()["LENET_STORAGE"])

    def run(self, *parameters: str, watch: bool = True) -> dict[str, Any]:
        """A flow run of the deployment; as Prefect knows it afterwards."""
        given = [word for parameter in parameters for word in ("-p", parameter)]
        self.running.prefect("deployment", "run", DEPLOYMENT, *given, *(["--watch"] if watch else []))
        return self.running.flow_run()

    def limit(self, runs: int) -> None:
        """How many flow runs of the deployment may go at once."""
        self.running.client.update_deployment(self.running.deployment()["id"], DeploymentUpdate(concurrency_limit=runs))

    def ended(self, count: int) -> list[dict[str, Any]]:
        """The newest flow runs, once so many have ended."""
        give_up = time.monotonic() + PATIENCE_S
        url = f"{self.running.env()['PREFECT_API_URL']}/flow_runs/filter"
        while time.monotonic() < give_up:
            time.sleep(1)
            try:  # not by Prefect's client, which asks again by itself and tells nobody
                wanted = {"limit": count, "sort": "START_TIME_DESC"}
                found = self.running.http.post(url, json=wanted, timeout=30).raise_for_status().json()
            except httpx.ReadTimeout:
                self.silences += 1  # SQLite has one writer, and keeps others waiting
                continue
            # One that has crashed is taken up again.
            if len(found) == count and all(run["state_type"] in ("COMPLETED", "FAILED") for run in found):
                return list(found)
        raise RuntimeError(f"{count} flow runs have not ended after {PATIENCE_S} s")


def few_images(folder: Path) -> Path:
    """A small source of a person's own: the first 600 and 200 images of Fashion-MNIST."""
    folder.mkdir()
    source = open_source(fetch(SourceConfig()))
    for split, rows in (("train", 600), ("test", 200)):
        (folder / f"{IMAGES[split]}").write_bytes(idx_bytes(source.read(split, np.arange(rows))))
        (folder / f"{LABELS[split]}").write_bytes(idx_bytes(source.labels(split)[:rows]))
    return folder


def completed(run: dict[str, Any]) -> str:
    if run["state_type"] != "COMPLETED":
        raise RuntimeError(f"flow run {run['name']} is {run['state_type']}: {run['state']['message']}")
    return f"{run['name']}: completed"


def overhead(drill: Drill, run: dict[str, Any], run_id: str) -> list[tuple[str, float]]:
    """Where the time of a flow run went, in seconds: everything but the epochs themselves; and by how much these were
    longer than at their median pace, as what comes later is imported meanwhile."""
    training = find_training(drill.store, run_id)
    assert training is not None
    seconds = [epoch.seconds for epoch in training.history]
    epochs = sum(seconds)
    tasks = drill.running.ask("/task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}}, limit=20)
    spent = {task["name"].rpartition("-")[0]: task["total_run_time"] for task in tasks}
    at = {name: datetime.fromisoformat(run[name]) for name in ("expected_start_time", "start_time", "end_time")}
    begun = (at["start_time"] - at["expected_start_time"]).total_seconds()
    found = [("until the flow began: Prefect's worker, a process, imports", begun)]
    found += [(f"`{name}`", spent[name]) for name in ("download", "shard")]
    found.append(("`train`, without its epochs: the job, Ray Train's start and end", spent["train"] - epochs))
    found += [(f"`{name}`", spent[name]) for name in ("export", "evaluate", "publish", "promote")]
    total = (at["end_time"] - at["expected_start_time"]).total_seconds()
    found.append(("between the tasks", total - sum(value for _, value in found) - epochs))
    longer = epochs - len(seconds) * statistics.median(seconds)
    return [*found, ("**all**", total - epochs), ("longer than at their median pace: the epochs", longer)]


def scheduled(drill: Drill) -> str:
    """A schedule that fires soon, once the scheduler, which looks every minute, has seen it; then it is taken away."""
    anchor = datetime.now(UTC) + timedelta(seconds=90)
    every = ["--interval", "86400", "--anchor-date", anchor.isoformat(), "--timezone", "UTC"]
    drill.running.prefect("deployment", "schedule", "create", DEPLOYMENT, *every)
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        found = drill.running.ask("/flow_runs/filter", flow_runs={"tags": {"all_": ["auto-scheduled"]}}, limit=20)
        done = [run for run in found if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")]
        if done:
            late = datetime.fromisoformat(done[0]["start_time"]) - anchor
            drill.running.prefect("deployment", "schedule", "clear", DEPLOYMENT, "--accept-yes")
            return f"{completed(done[0])}, begun {round(late.total_seconds())} s after its time"
        time.sleep(1)
    raise RuntimeError("the schedule did not fire, or its run did not complete")


def orphaned(drill: Drill) -> str:
    """A machine with a Prefect worker that is gone, and the flow's process with it: nobody is left to say so."""
    drill.run(f"epochs={LONG}", "run_id=orphaned", watch=False)
    wait_for(lambda: drill.store.keys(f"{staging('orphaned')}/{PROGRESS}"), PATIENCE_S)
    for process in drill.running.processes():
        if "flows.engine" in process.cmdline() or "worker" in process.cmdline():
            process.kill()
    killed = time.time()
    [run] = drill.ended(1)
    completed(run)
    jobs = drill.running.jobs("orphaned")
    if run["run_count"] != 2 or jobs != ["SUCCEEDED"]:
        raise RuntimeError(f"begun {run['run_count']} times, jobs {jobs}")
    again = max(
        datetime.fromisoformat(state["timestamp"]).timestamp()
        for state in drill.running.states(run["id"])
        if state["type"] == "RUNNING"
    )
    training = find_training(drill.store, "orphaned")
    if training is None or training.finished.timestamp() <= again:
        raise RuntimeError("the training was over before another worker took the run up: give it more epochs")
    return f"found and taken up by another worker after {again - killed:.0f} s; the training went on meanwhile: one job"


def twice(drill: Drill) -> str:
    """The same run twice, the limit on concurrency out of the way."""
    drill.limit(2)
    for _ in range(2):
        drill.run("epochs=6", "run_id=twice", watch=False)
    for run in drill.ended(2):
        completed(run)
    drill.limit(1)
    versions = [version.version for version in list_versions(drill.store, "lenet") if version.run_id == "twice"]
    jobs = drill.running.jobs("twice")
    if len(versions) != 1 or jobs.count("SUCCEEDED") != 1:
        raise RuntimeError(f"versions {versions}, jobs {jobs}")
    return f"both completed; one job, one version ({versions[0]})"


def ten(drill: Drill, source: Path) -> str:
    """Many flow runs at once, of a small dataset: one at a time, and a registry without gaps."""
    for number in range(AT_ONCE):
        given = ["dataset=few", f"source={source}", "model=few", "epochs=2", f"seed={number}", f"run_id=few-{number}"]
        drill.run(*given, watch=False)
    runs = drill.ended(AT_ONCE)
    begun = sum(run["run_count"] for run in runs)
    for run in runs:
        completed(run)
    spans = sorted((run["start_time"], run["end_time"]) for run in runs)
    overlaps = sum(later[0] < earlier[1] for earlier, later in pairwise(spans))
    versions = list_versions(drill.store, "few")
    for version in versions:
        verify_run(drill.store, version.run_id)
    champion = find_champion(drill.store, "few")
    numbers = [version.version for version in versions]
    if numbers != list(range(1, AT_ONCE + 1)) or len({version.run_id for version in versions}) != AT_ONCE or overlaps:
        raise RuntimeError(f"versions {numbers}, {overlaps} runs began before the one before had ended")
    registry = f"versions 1 to {AT_ONCE}, champion {champion and champion.version}"
    return f"all completed, one at a time, begun {begun} times; {registry}"


def report(drill: Drill, spent: list[tuple[str, float]]) -> str:
    """docs/stack.md."""
    steps = "\n".join(f"| {what} | {seconds:.0f} | {outcome} |" for what, seconds, outcome in drill.seen)
    table = "\n".join(f"| {what} | {seconds:.1f} |" for what, seconds in spent)
    return f"""# The local stack at work

Written by `make drill` on {os.cpu_count()} cores, no GPU: S3 (SeaweedFS), Prefect's server and worker, and Ray's three
nodes on one machine, training as a Ray job.

| what was done | seconds | what was seen |
| --- | --- | --- |
{steps}

## What a run costs beside its epochs

The second run, of the recipe's ten epochs; its shards were in the store. Seconds, of which the epochs are no part.

| | s |
| --- | --- |
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/stack.md"))
    output = parser.parse_args().output
    folder = Path(tempfile.mkdtemp(prefix="lenet-drill-"))
    drill = Drill(folder / "stack")
    spent: list[tuple[str, float]] = []

    def up() -> str:
        done = drill.running.command("up", *drill.running.options)
        if done.returncode:
            raise RuntimeError(done.stderr)
        os.environ.update(drill.running.env())
        return "all parts up, flows deployed"

    def second() -> str:
        run = drill.run("lr=0.5", "run_id=second")
        spent.extend(overhead(drill, run, "second"))
        return completed(run)

    def read_back() -> str:
        page = drill.store.read("runs/first/report.html")
        listed = drill.store.read("index.html")
        if b"</html>" not in page or b"runs/first/report.html" not in listed:
            raise RuntimeError("the report or the index is not whole")
        return f"{len(page):,} bytes of report, and the index that leads to it"

    def down() -> str:
        drill.running.command("down")
        left = drill.running.processes()
        if left:
            raise RuntimeError(f"left: {left}")
        return "no process left"

    try:
        drill.step("`make up`", up)
        drill.step("a run, with `--watch`", lambda: completed(drill.run("epochs=2", "run_id=first")))
        drill.step("a run with other parameters", second)
        drill.step("a schedule, fired once", lambda: scheduled(drill))
        drill.step(
            f"Prefect's worker and the flow's process killed, in a run of {LONG} epochs", lambda: orphaned(drill)
        )
        drill.step("the same run twice at once", lambda: twice(drill))
        drill.step(f"{AT_ONCE} runs of 600 images at once", lambda: ten(drill, few_images(folder / "few")))
        drill.step("the report, read back from S3", read_back)
        drill.step("`make down`", down)
        output.write_text(report(drill, spent))
        print(output.read_text())
    except (RuntimeError, AssertionError, PipelineError) as error:
        print(f"drill: {error}; logs in {folder}/stack/logs", file=sys.stderr)
        sys.exit(1)
    finally:
        drill.running.command("down")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
