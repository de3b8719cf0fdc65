"""Proves on a real Prefect server what the caretaker does about cancelled flow runs, whatever is wrong with one, and
about those that crash, once or again and again, were suspended, did not begin, live although they are said to have
crashed, or run by name alone."""

import logging
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed, Pending, Running, Suspended
from prefect.variables import Variable

from flows.caretaker import NOT_BEGUN, SILENT, begin_again, bury, cancel, give_up, revive, stop_left, suspend
from flows.crashes import HEARD_AGAIN, LIVES, SETTLED, TAG, UNHEARD, cancelled_at, find_crashed
from flows.train_lenet import train_lenet
from pipeline import run
from tests.conftest import free_ports, wait_for

ROOT = Path(__file__).parents[2]
BEAT = "prefect.flow-run.heartbeat"
IN_VAIN = "cannot be looked for"


def begun(client: SyncPrefectClient, tags: tuple[str, ...], *states: State[Any], **parameters: str) -> UUID:
    """A flow run that has been through these states; the server knows the parameters that were given, no defaults."""
    found = client.create_flow_run(train_lenet, parameters=parameters, tags=tags)
    for state in states:
        client.set_flow_run_state(found.id, state, force=True)
    return found.id


@pytest.mark.usefixtures("prefect")
def test_cancelled_flow_runs_are_looked_after_whatever_is_wrong_with_one_of_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"  # where no job can be looked for
    seen: dict[UUID, bool] = {}
    caplog.set_level(logging.WARNING, "flows.caretaker")
    with get_client(sync_client=True) as client:
        ended: tuple[State[Any], ...] = (Running(), Cancelled())
        unnamed = begun(client, (TAG,), *ended, ray_address=nobody)
        wrong = begun(client, (TAG,), *ended, dataset="no such", ray_address=nobody)
        taken_up: tuple[State[Any], ...] = Running(), Crashed(), AwaitingRetry()
        resumed = [begun(client, (TAG,), *ended, run_id=f"r{i}", ray_address=nobody) for i in range(len(taken_up))]
        for number, state in enumerate(taken_up):
            begun(client, (), Running(), state, run_id=f"r{number}", ray_address=nobody)
        settled = datetime.now(UTC) + SETTLED
        assert stop_left(client, settled, seen) == []
        assert seen == {unnamed: False, wrong: True} | dict.fromkeys(resumed, True)  # False: it may still come back
        said = [record.getMessage() for record in caplog.records if IN_VAIN in record.getMessage()]
        assert {found for found in seen if any(str(found) in line for line in said)} == {unnamed, wrong}
        caplog.clear()
        stop_left(client, settled, seen)
        assert IN_VAIN not in caplog.text


def deployed(client: SyncPrefectClient, *states: State[Any]) -> UUID:
    """A flow run of our deployment that has been through these states."""
    deployment = client.create_deployment(client.create_flow(train_lenet), "train-lenet", tags=[TAG])
    found = client.create_flow_run_from_deployment(deployment)
    for state in states:
        client.set_flow_run_state(found.id, state, force=True)
    return found.id


def ends(client: SyncPrefectClient, *flow_runs: UUID) -> list[tuple[str | None, str | None]]:
    """The state of each, and what it says."""
    states = [client.read_flow_run(flow_run).state for flow_run in flow_runs]
    return [(state.name, state.message) for state in states if state]


@pytest.mark.usefixtures("prefect")
def test_what_crashed_too_often_or_never_began_is_given_up_and_people_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    gone = Crashed(message="the process is gone")
    with get_client(sync_client=True) as client:
        Variable.set("lenet_notify", "no-such/block", overwrite=True)
        often, once = deployed(client, *[Running()] * LIVES, gone), deployed(client, Running(), gone)
        never = deployed(client, Pending(), gone, AwaitingRetry(), Pending(), gone)
        reported_twice = deployed(client, Pending(), gone, gone)
        begun(client, (TAG,), Running(), gone)  # of no deployment: no worker takes it up
        assert find_crashed(client, datetime.now(UTC)) == []  # not settled yet
        settled = datetime.now(UTC) + SETTLED
        crashed = find_crashed(client, settled)
        assert set(give_up(client, crashed, settled)) == {often, never}
        assert set(revive(client, crashed, settled)) == {once, reported_twice}
        assert find_crashed(client, settled) == []
        assert ends(client, often, never) == [
            ("Failed", f"crashed {LIVES} times; the last time: the process is gone"),
            ("Failed", "crashed before it began: the process is gone"),
        ]
    said = [record.getMessage() for record in caplog.records if record.name == "flows.notify"]
    for given_up in (often, never):  # in vain, and it is said of which
        which = f"({str(given_up)[:8]}): Failed: "
        assert [line for line in said if line.startswith("nobody was notified that ") and which in line]
    assert len(said) == 2


@pytest.mark.usefixtures("prefect")
def test_what_was_cancelled_does_not_go_on_and_what_did_not_begin_does() -> None:
    with get_client(sync_client=True) as client:
        for way in ([Cancelling()], [Cancelling(), Cancelled()]):
            cancelled = deployed(client, Running(), *way, Crashed())
            settled = datetime.now(UTC) + SETTLED
            crashed = find_crashed(client, settled)
            assert cancel(client, crashed) == [cancelled]
            assert revive(client, crashed, settled) == give_up(client, crashed, settled) == []
            assert ends(client, cancelled) == [("Cancelled", "it was cancelled, and crashed over it")]
        pending = deployed(client, Pending())
        begun(client, (TAG,), Pending())
        assert begin_again(client, datetime.now(UTC)) == []
        assert begin_again(client, datetime.now(UTC) + NOT_BEGUN) == [pending]
        assert ends(client, pending) == [("AwaitingRetry", None)]


@pytest.mark.usefixtures("prefect")
def test_what_was_suspended_waits_to_be_resumed_whatever_becomes_of_its_process() -> None:
    until, gone = datetime.now(UTC) + timedelta(days=7), Crashed(message="the process is gone")
    with get_client(sync_client=True) as client:
        suspended = deployed(client, Running(), Suspended(pause_expiration_time=until), gone)
        settled = datetime.now(UTC) + SETTLED
        crashed = find_crashed(client, settled)
        assert cancel(client, crashed) == []
        assert suspend(client, crashed) == [suspended]
        assert revive(client, crashed, settled) == give_up(client, crashed, settled) == []
        state = client.read_flow_run(suspended).state
        assert state is not None
        assert (state.name, state.state_details.pause_timeout) == ("Suspended", until)
        client.resume_flow_run(suspended)
        assert ends(client, suspended) == [("Resuming", None)]


@pytest.mark.usefixtures("prefect")
def test_what_is_taken_up_and_cancelled_before_it_has_its_place_waits_for_no_process() -> None:
    with get_client(sync_client=True) as client:
        crashed, pending = deployed(client, Running(), Crashed()), deployed(client, Pending())
        for flow_run in (crashed, pending):
            client.update_flow_run(flow_run, infrastructure_pid="host:4711")
        settled = datetime.now(UTC) + SETTLED
        assert revive(client, find_crashed(client, settled), settled) == [crashed]
        assert begin_again(client, datetime.now(UTC) + NOT_BEGUN) == [pending]
        for flow_run in (crashed, pending):
            client.set_flow_run_state(flow_run, Cancelling())
            assert [state for state, _ in ends(client, flow_run)] == ["Cancelled"]


@pytest.mark.usefixtures("prefect")
def test_what_is_not_heard_any_more_has_crashed_though_the_server_was_away_when_its_process_died() -> None:
    def beats() -> int:
        return len(client.read_events(EventFilter(event=EventNameFilter(name=[BEAT])), limit=50).events)

    with get_client(sync_client=True) as client:
        silent, living, never = (deployed(client, Running()) for _ in range(3))
        ended, strange = deployed(client, Running(), Cancelled()), begun(client, (), Running())
        died = datetime.now(UTC)
        alive, now = died + timedelta(seconds=1), died + SILENT  # no more: the server tells of no beat that is to come
        for flow_run, when in (
            (silent, died),
            (living, died),
            (living, alive),
            (ended, died),
            (strange, died),
        ):
            emit_event(BEAT, {"prefect.resource.id": f"prefect.flow-run.{flow_run}"}, occurred=when)
        wait_for(lambda: beats() == 5)
        assert bury(client, now, now - SILENT / 2) == []  # the server has not been there for long
        assert bury(client, died + SILENT / 2, died - SILENT) == []
        assert bury(client, now, now - SILENT) == [silent]
        assert ends(client, silent) == [("Crashed", f"{UNHEARD} for 180 seconds; its process is gone.")]
        assert ends(client, living, never, strange) == [("Running", None)] * 3
        later = now + HEARD_AGAIN
        assert revive(client, find_crashed(client, later), later) == [silent]


@pytest.mark.usefixtures("prefect")
def test_what_is_taken_again_and_again_and_never_begins_is_given_up_and_people_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    taken = [AwaitingRetry(), Pending()]
    with get_client(sync_client=True) as client:
        Variable.set("lenet_notify", "no-such/block", overwrite=True)
        never = deployed(client, Pending(), *taken * LIVES)
        nearly = deployed(client, Pending(), *taken * (LIVES - 1))
        assert begin_again(client, datetime.now(UTC) + NOT_BEGUN) == [nearly]
        assert ends(client, never) == [("Failed", f"given to the workers again {LIVES} times, and not begun")]
    [said] = [record.getMessage() for record in caplog.records if record.name == "flows.notify"]
    assert said.startswith("nobody was notified that ")  # but tried


@pytest.mark.usefixtures("prefect")
def test_the_job_of_one_that_crashed_over_its_cancellation_is_stopped_only_if_begun_before_that(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[datetime] = []
    monkeypatch.setattr(run, "stop", lambda config, run_id, before: asked.append(before))
    with get_client(sync_client=True) as client:
        found = deployed(client, Running(), Cancelling(), Crashed())
        told = cancelled_at(client.read_flow_run_states(found))
        settled = datetime.now(UTC) + SETTLED
        assert cancel(client, find_crashed(client, settled)) == [found]
        stop_left(client, settled + SETTLED, {})
    assert asked == [told]


@pytest.mark.usefixtures("prefect")
def test_what_is_heard_again_is_not_taken_up_while_it_lives() -> None:
    with get_client(sync_client=True) as client:
        silent, living = (deployed(client, Running(), Crashed(message=f"{UNHEARD} for 90 seconds")) for _ in range(2))
        beat = emit_event(BEAT, {"prefect.resource.id": f"prefect.flow-run.{living}"})
        assert beat is not None
        wait_for(lambda: client.read_events(EventFilter(event=EventNameFilter(name=[BEAT])), limit=1).events)
        assert find_crashed(client, beat.occurred + HEARD_AGAIN / 2) == []  # of neither it is known yet
        assert [found.run.id for found in find_crashed(client, beat.occurred + HEARD_AGAIN)] == [silent]
        later = beat.occurred + HEARD_AGAIN + timedelta(seconds=1)
        assert set(revive(client, find_crashed(client, later), later)) == {silent, living}


def test_without_a_server_to_look_after_it_says_so_in_a_line(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    env["PREFECT_HOME"] = str(tmp_path)
    command = [sys.executable, "-m", "flows.caretaker"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.startswith("caretaker: PREFECT_API_URL='': is not set; ")
    assert done.stderr.count("\n") == 1
