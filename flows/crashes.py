"""What Prefect knows of flow runs whose process is gone, or may be, and what is to become of those that crashed."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter
from prefect.states import AwaitingRetry

TAG = "lenet"  # of the deployments in prefect.yaml, and so of their flow runs
# A worker reports a crash that its process monitor has reported before, up to 12 s later: over a run that is under way
# again, if that was done sooner.
SETTLED = timedelta(seconds=20)
# The message begins so where infra/automations.yaml says crashed. Prefect's server, back from a minute and a half away,
# says it of whatever ran meanwhile: what lives sends a heartbeat every 30 s, which is seen 5 s later.
UNHEARD, HEARD_AGAIN = "No heartbeat", timedelta(seconds=60)
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


def find_crashed(client: SyncPrefectClient, now: datetime) -> list[Crash]:
    """Flow runs of our deployments that crashed a while ago, and whose process is gone."""
    return [
        Crash(found, client.read_flow_run_states(found.id))
        for found in find(client, StateType.CRASHED)
        if deployed_since(found, now, SETTLED) and not _may_live(client, found, now)
    ]


def find(
    client: SyncPrefectClient, *states: StateType, flows: FlowFilter | None = None, tagged: bool = True
) -> list[FlowRun]:
    """Flow runs in these states, the latest hundred; with our deployments' tag, if `tagged`."""
    return client.read_flow_runs(
        flow_filter=flows,
        flow_run_filter=FlowRunFilter(
            tags=FlowRunFilterTags(all_=[TAG]) if tagged else None,
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))),
        ),
        sort=FlowRunSort.START_TIME_DESC,
        limit=100,
    )


def last_heard(client: SyncPrefectClient, found: FlowRun) -> datetime | None:
    """When the last heartbeat of a flow run was, if there is one."""
    heartbeats = {
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{found.id}"]},
    }
    newest = client.read_events(EventFilter.model_validate(heartbeats), limit=1).events  # the last comes first
    return newest[0].occurred if newest else None


def _may_live(client: SyncPrefectClient, crashed: FlowRun, now: datetime) -> bool:
    """Whether the process of a flow run that crashed by its silence is heard, or may yet be.

    Prefect takes its place under the deployment's limit from it when it says crashed, and ends it for that within four
    minutes, with a checkpoint. Taken up sooner, it would be at work twice, and the end of one stop what both follow.
    """
    if not (crashed.state and (crashed.state.message or "").startswith(UNHEARD)):
        return False
    if _since(crashed, now) < HEARD_AGAIN:
        return True
    heard = last_heard(client, crashed)
    return heard is not None and now - heard <= HEARD_AGAIN


def to_cancel(crashed: Iterable[Crash]) -> list[UUID]:
    """Those that were cancelled before."""
    return [found.run.id for found in crashed if found.cancelled]


def to_suspend(crashed: Iterable[Crash]) -> list[Crash]:
    """Those that were suspended before."""
    return [found for found in crashed if found.suspended]


def to_revive(crashed: Iterable[Crash], now: datetime) -> list[UUID]:
    """Those that have not used up their lives, and crashed not long ago."""
    return [found.run.id for found in _wanted(crashed) if not (found.hopeless or forgotten(found.run, now))]


def to_give_up(crashed: Iterable[Crash], now: datetime) -> list[FlowRun]:
    """Those that go on no more: their lives are used up, or they crashed so long ago that nobody waits for them."""
    return [found.run for found in _wanted(crashed) if found.hopeless or forgotten(found.run, now)]


def _wanted(crashed: Iterable[Crash]) -> list[Crash]:
    """Those that were to go on."""
    return [found for found in crashed if not (found.cancelled or found.suspended)]


def _since(found: FlowRun, now: datetime) -> timedelta:
    """For how long a flow run has been in its state."""
    return now - found.state.timestamp if found.state else timedelta()


def deployed_since(found: FlowRun, now: datetime, least: timedelta) -> bool:
    """Whether a flow run is of a deployment, so that workers can take it up, and has been in its state for so long."""
    return found.deployment_id is not None and _since(found, now) >= least


def forgotten(found: FlowRun, now: datetime) -> bool:
    """Whether a flow run came into its state so long ago that nobody waits for it."""
    return _since(found, now) > FORGOTTEN


def settled(found: FlowRun, now: datetime) -> bool:
    """Whether a flow run came into its state a while ago, but not long ago."""
    return SETTLED <= _since(found, now) <= FORGOTTEN
