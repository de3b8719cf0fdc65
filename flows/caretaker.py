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
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter
from prefect.exceptions import PrefectException
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed, Suspended

from flows.notify import notify, titled
from flows.server import require_url
from flows.train_lenet import name_run
from pipeline import run
from pipeline.config import config_of
from pipeline.errors import ConfigError, PipelineError

log = logging.getLogger(__name__)

TRAINING = "train-lenet"  # the flow; what is predicted ends by itself
TAG = "lenet"  # of the deployments in prefect.yaml, and so of their flow runs
POLL_S = 5
# A worker reports a crash that its process monitor has reported before, up to 12 s later: over a run that is under way
# again, if that was done sooner.
SETTLED = timedelta(seconds=20)
# The message begins so where infra/automations.yaml says crashed. Prefect's server, back from a minute and a half away,
# says it of whatever ran meanwhile: what lives sends a heartbeat every 30 s, which is seen 5 s later.
UNHEARD, HEARD_AGAIN = "No heartbeat", timedelta(seconds=60)
SILENT = timedelta(minutes=3)
# A worker takes a flow run and starts its process: 10 s, on a busy machine a minute. After five minutes Prefect would
# have given its place to another flow run, and could say so to this one when it has begun after all.
NOT_BEGUN = timedelta(minutes=4)
FORGOTTEN = timedelta(days=1)
LIVES, BEGINNINGS = 4, 2  # how often a flow run may crash, and before it has ever begun


@dataclass(frozen=True)
class Crash:
    """A flow run that has crashed, and all states that it has been in, the first first."""

    run: FlowRun
    states: list[State[Any]]

    @property
    def cancelled(self) -> bool:
        """Whether it was to end: Prefect's engine says crashed over that, when it is ended."""
        return cancelled_at(self.states) is not None

    @property
    def suspended(self) -> bool:
        """Whether it was to wait until somebody resumes it: its process has ended then, and is not heard."""
        before = [state.type for state in self.states if state.type != StateType.CRASHED]
        return before[-1:] == [StateType.PAUSED]

    @property
    def hopeless(self) -> bool:
        """Whether it has used up its lives, or never begins: its code is not to be found, say. An engine that found the
        server away crashes too before it has begun, but not each time."""
        if self.run.run_count:
            return self.run.run_count >= LIVES
        crashes = [False, *(state.type == StateType.CRASHED for state in self.states)]
        # Of one crash there may be two reports.
        return sum(here and not before for before, here in pairwise(crashes)) >= BEGINNINGS


def cancelled_at(states: Iterable[State[Any]]) -> datetime | None:
    """When a flow run was told to end, since it was scheduled last: of several times the first, for what came of it, a
    crash that counts as cancelled too, came later."""
    told = None
    for state in states:
        if state.type == StateType.SCHEDULED:
            told = None
        elif state.type in (StateType.CANCELLING, StateType.CANCELLED):
            told = told or state.timestamp
    return told


def unbegun(states: Iterable[State[Any]]) -> int:
    """How often a flow run was given to the workers again since it ran last."""
    again = 0
    for state in states:
        again = 0 if state.type == StateType.RUNNING else again + (state.name == AwaitingRetry().name)
    return again


def to_cancel(crashed: Iterable[Crash]) -> list[UUID]:
    """Those that were cancelled before."""
    return [found.run.id for found in crashed if found.cancelled]


def to_suspend(crashed: Iterable[Crash]) -> list[Crash]:
    """Those that were suspended before."""
    return [found for found in crashed if found.suspended]


def to_revive(crashed: Iterable[Crash], now: datetime) -> list[UUID]:
    """Those that have not used up their lives, and crashed not long ago."""
    return [found.run.id for found in _wanted(crashed) if not (found.hopeless or _forgotten(found.run, now))]


def to_give_up(crashed: Iterable[Crash], now: datetime) -> list[FlowRun]:
    """Those that go on no more: their lives are used up, or they crashed so long ago that nobody waits for them."""
    return [found.run for found in _wanted(crashed) if found.hopeless or _forgotten(found.run, now)]


def _wanted(crashed: Iterable[Crash]) -> list[Crash]:
    """Those that were to go on."""
    return [found for found in crashed if not (found.cancelled or found.suspended)]


def bury(client: SyncPrefectClient, now: datetime, answering: datetime) -> list[UUID]:
    """Let what is running by name, and is not heard any more, count as crashed; the ids of those flow runs. The
    automation forgets it, if the server was away when its process died. What was never heard sends no heartbeats, and
    is left alone. Nothing is known before the server has been answering for a while: what lives is heard within 35 s.
    """
    if now - answering < SILENT:
        return []
    running = [found for found in _find(client, StateType.RUNNING) if _deployed_since(found, now, SILENT)]
    ids = [found.id for found in running if (heard := _last_heard(client, found)) and now - heard >= SILENT]
    for flow_run_id in ids:
        message = f"{UNHEARD} for {SILENT.seconds} seconds; its process is gone."
        client.set_flow_run_state(flow_run_id, Crashed(message=message))
        log.info("flow run %s is not heard any more: it has crashed", flow_run_id)
    return ids


def find_crashed(client: SyncPrefectClient, now: datetime) -> list[Crash]:
    """Flow runs of our deployments that crashed a while ago, and whose process is gone."""
    return [
        Crash(found, client.read_flow_run_states(found.id))
        for found in _find(client, StateType.CRASHED)
        if _deployed_since(found, now, SETTLED) and not _may_live(client, found, now)
    ]


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
    for found in _find(client, StateType.PENDING):
        if not _deployed_since(found, now, NOT_BEGUN):
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
        if _forgotten(found, now):
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
        for found in _find(client, StateType.CANCELLED, flows=training)
        if found.run_count and not seen.get(found.id) and _settled(found, now)
    ]
    if not left:
        return []
    # By whatever command: whoever gave the run id again trains now, or will, or did until his flow run crashed.
    lives = StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CRASHED
    begun = _find(client, *lives, flows=training, tagged=False)
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


def _since(found: FlowRun, now: datetime) -> timedelta:
    """For how long a flow run has been in its state."""
    return now - found.state.timestamp if found.state else timedelta()


def _deployed_since(found: FlowRun, now: datetime, least: timedelta) -> bool:
    return found.deployment_id is not None and _since(found, now) >= least


def _forgotten(found: FlowRun, now: datetime) -> bool:
    return _since(found, now) > FORGOTTEN


def _settled(found: FlowRun, now: datetime) -> bool:
    """Whether a flow run came into its state a while ago, but not long ago."""
    return SETTLED <= _since(found, now) <= FORGOTTEN


def _may_live(client: SyncPrefectClient, crashed: FlowRun, now: datetime) -> bool:
    """Whether the process of a flow run that crashed by its silence is heard, or may yet be.

    Prefect takes its place under the deployment's limit from it when it says crashed, and ends it for that within four
    minutes, with a checkpoint. Taken up sooner, it would be at work twice, and the end of one stop what both follow.
    """
    if not (crashed.state and (crashed.state.message or "").startswith(UNHEARD)):
        return False
    if _since(crashed, now) < HEARD_AGAIN:
        return True
    heard = _last_heard(client, crashed)
    return heard is not None and now - heard <= HEARD_AGAIN


def _last_heard(client: SyncPrefectClient, found: FlowRun) -> datetime | None:
    """When the last heartbeat of a flow run was, if there is one."""
    heartbeats = {
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{found.id}"]},
    }
    newest = client.read_events(EventFilter.model_validate(heartbeats), limit=1).events  # the last comes first
    return newest[0].occurred if newest else None


def _find(
    client: SyncPrefectClient, *states: StateType, flows: FlowFilter | None = None, tagged: bool = True
) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_filter=flows,
        flow_run_filter=FlowRunFilter(
            tags=FlowRunFilterTags(all_=[TAG]) if tagged else None,
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))),
        ),
        sort=FlowRunSort.START_TIME_DESC,
        limit=100,
    )


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
