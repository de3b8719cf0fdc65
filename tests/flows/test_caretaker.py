"""Proves on a real Prefect server what the caretaker does about cancelled flow runs, whatever is wrong with one, and
about those that crash again and again."""

import logging
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry, Cancelled, Crashed, Running
from prefect.variables import Variable

from flows.caretaker import (
    FORGOTTEN,
    LIVES,
    SETTLED,
    TAG,
    find_crashed,
    give_up,
    revive,
    stop_left,
    to_give_up,
    to_revive,
)
from flows.train_lenet import name_run, train_lenet
from pipeline.run import RunConfig
from tests.conftest import free_ports

ROOT = Path(__file__).parents[2]
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


@pytest.mark.usefixtures("prefect")
def test_what_crashed_too_often_or_never_began_is_given_up_and_people_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with get_client(sync_client=True) as client:
        Variable.set("lenet_notify", "no-such/block", overwrite=True)
        deployment = client.create_deployment(client.create_flow(train_lenet), "train-lenet", tags=[TAG])

        def crashed(*begun: State[Any]) -> UUID:
            found = client.create_flow_run_from_deployment(deployment)
            for state in [*begun, Crashed(message="the process is gone")]:
                client.set_flow_run_state(found.id, state, force=True)
            return found.id

        often, never, once = crashed(*[Running()] * LIVES), crashed(), crashed(Running())
        assert give_up(client, find_crashed(client), datetime.now(UTC)) == []  # not settled yet
        settled = datetime.now(UTC) + SETTLED
        assert set(give_up(client, find_crashed(client), settled)) == {often, never}
        assert give_up(client, find_crashed(client), settled) == []
        assert revive(client, find_crashed(client), settled) == [once]
        states = [client.read_flow_run(found).state for found in (often, never)]
    messages = [
        f"crashed {LIVES} times; the last time: the process is gone",
        "crashed before it began: the process is gone",
    ]
    assert [(state.name, state.message) for state in states if state] == [("Failed", text) for text in messages]
    said = [record.getMessage() for record in caplog.records if record.name == "flows.notify"]
    assert sum(line.startswith("nobody was notified that ") for line in said) == 2  # but tried


def test_what_crashed_a_moment_or_long_ago_or_is_of_no_deployment_is_left_alone() -> None:
    now, second = datetime.now(UTC), timedelta(seconds=1)

    def crashed(lives: int, ago: timedelta = SETTLED, deployed: bool = True) -> FlowRun:
        deployment = uuid4() if deployed else None
        state = Crashed(timestamp=now - ago)
        return FlowRun(flow_id=uuid4(), deployment_id=deployment, run_count=lives, state=state)

    good = [crashed(1), crashed(LIVES - 1), crashed(1, FORGOTTEN)]
    hopeless = [crashed(0), crashed(LIVES), crashed(LIVES + 1), crashed(0, FORGOTTEN)]
    others = [
        other
        for lives in (0, 1)
        for other in (
            crashed(lives, SETTLED - second),
            crashed(lives, FORGOTTEN + second),
            crashed(lives, deployed=False),
        )
    ]
    assert to_revive([*others, *good, *hopeless], now) == [found.id for found in good]
    assert to_give_up([*others, *good, *hopeless], now) == hopeless


@pytest.mark.parametrize("recipe", ["modern", "./mine/Tuned on müde.json", f"/{'x' * 99}.json"])
def test_a_run_without_a_name_gets_one_that_can_be_asked_for_again(recipe: str) -> None:
    parameters = {"dataset": "d" * 64, "recipe": recipe}
    run_id = name_run(parameters, datetime.now(UTC), uuid4())
    assert RunConfig.model_validate({"run_id": run_id}).run_id == run_id


def test_without_a_server_to_look_after_it_says_so_in_a_line(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    env["PREFECT_HOME"] = str(tmp_path)
    command = [sys.executable, "-m", "flows.caretaker"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.startswith("caretaker: PREFECT_API_URL='': is not set; ")
    assert done.stderr.count("\n") == 1
