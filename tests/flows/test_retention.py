"""Proves that retention can be listed and done from the command line, and as a flow with its table in Prefect."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client

from flows.cli import main
from pipeline.retention import RetentionConfig
from pipeline.storage import open_store

ROOT = Path(__file__).resolve().parents[2]
LINE = "begun  all of it  1.0 MiB  it never finished, and is 60 days old\n"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a run that was begun sixty days ago, and one that was begun now."""
    store = open_store(str(tmp_path / "store"))
    for name in ("begun", "young"):
        store.put(f"staging/{name}/run.json", b"{}")
        store.put(f"staging/{name}/ray/checkpoint/state.bin", bytes(2**20))
    then = time.time() - 60.5 * 24 * 3600
    for key in store.keys("staging/begun"):
        os.utime(store.path(key), (then, then))
    return tmp_path / "store"


def lenet(*arguments: str) -> object:
    """Run a command in this process; its exit code."""
    try:
        main(arguments)
    except SystemExit as left:
        return left.code
    return 0


def test_it_lists_and_with_delete_removes(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["retention", "--storage", str(store), "--keep-last", "0"]
    assert lenet("retention", "--storage", str(store)) == 0  # of two runs, both are among the newest
    assert (
        capsys.readouterr().out == "to remove: 0 runs and the working copies of 0 more, 0.0 MiB; runs left alone: 2\n"
    )
    assert lenet(*command) == 0
    total = "1 run and the working copies of 0 more, 1.0 MiB; runs left alone: 1\n"
    assert capsys.readouterr().out == f"{LINE}to remove: {total}"
    assert (store / "staging/begun/run.json").exists()
    assert lenet(*command, "--delete") == 0
    assert capsys.readouterr().out == f"{LINE}removed: {total}"
    assert not (store / "staging/begun").exists()
    assert (store / "staging/young/run.json").exists()
    assert (store / "index.html").exists()


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert lenet("retention", "--keep-days", "0") == 2
    said = capsys.readouterr().err
    assert said.startswith("lenet: keep_days=0: it should be greater than or equal to 1; use a number from 1 to 36500")
    assert said.count("\n") == 1


def test_help_says_that_nothing_goes_without_delete(capsys: pytest.CaptureFixture[str]) -> None:
    assert lenet("retention", "--help") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Without it, nothing is removed: it only lists what would be." in said


def test_the_flow_removes_and_shows_what_went(prefect: None, store: Path) -> None:
    from flows.retention import retention

    flow: Any = retention
    plan = flow(storage=str(store), keep_last=0, delete=True)
    assert [removal.run_id for removal in plan.removals] == ["begun"]
    assert not (store / "staging/begun").exists()
    with get_client(sync_client=True) as client:
        response: Any = client.request("POST", "/artifacts/latest/filter")
    (shown,) = [artifact for artifact in response.json() if artifact["key"] == "retention"]
    assert shown["type"] == "table"
    assert '"run": "begun"' in shown["data"]
    assert shown["description"].startswith("removed: 1 run ")
    assert flow(storage=str(store), keep_last=0).removals == []  # an empty table is one too


def test_the_flows_form_has_every_parameter_and_its_deployment_is_off_and_only_lists() -> None:
    from flows.retention import retention

    assert set(retention.parameters.properties) == set(RetentionConfig.model_fields)
    assert retention.parameters.required == []
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (ours,) = [deployment for deployment in deployments if deployment["name"] == "retention"]
    assert "parameters" not in ours
    assert RetentionConfig.model_fields["delete"].default is False
    (schedule,) = ours["schedules"]
    assert (schedule["cron"], schedule["timezone"], schedule["active"]) == ("0 5 * * 0", "UTC", False)
    file, _, function = ours["entrypoint"].partition(":")
    assert (ROOT / file).exists()
    assert function == "retention"
