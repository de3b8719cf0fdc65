"""Proves the whole: by deployment on a real Prefect server, worker, Ray and S3, and by command line, interrupted."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from pipeline.batch import read_manifest
from pipeline.publish import find_run, read_latest, verify_run
from pipeline.registry import open_model
from pipeline.run import RunConfig
from pipeline.storage import open_store
from pipeline.train import find_training, staging

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=2).status == 200)  # noqa: S310 - loopback
    except OSError:
        return False


class PrefectServer:
    """A Prefect server with a home of its own."""

    def __init__(self, home: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api"
        self.env = {
            **os.environ,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        command = [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        self.log = (home / "server.log").open("wb")
        self.process = subprocess.Popen(command, env=self.env, stdout=self.log, stderr=self.log, start_new_session=True)
        wait_for(lambda: answers(f"{self.url}/health"), 120)

    def prefect(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            [BIN / "prefect", *arguments],
            cwd=ROOT, env={**self.env, **(env or {})}, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(  # noqa: S310 - loopback
            f"{self.url}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return json.load(answer)


def end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = PrefectServer(tmp_path_factory.mktemp("prefect"), port)
    yield server
    end(server.process)
    server.log.close()


@pytest.fixture
def worker(prefect_server: PrefectServer, s3_env: dict[str, str], tmp_path: Path) -> Iterator[None]:
    prefect_server.prefect("work-pool", "create", "lenet", "--type", "process")
    with (tmp_path / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "prefect", "worker", "start", "--pool", "lenet"],
            cwd=ROOT, env={**prefect_server.env, **s3_env}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        yield
        end(process)


@pytest.mark.usefixtures("worker")
def test_a_deployment_runs_on_a_real_server_worker_ray_and_s3(
    prefect_server: PrefectServer, s3_server: Any, s3_env: dict[str, str]
) -> None:
    prefect_server.prefect("deploy", "--all")
    deployment = prefect_server.ask("/deployments/name/train-lenet/train-lenet")
    schema = deployment["parameter_openapi_schema"]["properties"]
    assert list(schema) == list(RunConfig.model_fields)
    assert "Passes over the training set." in schema["epochs"]["description"]
    assert (schema["lr"]["anyOf"][0]["maximum"], schema["workers"]["default"]) == (100, 2)
    assert [(s["schedule"]["cron"], s["active"]) for s in deployment["schedules"]] == [("0 3 * * *", False)]

    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
    parameters = ["-p", "epochs=2", "-p", f"storage={url}", "-p", "run_id=nightly"]
    out = prefect_server.prefect("deployment", "run", "train-lenet/train-lenet", *parameters, "--watch")
    assert "Completed" in out

    store = open_store(url)
    manifest = verify_run(store, "nightly")
    latest = read_latest(store)
    assert latest is not None
    assert latest.run_id == "nightly"
    assert 0.4 < manifest.accuracy < 0.7  # 0.5177 after two epochs of seed 0
    report = json.loads(store.read("runs/nightly/report.json"))
    assert report["parameters"]["epochs"] == 2
    assert len(report["history"]) == 2

    [flow_run] = prefect_server.ask("/flow_runs/filter", limit=10)
    logs = prefect_server.ask("/logs/filter", logs={"flow_run_id": {"any_": [flow_run["id"]]}}, limit=200)
    messages = [line["message"] for line in logs]
    assert any(re.match(r"epoch 2 of 2: train loss 1\.20", message) for message in messages)
    assert not any(s3_env["AWS_SECRET_ACCESS_KEY"] in message for message in messages)
    artifacts = {artifact["key"]: artifact for artifact in prefect_server.ask("/artifacts/filter", limit=10)}
    assert {"training-progress", "training-report", "report-page"} <= artifacts.keys()
    assert artifacts["training-progress"]["data"] == 100
    assert f"**{manifest.accuracy:.2%}**" in artifacts["training-report"]["data"]
    assert f"{url}/runs/nightly/report.html" in artifacts["report-page"]["data"]

    assert "there was no champion before" in artifacts["promotion"]["data"]
    assert open_model(url).run_id == "nightly"

    # The champion predicts what is in the bucket, by the other deployment.
    shards = f"source={url}/{manifest.dataset_folder}/test-*.parquet"
    given = ["-p", shards, "-p", f"model={url}", "-p", f"output={url}/predicted"]
    out = prefect_server.prefect("deployment", "run", "predict-lenet/predict-lenet", *given, "--watch")
    assert "Completed" in out
    predicted = read_manifest(open_store(f"{url}/predicted"))
    assert predicted is not None
    assert (predicted.images, predicted.version, predicted.unreadable) == (10_000, 1, 0)

    # The same run once more does nothing again: Prefect finds its steps finished in the store.
    before = {key: store.read(key) for key in store.keys("runs")}
    out = prefect_server.prefect("deployment", "run", "train-lenet/train-lenet", *parameters, "--watch")
    assert "Completed" in out
    assert {key: store.read(key) for key in store.keys("runs")} == before


class Command:
    """`lenet train` in a session and a Prefect home of its own, its processes marked by an environment variable."""

    def __init__(self, folder: Path, storage: str | None = None) -> None:
        self.folder = folder
        self.storage = storage or str(folder / "store")
        self.env = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "LENET_TEST": str(folder)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [str(BIN / "lenet"), "train", "--storage", self.storage, *arguments]
        return subprocess.Popen(
            command, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    def processes(self) -> list[str]:
        """What still runs of it, and of all that it started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LENET_TEST") == str(self.folder) and process.status() != "zombie":
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


def test_ctrl_c_leaves_nothing_and_the_same_run_id_goes_on_to_a_published_report(tmp_path: Path) -> None:
    command = Command(tmp_path)
    store = open_store(str(tmp_path / "store"))
    first = command.start("--epochs", "3", "--run-id", "r")
    wait_for(lambda: store.exists(f"{staging('r')}/progress/00001.json"), 400)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to all of the foreground
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130, out + err
    assert err == "lenet: interrupted; the same --run-id goes on from the last checkpoint\n"
    assert find_run(store, "r") is None
    assert read_latest(store) is None
    wait_for(lambda: not command.processes(), 20)

    shards = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    second = command.start("--epochs", "3", "--run-id", "r")
    out, err = second.communicate(timeout=300)
    assert (second.returncode, err) == (0, "")
    manifest = verify_run(store, "r")
    lines = out.splitlines()
    assert lines[-1] == f"test accuracy {manifest.accuracy:.4f} · report: {tmp_path}/store/runs/r/report.html"
    step = r" *(download|shards|train|evaluate|publish|registry)  \S|test accuracy "
    assert all(re.match(step, line) for line in lines), out
    training = find_training(store, "r")
    assert training is not None
    assert [epoch.epoch for epoch in training.history] == [1, 2, 3]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == shards
    wait_for(lambda: not command.processes(), 20)
    listed = subprocess.run(
        [BIN / "lenet", "runs", "--storage", command.storage], capture_output=True, text=True, check=True
    )
    run_id, state, dataset, recipe, epochs, _, accuracy, *_ = listed.stdout.splitlines()[-1].split()
    assert (run_id, state, dataset, recipe, epochs) == ("r", "published", "fashion-mnist", "seed", "3/3")
    assert accuracy == f"{manifest.accuracy:.4f}"


def test_a_damaged_shard_stops_the_command_with_one_line(tmp_path: Path) -> None:
    command = Command(tmp_path)
    from pipeline import run

    config = run.begin(run.config_of({"storage": str(tmp_path / "store")}), "sharded")
    run.shard(config, run.download(config))
    shard = next(tmp_path.rglob("train-00001-of-00006.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    process = command.start("--epochs", "1", "--run-id", "r")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.fullmatch(r"lenet: \S+/train-00001-of-00006\.parquet: shard is altered, [^\n]+\n", err)
    assert "Traceback" not in out
    assert find_training(open_store(str(tmp_path / "store")), "r") is None


def test_a_cluster_of_two_nodes_trains_over_an_s3_server_that_restarts_meanwhile(
    own_s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in own_s3_server.env.items():
        monkeypatch.setenv(name, value)  # the nodes inherit it
    url = f"s3://{own_s3_server.bucket}/cluster"
    store = open_store(url)
    # One CPU on each node: two workers fit on neither, so both nodes train.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        process = Command(tmp_path, url).start("--epochs", "3", "--run-id", "r", "--ray-address", cluster.address)
        wait_for(lambda: store.exists(f"{staging('r')}/progress/00001.json"), 400)
        own_s3_server.stop()
        time.sleep(4)
        own_s3_server.start()
        out, err = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert (process.returncode, err) == (0, ""), out
    verify_run(store, "r")
    training = find_training(store, "r")
    assert training is not None
    assert [epoch.epoch for epoch in training.history] == [1, 2, 3]
    assert training.history[2].train_loss == pytest.approx(0.82695, abs=1e-4)  # as on one node
