"""Looks after flow runs whose process is gone: `python -m flows.caretaker`, one process beside each Prefect server.

A crashed flow run is given to the workers again, and so goes on from its checkpoint, or follows the Ray job that still
trains; of one that crashes each time, people are told, as no process of its own is left to do so. The job of a
cancelled flow run whose process could not stop it any more is stopped.

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
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectException
from prefect.states import AwaitingRetry, Failed

from flows.notify import notify
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
FORGOTTEN = timedelta(days=1)
LIVES = 4


def to_revive(crashed: Iterable[FlowRun], now: datetime) -> list[UUID]:
    """Those that have begun, have not used up their lives, and crashed a while ago, but not long ago."""
    return [found.id for found in _deployed(crashed, now) if 1 <= found.run_count < LIVES]


def to_give_up(crashed: Iterable[FlowRun], now: datetime) -> list[FlowRun]:
    """Those that have used up their lives, or never began: their code is not to be found, say."""
    return [found for found in _deployed(crashed, now) if not 1 <= found.run_count < LIVES]


def find_crashed(client: SyncPrefectClient) -> list[FlowRun]:
    """Flow runs of our deployments that have crashed."""
    return _find(client, StateType.CRASHED)


def revive(client: SyncPrefectClient, crashed: Iterable[FlowRun], now: datetime) -> list[UUID]:
    """Let any worker take up what has crashed; the ids of those flow runs."""
    ids = to_revive(crashed, now)
    for flow_run_id in ids:
        client.set_flow_run_state(flow_run_id, AwaitingRetry(), force=True)
        log.info("flow run %s had crashed: it goes on", flow_run_id)
    return ids


def give_up(client: SyncPrefectClient, crashed: Iterable[FlowRun], now: datetime) -> list[UUID]:
    """Let what goes on no more count as failed, and tell people; the ids of those flow runs."""
    hopeless = to_give_up(crashed, now)
    for found in hopeless:
        how = f"crashed {found.run_count} times; the last time" if found.run_count else "crashed before it began"
        message = f"{how}: {found.state.message if found.state else ''}"
        client.set_flow_run_state(found.id, Failed(message=message), force=True)
        log.info("flow run %s is given up: %s", found.id, message)
        notify(f"{found.name}: Failed", message)
    return [found.id for found in hopeless]


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
        told, seen[found.id] = found.id in seen, True
        try:
            config = config_of(found.parameters, run.RunConfig)  # Prefect keeps what was given, not the defaults
            run_id = name_run(config.model_dump(), found.expected_start_time, found.id)
            cancelled_at = found.state.timestamp if found.state else now
            if run_id not in resumed and run.stop(config, run_id, before=cancelled_at):
                log.info("flow run %s was cancelled and run %s still trained: stopped", found.id, run_id)
                stopped.append(run_id)
        except Exception as error:  # whatever is wrong with one, the others are looked after
            seen[found.id] = not (isinstance(error, PipelineError) and error.may_pass)
            if not told:
                log.warning("flow run %s was cancelled, and its training cannot be looked for: %s", found.id, error)
    return stopped


def _deployed(crashed: Iterable[FlowRun], now: datetime) -> list[FlowRun]:
    return [found for found in crashed if found.deployment_id is not None and _settled(found, now)]


def _settled(found: FlowRun, now: datetime) -> bool:
    """Whether a flow run came into its state a while ago, but not long ago."""
    return found.state is not None and SETTLED <= now - found.state.timestamp <= FORGOTTEN


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
    with get_client(sync_client=True) as client:
        log.info("looking after flow runs of %s", client.api_url)
        while True:
            try:
                crashed = find_crashed(client)
                revive(client, crashed, datetime.now(UTC))
                give_up(client, crashed, datetime.now(UTC))
                stop_left(client, datetime.now(UTC), seen)
            except (httpx.HTTPError, PrefectException) as error:
                log.warning("Prefect cannot be asked: %s", error)
            time.sleep(POLL_S)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        print(f"caretaker: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
