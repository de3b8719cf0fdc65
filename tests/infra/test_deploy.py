"""Proves what deploying makes of prefect.yaml and of the automation, and that it says in a line what it lacks. That it
deploys, and leaves alone what was set since, the tests of the stack show."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import DeploymentResponse
from prefect.testing.utilities import prefect_test_harness

from infra.deploy import AUTOMATIONS, automate, merged
from tests.conftest import free_ports
from tests.infra.conftest import ROOT

SET = {"PREFECT_API_URL": "http://127.0.0.1:1/api", "LENET_STORAGE": "s3://bucket/store"}


@pytest.mark.parametrize("missing", SET)
def test_what_is_not_set_is_one_line(missing: str) -> None:
    done = deploy(SET | {missing: ""})
    assert done.returncode == 2
    assert done.stderr.startswith(f"deploy: {missing}='': is not set; ")
    assert done.stderr.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}/api"
    done = deploy(SET | {"PREFECT_API_URL": url})
    assert done.returncode > 0
    assert done.stderr.startswith(f"deploy: {url}: ")
    assert done.stderr.endswith("check that Prefect is up\n")
    assert done.stderr.count("\n") == 1


def test_the_environment_goes_before_the_file_and_the_file_before_what_was_set_at_the_server() -> None:
    there_is = DeploymentResponse(
        name="train-lenet", flow_id=uuid4(), parameters={"epochs": 20, "lr": 0.5, "storage": "s3://old", "seed": 7}
    )
    entry = {"name": "train-lenet", "parameters": {"lr": 0.1, "seed": 7}, "schedules": [{"interval": 3600}]}
    found = merged(entry, there_is, {"LENET_STORAGE": "s3://new", "LENET_RAY_ADDRESS": ""})
    assert found["parameters"] == {"epochs": 20, "lr": 0.1, "storage": "s3://new", "seed": 7}
    assert found["schedules"] == entry["schedules"], "somebody deleted all there were, or there were none"
    first = merged(entry, None, {})
    assert first == entry


def test_an_automation_is_made_anew_only_if_the_file_says_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an automation goes what it waits for: to hear again of a flow run whose process has just died."""
    with prefect_test_harness(server_startup_timeout=120), get_client(sync_client=True) as client:
        automate(client)
        [first] = client.read_automations_by_name("crash-zombie-flow-runs")
        automate(client)
        assert client.read_automations_by_name(first.name) == [first]
        client.pause_automation(first.id)
        automate(client)
        [paused] = client.read_automations_by_name(first.name)
        assert (paused.id, paused.enabled) == (first.id, False)
        file = tmp_path / "automations.yaml"
        file.write_text(AUTOMATIONS.read_text().replace("within: 90", "within: 120"))
        monkeypatch.setattr("infra.deploy.AUTOMATIONS", file)
        automate(client)
        [anew] = client.read_automations_by_name(first.name)
        assert anew.id != first.id
        assert (anew.trigger.within, anew.enabled) == (timedelta(seconds=120), False)


@pytest.mark.parametrize(
    ("name", "known"),
    [("train-lenet", {"epochs": 3}), ("predict-lenet", {"workers": 1}), ("retention", {"keep_days": 9})],
)
def test_what_was_set_at_the_server_goes_where_the_flow_does_not_know_it_any_more(
    capsys: pytest.CaptureFixture[str], name: str, known: dict[str, int]
) -> None:
    there_is = DeploymentResponse(name=name, flow_id=uuid4(), parameters={"colour": "red", **known})
    assert merged({"name": name}, there_is, {})["parameters"] == known
    assert capsys.readouterr().out == f"{name}: dropped, as the flow has no such parameter any more: colour\n"


def deploy(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infra.deploy"]
    return subprocess.run(command, env={**os.environ, **variables}, cwd=ROOT, capture_output=True, text=True)
