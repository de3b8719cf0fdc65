"""Proves the local stack: it comes up, runs flows on its own S3 and Ray by the deployments, whatever happens to their
processes, mends itself, and goes down."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolUpdate
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from prefect.variables import Variable
from prometheus_client.parser import text_string_to_metric_families

from flows.notify import VARIABLE
from infra.__main__ import _found
from infra.stack import DATABASE, PARTS, Stack, configuration, environment, inherited, programs
from pipeline.batch import read_manifest
from pipeline.checkpoint import FILE_NAME, read_state
from pipeline.progress import PROGRESS
from pipeline.publish import read_latest, verify_run
from pipeline.run import RunConfig
from pipeline.served import open_model
from pipeline.storage import Store, open_store
from pipeline.train import find_training, staging
from tests.conftest import wait_for
from tests.infra.stack import Running


def begun(store: Store, run_id: str) -> bool:
    """Whether a run has an epoch behind it."""
    return bool(store.keys(f"{staging(run_id)}/{PROGRESS}"))


@contextlib.contextmanager
def listening(stack: Running) -> Iterator[list[str]]:
    """What people are told of the stack's flows, by a webhook of theirs."""
    told: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["about"])
            self.send_response(200)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    with temporary_settings({PREFECT_API_URL: stack.env()["PREFECT_API_URL"]}):
        block = CustomWebhookNotificationBlock(
            name="ops", url=f"http://127.0.0.1:{server.server_port}", json_data={"about": "{{subject}}: {{body}}"}
        )
        block.save("ops", overwrite=True)
        Variable.set(VARIABLE, f"{block.get_block_type_slug()}/ops", overwrite=True)
        try:
            yield told
        finally:
            Variable.unset(VARIABLE)
            server.shutdown()


def scrape(ports: list[int], into: dict[str, float], ended: threading.Event) -> None:
    """The run's metrics, as Prometheus would take them from the nodes: the newest value of each."""
    while not ended.wait(1):
        for port in ports:
            try:
                text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
            except httpx.HTTPError:
                continue
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.labels.get("run") == "first":
                        into[family.name] = sample.value


def test_a_deployment_has_the_form_of_the_command_line_and_a_schedule_that_is_off(stack: Running) -> None:
    deployment = stack.deployment()
    schema = deployment["parameter_openapi_schema"]["properties"]
    assert list(schema) == list(RunConfig.model_fields)
    assert "Passes over the training set." in schema["epochs"]["description"]
    assert (schema["lr"]["anyOf"][0]["maximum"], schema["workers"]["default"]) == (100, "auto")
    assert [(s["schedule"]["cron"], s["active"]) for s in deployment["schedules"]] == [("0 3 * * *", False)]
    assert deployment["global_concurrency_limit"]["limit"] == 1


def switch_schedule(stack: Running, on: bool) -> list[dict[str, Any]]:
    """As a click in the UI does it; the schedules as they were."""
    deployment = stack.deployment()
    for schedule in deployment["schedules"]:
        stack.client.update_deployment_schedule(deployment["id"], schedule["id"], active=on)
    return list(deployment["schedules"])


def test_a_schedule_that_is_switched_on_makes_runs(stack: Running) -> None:
    try:
        switch_schedule(stack, on=True)
        scheduled = {"tags": {"all_": ["auto-scheduled"]}}
        wait_for(lambda: stack.ask("/flow_runs/filter", flow_runs=scheduled, limit=1))
        [next_run] = stack.ask("/flow_runs/filter", flow_runs=scheduled, limit=1, sort="EXPECTED_START_TIME_ASC")
        assert next_run["expected_start_time"][11:19] == "03:00:00"
    finally:
        switch_schedule(stack, on=False)


def test_a_flow_runs_on_the_stack_and_says_so_everywhere(stack: Running, bucket: Store) -> None:
    metrics: dict[str, float] = {}
    ended = threading.Event()
    ports = _found(stack.folder).metrics_ports
    scraper = threading.Thread(target=scrape, args=(ports, metrics, ended))
    scraper.start()
    try:
        stack.run("train-lenet", "epochs=4", "run_id=first")
    finally:
        ended.set()
        scraper.join()
    assert stack.jobs("first") == ["SUCCEEDED"]

    # In the bucket, by its manifests, and for a browser.
    manifest = verify_run(bucket, "first")
    latest = read_latest(bucket)
    assert latest is not None
    assert latest.run_id == "first"
    assert 0.6 < manifest.accuracy < 0.8  # 0.7254 after four epochs of seed 0
    assert open_model(bucket.url).place == "lenet version 1 (first)"
    page = httpx.get(_found(stack.folder).index, timeout=30)
    assert page.headers["content-type"].startswith("text/html")
    assert "runs/first/report.html" in page.text

    # In Prefect.
    assert stack.flow_run()["name"] == "fashion-mnist seed on 2 workers"
    messages = stack.messages()
    assert any(re.match(r"epoch 2 of 4: train loss 1\.20", message) for message in messages)
    assert {message[:6] for message in messages if re.match(r"rank \d: on cpu of", message)} == {"rank 0", "rank 1"}
    artifacts = {artifact["key"]: artifact["data"] for artifact in stack.ask("/artifacts/filter", limit=20)}
    assert artifacts["training-progress"] == 100
    assert f"**{manifest.accuracy:.2%}**" in artifacts["training-report"]
    assert artifacts["training-curves"].startswith("data:image/svg+xml;base64,")
    assert f"{bucket.url}/runs/first/report.html" in artifacts["report-page"]
    assert "there was no champion before" in artifacts["promotion"]
    secret = stack.env()["AWS_SECRET_ACCESS_KEY"]
    assert not any(secret in message for message in messages)
    assert not any(secret in log.read_text(errors="replace") for log in (stack.folder / "logs").iterdir())
    assert secret not in json.dumps(stack.ray("/api/jobs/"))

    # In Prometheus.
    assert {"ray_lenet_images_per_second", "ray_lenet_train_loss", "ray_lenet_held_out_accuracy"} <= metrics.keys()
    assert metrics["ray_lenet_images_per_second"] > 100
    assert 0 < time.time() - metrics["ray_lenet_checkpoint_timestamp_seconds"] < 600

    # The champion predicts what is in the bucket, by the other deployment, as a job too.
    shards = f"{bucket.url}/{manifest.dataset_folder}/test-*.parquet"
    stack.run("predict-lenet", f"source={shards}", f"output={bucket.url}/predicted")
    predicted = read_manifest(open_store(f"{bucket.url}/predicted"))
    assert predicted is not None
    assert (predicted.images, predicted.version, predicted.unreadable) == (10_000, 1, 0)

    def predicting() -> list[str]:
        named = [(str(job["submission_id"]), job["status"]) for job in stack.ray("/api/jobs/")]
        return [status for name, status in named if name.startswith("predict-")]

    wait_for(lambda: predicting() == ["SUCCEEDED"])  # its manifest is there a little sooner

    # The same run once more does nothing again: its steps find in the store that they are finished.
    before = {key: bucket.read(key) for key in bucket.keys("runs")}
    stack.run("train-lenet", "epochs=4", "run_id=first")
    assert {key: bucket.read(key) for key in bucket.keys("runs")} == before
    assert stack.jobs("first") == ["SUCCEEDED"]
    done_anew = r"starting Ray workers|.* written in|\d+ of \d+ test images right"
    assert [message for message in messages if re.match(done_anew, message)]
    assert [message for message in stack.messages() if re.match(done_anew, message)] == []


@pytest.mark.parametrize("gone", ["process", "machine"])
def test_a_flow_run_whose_process_or_machine_dies_is_taken_up_and_finds_its_training(
    stack: Running, bucket: Store, gone: str
) -> None:
    run_id = f"{gone}-gone"
    with listening(stack) as told:
        # At this rate it learns next to nothing: the champion stays, and people hear of that.
        stack.submit(epochs=12, run_id=run_id, lr=0.001, workers=1)
        wait_for(lambda: begun(bucket, run_id))
        if gone == "machine":  # nobody is left to say that the process has died, until its heartbeats are missed
            [worker] = [process for process in stack.processes("prefect") if "worker" in process.cmdline()]
            worker.kill()
        [process] = stack.processes("flows.engine")
        process.kill()
        wait_for(lambda: stack.flow_run()["state_type"] == "COMPLETED")
    assert stack.flow_run()["run_count"] == 2
    assert stack.jobs(run_id) == ["SUCCEEDED"]
    training = find_training(bucket, run_id)
    assert training is not None
    assert [epoch.epoch for epoch in training.history] == list(range(1, 13))
    verify_run(bucket, run_id)
    assert open_model(bucket.url).place == "lenet version 1 (first)"
    [refusal] = told
    assert refusal.startswith(f"{run_id} is not the champion of lenet: ")


def test_a_cancelled_flow_run_stops_its_training_and_frees_the_workers(stack: Running, bucket: Store) -> None:
    # An epoch has 1,875 steps: it hardly ends at the last of them.
    stack.submit(epochs=500, run_id="cancelled", workers=1, global_batch_size=32, lr=0.01)
    wait_for(lambda: begun(bucket, "cancelled"))
    workers = stack.processes("ray::RayTrainWorker")
    assert [worker.nice() for worker in workers] == [0]  # it does not give way to all else
    flow_run = stack.flow_run()
    started = time.monotonic()
    stack.client.set_flow_run_state(flow_run["id"], Cancelling())
    wait_for(lambda: stack.jobs("cancelled") in (["FAILED"], ["STOPPED"]) and not _workers(stack))
    assert time.monotonic() - started < 180  # 15, on a machine that does nothing else
    wait_for(lambda: stack.flow_run()["state_type"] == "CANCELLED")
    assert find_training(bucket, "cancelled") is None
    states = [key for key in bucket.keys(f"{staging('cancelled')}/ray") if key.endswith(FILE_NAME)]
    newest = max((at.epoch, at.step) for at in (read_state(bucket.read(key))[1] for key in states))
    assert newest[1] > 0, "there is none but of an epoch's end"


def test_wrong_keys_end_a_flow_in_a_line_and_who_wants_to_hear_of_it_is_told(stack: Running) -> None:
    with listening(stack) as told:
        stack.submit({"env": {"AWS_SECRET_ACCESS_KEY": "wrong-secret"}}, workers=1)
        wait_for(lambda: told)
    which = str(stack.flow_run()["id"])[:8]
    assert told[0].startswith(f"fashion-mnist seed on 1 worker ({which}): Failed: ")
    assert "access denied" in told[0]
    assert told[0].endswith("check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and its login")
    assert "\n" not in told[0]
    assert "wrong-secret" not in told[0]
    states = stack.states(stack.flow_run()["id"])
    at = {state["type"]: datetime.fromisoformat(state["timestamp"]) for state in states}
    assert (at["FAILED"] - at["RUNNING"]).total_seconds() < 60  # two retries would add 70


def _workers(stack: Running) -> list[str]:
    """Ray Train's workers that are alive."""
    found = stack.ray("/api/v0/actors")["data"]["result"]["result"]
    return [actor["class_name"] for actor in found if actor["state"] == "ALIVE" and "Worker" in actor["class_name"]]


def test_up_again_says_the_same_and_starts_nothing(stack: Running) -> None:
    def parts() -> set[int]:
        return {process.pid for process in supervisor.children()}

    [supervisor] = stack.processes("bin/supervisord")
    before = parts()
    assert len(before) == len(PARTS)
    deployment = stack.deployment()
    [night] = deployment["schedules"]
    later = CronSchedule(cron="0 5 * * *", timezone="Europe/Berlin")
    changed = DeploymentUpdate(parameters=deployment["parameters"] | {"seed": 7})
    stack.client.update_deployment_schedule(deployment["id"], night["id"], active=True, schedule=later)
    stack.client.update_deployment(deployment["id"], changed)
    stack.client.update_work_pool("lenet", WorkPoolUpdate(concurrency_limit=5))
    [automation] = stack.client.read_automations_by_name("crash-zombie-flow-runs")
    stack.client.pause_automation(automation.id)
    again = stack.command("up")
    assert again.returncode == 0, again.stderr
    assert [line.split() for line in again.stdout.splitlines()[: len(PARTS)]] == [[part, "up"] for part in PARTS]
    assert parts() == before
    # What was set in Prefect since stays.
    [schedule] = switch_schedule(stack, on=False)
    assert (schedule["active"], schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == (
        True, "0 5 * * *", "Europe/Berlin",
    )  # fmt: skip
    assert stack.deployment()["parameters"] == changed.parameters
    assert stack.client.read_work_pool("lenet").concurrency_limit == 5
    deployments = stack.ask("/deployments/filter")
    assert sorted(deployment["name"] for deployment in deployments) == ["predict-lenet", "retention", "train-lenet"]
    automations = stack.ask("/automations/filter")
    assert [(found["id"], found["enabled"]) for found in automations] == [(str(automation.id), False)]


def test_a_part_that_was_killed_is_seen_and_comes_back(stack: Running) -> None:
    [server] = stack.processes("weed mini")
    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: stack.command("status").returncode == 0)
    assert [line.split() for line in stack.command("status").stdout.splitlines()] == [[part, "up"] for part in PARTS]
    assert not server.is_running()


def test_a_server_that_comes_back_knows_who_holds_a_deployments_place(stack: Running) -> None:
    # As a flow run under way does it, every 225 seconds: one whose place is gone is ended.
    place = [stack.deployment()["global_concurrency_limit"]["name"]]
    lease = stack.client.increment_concurrency_slots_with_lease(place, 1, "concurrency", 300).json()["lease_id"]
    killed = stack.processes("server start") + stack.processes("prefect.server.api.server")
    assert killed
    for process in killed:
        process.kill()
    wait_for(lambda: stack.command("status").returncode == 0)
    stack.client.renew_concurrency_lease(lease, 300)  # which raises, if the server knows nothing of it
    stack.client.release_concurrency_slots_with_lease(lease)


def test_down_leaves_nothing_but_data_and_logs(stack: Running) -> None:
    assert len(stack.processes()) > len(PARTS)
    assert stack.command("down").returncode == 0
    assert stack.processes() == []
    done = stack.command("status")
    assert done.returncode == 1
    assert all("DOWN: the stack is not up" in line for line in done.stdout.splitlines())
    assert (stack.folder / "logs" / "ray-head.log").exists()
    assert stack.command("down").returncode == 0  # nothing to do is no error


def test_a_port_in_use_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    running = Running(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = running.command("up", *running.options[2:], "--prefect-port", port)
    assert done.returncode == 2
    assert done.stderr == (
        f"stack: prefect-port={port}: port {port} is in use by another program; stop that, or choose another with "
        "--prefect-port\n"
    )
    assert running.processes() == []


@pytest.mark.parametrize(
    ("folder", "options", "said"),
    [
        ("stack", ["--s3-port", "4195"], "s3-port=4195: port 4200 is one of --prefect-port's, too; choose another"),
        ("x" * 80, [], "the whole path may have 80 characters"),
    ],
    ids=["ports", "path"],
)
def test_what_cannot_be_is_one_line_and_makes_nothing(
    folder: str, options: list[str], said: str, tmp_path: Path
) -> None:
    done = Running(tmp_path / folder).command("up", *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_status_without_a_stack_is_one_line(tmp_path: Path) -> None:
    done = Running(tmp_path).command("status")
    assert done.returncode == 2
    assert done.stderr == f"stack: folder={str(tmp_path)!r}: no stack was started here; start one with: make up\n"


def test_credentials_are_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    stack = Stack(folder=tmp_path)
    first = environment(stack)
    assert environment(stack) == first
    assert environment(Stack(folder=tmp_path / "other"))["AWS_SECRET_ACCESS_KEY"] != first["AWS_SECRET_ACCESS_KEY"]
    for name in ("env", "ray-token"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    # No command line, which every user of the machine can read, has a secret in it; nor has the configuration.
    assert first["AWS_SECRET_ACCESS_KEY"] not in str(programs(stack))
    assert first["AWS_SECRET_ACCESS_KEY"] not in Path(configuration(stack)).read_text()


def test_of_the_shell_the_parts_have_all_but_other_clusters_and_may_have_a_database() -> None:
    shell = {"HOME": "/h", "AWS_PROFILE": "work", "RAY_ADDRESS": "10.0.0.1:6379", "PREFECT_API_URL": "http://other/api",
             DATABASE: "postgresql+asyncpg://prefect:secret@db/prefect"}  # fmt: skip
    assert inherited(shell) == {"HOME": "/h", DATABASE: shell[DATABASE]}


def test_no_two_parts_take_the_same_port() -> None:
    ports = [port for ports in Stack().ports.values() for port in ports]
    assert len(ports) == len(set(ports))
    given = [int(word.partition("=")[2]) for word in programs(Stack())["s3"] if ".port" in word and "=0" not in word]
    assert len(given) == len(set(given)) == 10
    assert set(given) <= set(ports)
