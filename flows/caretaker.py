"""Looks after flow runs whose process is gone: `python -m flows.caretaker`, one process beside each Prefect server.

A crashed flow run is given to the workers again, and so goes on from its checkpoint, or follows the Ray job that still
trains; of one that crashes each time, people are told, as no process of its own is left to do so. So is one that a
worker took and did not begin. What runs by name and is not heard counts as crashed. The job of a cancelled flow run
whose process could not stop it any more is stopped.

Prefect's own hooks run in the process that died; its automations, tried for this, fired four times for one crash and
not at all for the next.
"""

import logging
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import PrefectException
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed, Suspended

from flows.crashes import (
    HEARD_AGAIN,
    LIVES,
    UNHEARD,
    Crash,
    cancelled_at,
    deployed_since,
    find,
    find_crashed,
    forgotten,
    last_heard,
    settled,
    to_cancel,
    to_give_up,
    to_revive,
    to_suspend,
    unbegun,
)
from flows.notify import notify, titled
from flows.server import require_url
from flows.train_lenet import name_run
from pipeline import run
from pipeline.config import config_of
from pipeline.errors import ConfigError, PipelineError

log = logging.getLogger(__name__)

TRAINING = "train-lenet"  # the flow; what is predicted ends by itself
POLL_S = 5
SILENT = timedelta(minutes=3)
# A worker takes a flow run and starts its process: 10 s, on a busy machine a minute. After five minutes Prefect would
# have given its place to another flow run, and could say so to this one when it has begun after all.
NOT_BEGUN = timedelta(minutes=4)


def bury(client: SyncPrefectClient, now: datetime, answering: datetime) -> list[UUID]:
    """Let what is running by name, and is not heard any more, count as crashed; the ids of those flow runs. The
    automation forgets it, if the server was away when its process died. What was never heard sends no heartbeats, and
    is left alone. Nothing is known before the server has been answering for a while: what lives is heard within 35 s.
    """
    if now - answering < SILENT:
        return []
    running = [found for found in find(client, StateType.RUNNING) if deployed_since(found, now, SILENT)]
    ids = [found.id for found in running if (heard := last_heard(client, found)) and now - heard >= SILENT]
    for flow_run_id in ids:
        message = f"{UNHEARD} for {SILENT.seconds} seconds; its process is gone."
        client.set_flow_run_state(flow_run_id, Crashed(message=message))
        log.info("flow run %s is not heard any more: it has crashed", flow_run_id)
    return ids


def cancel(client: SyncPrefectClient, crashed: Iterable[Crash]) -> list[UUID]:
    """Let what was cancelled count as cancelled; the ids of those flow runs."""
    ids = to_cancel(crashed)
    for flow_run_id in ids:
        client.set_flow_run_state(flow_run_id, Cancelled(message="it was cancelled, and crashed over it"), force=True)
        log.info("flow run %s was cancelled before it crashed: it does not go on", flow_run_id)
    return ids


def suspend(client: SyncPrefectClient, crashed: Iterable[Crash]) -> list[UUID]:
    """Let what was suspended count as suspended, for as long as it was to be; the ids of those flow runs."""
    ids = []
    for found in to_suspend(crashed):
        paused = next(state for state in reversed(found.states) if state.type == StateType.PAUSED)
        until = paused.state_details.pause_timeout
        client.set_flow_run_state(found.run.id, Suspended(pause_expiration_time=until), force=True)
        log.info("flow run %s was suspended before it crashed: it waits to be resumed", found.run.id)
        ids.append(found.run.id)
    return ids


def revive(client: SyncPrefectClient, crashed: Iterable[Crash], now: datetime) -> list[UUID]:
    """Let any worker take up what has crashed; the ids of those flow runs."""
    ids = to_revive(crashed, now)
    for flow_run_id in ids:
        _offer(client, flow_run_id)
        log.info("flow run %s had crashed: it goes on", flow_run_id)
    return ids


def begin_again(client: SyncPrefectClient, now: datetime) -> list[UUID]:
    """Let any worker take up what a worker took, and died before it began; the ids of those flow runs. What does not
    begin however often counts as failed, and people are told."""
    ids = []
    for found in find(client, StateType.PENDING):
        if not deployed_since(found, now, NOT_BEGUN):
            continue
        if unbegun(client.read_flow_run_states(found.id)) >= LIVES:
            _fail(client, found, f"given to the workers again {LIVES} times, and not begun")
            continue
        _offer(client, found.id)
        log.info("flow run %s was taken by a worker, and did not begin: another may", found.id)
        ids.append(found.id)
    return ids


def give_up(client: SyncPrefectClient, crashed: Iterable[Crash], now: datetime) -> list[UUID]:
    """Let what goes on no more count as failed, and tell people; the ids of those flow runs."""
    hopeless = to_give_up(crashed, now)
    for found in hopeless:
        how = f"crashed {found.run_count} times; the last time" if found.run_count else "crashed before it began"
        if forgotten(found, now):
            how = "crashed more than a day ago, while nobody looked after it"
        _fail(client, found, f"{how}: {found.state.message if found.state else ''}")
    return [found.id for found in hopeless]


def _fail(client: SyncPrefectClient, found: FlowRun, message: str) -> None:
    client.set_flow_run_state(found.id, Failed(message=message), force=True)
    log.info("flow run %s is given up: %s", found.id, message)
    notify(f"{titled(found)}: Failed", message)


def stop_left(client: SyncPrefectClient, now: datetime, seen: dict[UUID, bool]) -> list[str]:
    """Stop the jobs of cancelled flow runs; the runs that were still trained. `seen` keeps those that were looked at,
    and whether that is done: while the cluster or the store is away, they are looked at again."""
    training = FlowFilter(name=FlowFilterName(any_=[TRAINING]))
    left = [
        found
        for found in find(client, StateType.CANCELLED, flows=training)
        if found.run_count and not seen.get(found.id) and settled(found, now)
    ]
    if not left:
        return []
    # By whatever command: whoever gave the run id again trains now, or will, or did until his flow run crashed.
    lives = StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CRASHED
    begun = find(client, *lives, flows=training, tagged=False)
    resumed = {found.parameters.get("run_id") for found in begun}
    stopped = []
    for found in left:
        before = cancelled_at(client.read_flow_run_states(found.id)) or now
        told, seen[found.id] = found.id in seen, True
        try:
            config = config_of(found.parameters, run.RunConfig)  # Prefect keeps what was given, not the defaults
            run_id = name_run(config.model_dump(), found.expected_start_time, found.id)
            if run_id not in resumed and run.stop(config, run_id, before=before):
                log.info("flow run %s was cancelled and run %s still trained: stopped", found.id, run_id)
                stopped.append(run_id)
        except Exception as error:  # whatever is wrong with one, the others are looked after
            seen[found.id] = not (isinstance(error, PipelineError) and error.may_pass)
            if not told:
                log.warning("flow run %s was cancelled, and its training cannot be looked for: %s", found.id, error)
    return stopped


def _offer(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Let any worker take it up. Prefect forgets the process that died: it would wait for that to end, if the flow run
    is cancelled before it has its place, and after five minutes take the place from the one that holds it.
    """
    gone = {"infrastructure_pid": None}  # which update_flow_run() would not send
    client.request("PATCH", "/flow_runs/{id}", path_params={"id": flow_run_id}, json=gone)
    client.set_flow_run_state(flow_run_id, AwaitingRetry(), force=True)


def main() -> None:
    """Look every few seconds, for as long as the process lives."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    require_url()
    seen: dict[UUID, bool] = {}
    # Since when the server has answered without a break, and when it did last: it was away, or this machine slept.
    answering = answered = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        log.info("looking after flow runs of %s", client.api_url)
        while True:
            try:
                now = datetime.now(UTC)
                crashed = find_crashed(client, now)
                cancel(client, crashed)
                suspend(client, crashed)
                revive(client, crashed, now)
                give_up(client, crashed, now)
                begin_again(client, now)
                stop_left(client, now, seen)
                if now - answered > HEARD_AGAIN:
                    answering = now
                answered = now
                bury(client, now, answering)
            except (httpx.HTTPError, PrefectException) as error:
                log.warning("Prefect cannot be asked: %s", error)
            time.sleep(POLL_S)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        print(f"caretaker: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
