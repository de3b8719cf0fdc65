"""Proves the whole by command line: interrupted, on damaged data, and on a cluster whose S3 server restarts."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from pipeline.config import config_of
from pipeline.publish import find_run, read_latest, verify_run
from pipeline.storage import open_store
from pipeline.train import find_training, staging
from tests.conftest import wait_for

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


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

    config = run.begin(config_of({"storage": str(tmp_path / "store")}, run.RunConfig), "sharded")
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


def test_a_prefect_server_that_is_not_there_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.env["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    started = time.monotonic()
    process = command.start("--epochs", "1")
    out, err = process.communicate(timeout=120)
    assert time.monotonic() - started < 60  # 12 s on two cores with nothing else to do
    assert (process.returncode, out) == (2, "")
    message = r"lenet: PREFECT_API_URL='http://127.0.0.1:9/api': no Prefect server answers there [^\n]+\n"
    assert re.fullmatch(message, err), err
    wait_for(lambda: not command.processes(), 20)
