"""`make hosts`: whole runs on four hosts, one of which is cut off or has its server killed; writes docs/hosts.md.

The hosts are network namespaces of this machine (network.py), so this needs root and iproute2. The first has Ray's head
and a Prefect worker, the second and third a Ray node with one CPU each, and the fourth S3 and the Prefect server. Every
run has to be published, with the weights of the undisturbed one, and Prefect has to have its true state.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from pipeline.checkpoint import decode_model
from pipeline.config import config_of
from pipeline.errors import DataError
from pipeline.progress import LOG, PROGRESS
from pipeline.publish import verify_run
from pipeline.run import DataConfig, prepare
from pipeline.storage import S3_OUTAGE_S, Store, open_store
from pipeline.train import find_training, staging
from tests.bench.network import kill, network
from tests.bench.programs import URL, Cluster, wait_for

ROOT = Path(__file__).parents[2]
UNDISTURBED = "undisturbed"
EPOCHS, EPOCHS_BEFORE = 8, 2  # in all, and before anything happens
CUT_S = 20  # for which S3 and Prefect are out of reach
SERVER_DOWN_S = 5
TOLERANCE = 5e-5  # after 1,880 steps; float32 sums in another order on another number of workers
app = App(help=__doc__)


@dataclass
class Outcome:
    """What came of a run. `next_s` is from the disturbance to the end of the epoch that it came in, `epoch`; `wrong` is
    empty if all is as it should be."""

    title: str
    reached: str
    seconds: float = 0.0
    epoch: int = 0
    next_s: float = 0.0
    places: str = ""
    difference: float = 0.0
    states: str = ""
    wrong: list[str] = field(default_factory=list)


def epochs_done(store: Store, run_id: str) -> int:
    """How many epochs are over."""
    return len(store.keys(f"{staging(run_id)}/{PROGRESS}"))


def places(store: Store, run_id: str) -> list[str]:
    """The hosts that the workers said they were on, in order."""
    keys = store.keys(f"{staging(run_id)}/{LOG}")
    lines = [line for key in keys for _, line in json.loads(store.read(key))["lines"]]
    return [found[1] for line in lines if (found := re.search(r"on \S+ of (\S+), images", line))]


def difference(store: Store, one: str, other: str) -> float:
    """The largest of any weight of two finished trainings."""
    first, second = (find_training(store, run_id) for run_id in (one, other))
    if first is None or second is None:
        return float("inf")
    mine, theirs = (decode_model(store.read(training.candidate)).state_dict() for training in (first, second))
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


Disturb = Callable[[Cluster], None]


def carry_out(cluster: Cluster, store: Store, title: str, run_id: str, disturb: Disturb, **parameters: Any) -> Outcome:
    """One run to its end, disturbed in the middle of an epoch, and what is not right about it."""
    outcome = Outcome(title, "connection" if "ray_address" in parameters else "job")
    started = time.monotonic()
    flow_run_id = cluster.submit(run_id=run_id, epochs=EPOCHS, lr=0.1, gpu="no", **parameters)

    def ended() -> bool:
        return cluster.flow_run(flow_run_id)["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    wait_for(lambda: epochs_done(store, run_id) >= EPOCHS_BEFORE or ended(), f"{run_id}: no epoch")
    before, disturbed = epochs_done(store, run_id), time.monotonic()
    outcome.epoch = before + 1
    if before >= EPOCHS:
        outcome.wrong.append("it was over before anything happened")
    disturb(cluster)
    wait_for(lambda: epochs_done(store, run_id) > before or ended(), f"{run_id}: stands still")
    outcome.next_s = time.monotonic() - disturbed
    wait_for(ended, f"{run_id}: does not end")
    outcome.seconds = time.monotonic() - started
    states, left = cluster.states(flow_run_id)
    outcome.states = ", ".join(states)
    if states[-1] != "Completed" or states.count("Running") != 1:
        outcome.wrong.append(f"states: {outcome.states}")
    outcome.wrong += left
    try:
        verify_run(store, run_id)
    except DataError as error:
        outcome.wrong.append(str(error))
    outcome.places = ", ".join(places(store, run_id))
    outcome.difference = difference(store, run_id, UNDISTURBED)
    if outcome.difference > TOLERANCE:
        outcome.wrong.append(f"weights differ by {outcome.difference:.1e}")
    print(outcome, flush=True)
    return outcome


def leave_alone(cluster: Cluster) -> None:
    """Nothing happens."""


def cut_off_node(cluster: Cluster) -> None:
    """The third host is gone, and stays so."""
    cluster.nodes[-1].unplug()


def bring_back(cluster: Cluster) -> float:
    """The third host is back: seconds until what ran there has ended by itself. Its Ray is then started anew."""
    node = cluster.nodes[-1]
    node.plug()
    process = cluster.started[f"ray-{node.number}"]
    seconds = wait_for(lambda: process.poll() is not None, "the Ray of a host that was cut off lives on")
    cluster.start_node(node, "--address", cluster.address, "--num-cpus", "1")
    wait_for(lambda: cluster.alive() == 1 + len(cluster.nodes), "the third host does not come back")
    return seconds


def cut_off_servers(cluster: Cluster) -> None:
    """S3 and Prefect are out of reach for a while."""
    cluster.servers.unplug()
    time.sleep(CUT_S)
    cluster.servers.plug()


def restart_prefect(cluster: Cluster) -> None:
    """Prefect's server dies, and is there again after a while."""
    kill(cluster.started["server"])
    time.sleep(SERVER_DOWN_S)
    cluster.start_server()


def scenarios(cluster: Cluster, store: Store) -> tuple[list[Outcome], float]:
    """All runs, one after the other, and the seconds after which a host that was back had ended what ran there."""
    outcomes = [
        carry_out(cluster, store, "nothing", UNDISTURBED, leave_alone),
        carry_out(cluster, store, "host 3 is cut off, for good", "cut-off", cut_off_node, workers="1-2"),
    ]
    ended_s = bring_back(cluster)
    title = f"host 4, with S3 and Prefect's server, is cut off for {CUT_S} s"
    outcomes.append(carry_out(cluster, store, title, "no-store", cut_off_servers, ray_address=cluster.address))
    title = f"Prefect's server is killed, and started again after {SERVER_DOWN_S} s"
    outcomes.append(carry_out(cluster, store, title, "no-prefect", restart_prefect))
    return outcomes, ended_s


def table(outcomes: list[Outcome], ended_s: float, up_s: float, patient: bool) -> str:
    """What was measured, as Markdown."""
    lines = [
        f"| {one.title} | {one.reached} | {one.places} | {one.epoch} | {one.next_s:.0f} | {one.seconds:.0f} | "
        f"{one.difference:.1e} | {one.states} |"
        for one in outcomes
    ]
    right = sum(not one.wrong for one in outcomes)
    wrong = "".join(f"\n- {one.title}: {what}" for one in outcomes for what in one.wrong)
    checks = "the defaults" if patient else "three times, every second, for 2 s"
    return f"""\
# Several hosts

Written by `make hosts`, as root: four hosts in network namespaces of one machine, each with an address, a host name,
processes and shared memory of its own, joined by a bridge. Host 1 has Ray's head, with no CPU to train on, and a
Prefect worker; hosts 2 and 3 have a Ray node with one CPU each; host 4 has S3 and Prefect's server. All are up after
{up_s:.0f} s.

Each row is a run of the deployment `train-lenet`, of {EPOCHS} epochs on real data. Once {EPOCHS_BEFORE} of them are
over, a cable is pulled (the host's interface on the bridge goes down, so that packets are lost and nobody is told) or a
process gets SIGKILL. A run is right if that came before its end, it is published, `verify_run` finds nothing, its
weights are those of the undisturbed run (to {TOLERANCE:g}), and Prefect calls it and all its tasks completed, at the
first attempt.

| what happens | Ray is reached by | ranks were on | in epoch | that was over after, s | whole run, s | \
weights differ by | states in Prefect |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}

{right} of {len(outcomes)} runs are right.{wrong}

- By job: `ray_address=http://HEAD:8265`; by connection: `ray_address=HEAD:6379`, from a process on the head's host.
- The run whose host is lost has `workers=1-2`, and ends on the one that is left. When the cable was in again, what
  still ran on host 3 ended by itself within {ended_s:.0f} s; its Ray was started anew, as a supervisor does.
- Ray's head gives up a host that does not answer when it has asked five times, every 3 s, and waited 10 s each time: by
  default that is about a minute. Here it was {checks}: `RAY_health_check_period_ms`,
  `_timeout_ms` and `_failure_threshold` in the head's environment. `make hosts ARGS=--patient` has the defaults.
- Then Ray Train, which learns only every 20 s what a cluster has, may count on the lost host once more; the pipeline
  lets it ask anew after 25 s.
- A store that is away is waited for up to {S3_OUTAGE_S} s by whatever reads or writes it. Training goes on meanwhile,
  for two reports at most; then it waits, too.
- Nothing has to be set for the workers to find each other: each uses the interface whose address its host has in Ray.
  `GLOO_SOCKET_IFNAME` in a node's environment overrules that.
"""


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """What the store's client reads, for the time of the block."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if name.startswith("AWS_")})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@app.default
def main(
    patient: Annotated[bool, Parameter(help="Leave Ray's health checks as they are.")] = False,
    keep: Annotated[bool, Parameter(help="Leave the logs where they are.")] = False,
    output: Annotated[Path, Parameter(help="Where the table goes.")] = ROOT / "docs" / "hosts.md",
) -> None:
    """Measure and write the table; exit code 1 unless all came out right."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        print("hosts: network namespaces need root, iproute2 and util-linux; run as root: make hosts", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left then, either
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    with contextlib.ExitStack() as stack:
        if keep:
            print(f"logs: {folder}", flush=True)
        else:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = Cluster(stack.enter_context(network(4, folder, ROOT)), folder, soon=not patient)
        stack.enter_context(environment(cluster.env))
        began = time.monotonic()
        cluster.start()
        up_s = time.monotonic() - began
        prepare(config_of({"storage": URL}, DataConfig))
        outcomes, ended_s = scenarios(cluster, open_store(URL))
    text = table(outcomes, ended_s, up_s, patient)
    output.write_text(text)
    print(text)
    if any(outcome.wrong for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    app()
