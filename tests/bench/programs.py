"""The pipeline's programs on hosts of their own: Ray's head and a Prefect worker on the first, S3 and Prefect's server
on the last, and a Ray node with one CPU on each between them."""

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from infra.stack import ONLY_S3
from pipeline.errors import StorageError
from pipeline.storage import open_store
from tests.bench.network import Host

BIN = Path(sys.executable).parent
BUCKET, URL = "lenet", "s3://lenet/store"
PATIENCE_S = 300
# How soon the head gives up a host that does not answer. By default it asks every 3 s, waits 10 s, five times.
SOON = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Cluster:
    """The programs on the hosts, and what a client of theirs has to know."""

    def __init__(self, hosts: list[Host], folder: Path, soon: bool) -> None:
        self.head, *self.nodes, self.servers = hosts
        self.own = self.head.folder
        token = folder / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.token = {"Authorization": f"Bearer {token.read_text()}"}
        self.api = f"http://{self.servers.address}:4200/api"
        self.jobs, self.address = f"http://{self.head.address}:8265", f"{self.head.address}:6379"
        strangers = ("AWS_", "RAY_", "PREFECT_", "LENET_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(strangers)} | {
            "AWS_ENDPOINT_URL": f"http://{self.servers.address}:8333",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_EC2_METADATA_DISABLED": "true",
            "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(self.own / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "S3_BUCKET": BUCKET,
            "TMPDIR": str(self.own),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONWARNINGS": "ignore",
            **(SOON if soon else {}),
        }
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """All of them; the deployments too. Back when each answers."""
        (self.servers.kept / "s3").mkdir()
        mini = [str(BIN / "weed"), "mini", f"-dir={self.own / 's3'}", f"-ip={self.servers.address}"]
        mini += [f"-ip.bind={self.servers.address}", "-s3.port=8333", *ONLY_S3]
        self.servers.start("s3", mini, self.env)
        self.start_server()
        self.start_ray()
        wait_for(lambda: httpx.get(f"{self.api}/health", timeout=5).is_success, "the Prefect server is not up")
        given = {"LENET_STORAGE": URL, "LENET_RAY_ADDRESS": self.jobs}
        self.head.run([sys.executable, "-m", "infra.deploy"], self.env | given)
        self.head.start("prefect-worker", [str(BIN / "prefect"), "worker", "start", "--pool", "lenet"], self.env)
        wait_for(_store_is_up, "S3 is not up")

    def start_ray(self) -> None:
        """Ray's head and its nodes."""
        dashboard = ["--dashboard-host", self.head.address]
        self.start_node(self.head, "--head", "--port", "6379", "--num-cpus", "0", *dashboard)
        wait_for(lambda: self.alive() >= 1, "Ray's head is not up")
        for node in self.nodes:
            self.start_node(node, "--address", self.address, "--num-cpus", "1")
        wait_for(lambda: self.alive() == 1 + len(self.nodes), "Ray's nodes are not up")

    def start_server(self) -> None:
        """Prefect's, on the database that is there."""
        command = [str(BIN / "prefect"), "server", "start", "--host", self.servers.address, "--port", "4200"]
        self.started["server"] = self.servers.start("prefect-server", command, self.env)

    def start_node(self, host: Host, *options: str) -> None:
        """A host's part of Ray."""
        command = [str(BIN / "ray"), "start", "--block", "--node-ip-address", host.address, "--disable-usage-stats"]
        command += ["--temp-dir", str(self.own / "ray"), "--object-store-memory", "100000000", *options]
        self.started[f"ray-{host.number}"] = host.start("ray", command, self.env)

    def alive(self) -> int:
        """How many Ray nodes there are, as its head sees it."""
        answer = httpx.get(f"{self.jobs}/api/v0/nodes", headers=self.token, timeout=10).raise_for_status().json()
        return sum(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"])

    def submit(self, **parameters: Any) -> str:
        """A flow run; its id."""
        deployment = httpx.get(f"{self.api}/deployments/name/train-lenet/train-lenet", timeout=30).raise_for_status()
        made = httpx.post(
            f"{self.api}/deployments/{deployment.json()['id']}/create_flow_run",
            json={"parameters": parameters, "state": {"type": "SCHEDULED"}},
            timeout=30,
        )
        return str(made.raise_for_status().json()["id"])

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        """What Prefect says of a flow run."""
        found: dict[str, Any] = httpx.get(f"{self.api}/flow_runs/{flow_run_id}", timeout=30).raise_for_status().json()
        return found

    def states(self, flow_run_id: str) -> tuple[list[str], list[str]]:
        """The states a flow run went through, and its tasks that Prefect does not call completed."""
        asked = {"flow_run_id": flow_run_id}
        went = httpx.get(f"{self.api}/flow_run_states/", params=asked, timeout=30).raise_for_status().json()
        wanted = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
        tasks = httpx.post(f"{self.api}/task_runs/filter", json=wanted, timeout=30).raise_for_status().json()
        left = [f"{task['name']} is {task['state_name']}" for task in tasks if task["state_type"] != "COMPLETED"]
        return [state["name"] for state in sorted(went, key=lambda state: state["timestamp"])], left


def _store_is_up() -> bool:
    open_store(URL).check_writable()
    return True


def wait_for(condition: Callable[[], bool], what: str) -> float:
    """Seconds until it holds; what cannot be asked does not hold yet."""
    started = time.monotonic()
    while True:
        with contextlib.suppress(httpx.HTTPError, StorageError, OSError):
            if condition():
                return time.monotonic() - started
        if time.monotonic() - started > PATIENCE_S:
            raise SystemExit(f"after {PATIENCE_S} s: {what}")
        time.sleep(0.2)
