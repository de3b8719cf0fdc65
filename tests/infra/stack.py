"""A local stack for tests, in a folder and on ports of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra.__main__ import _found
from infra.stack import MARK
from tests.conftest import free_ports, free_range, processes_with

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Running:
    """The stack in a folder and on ports of its own, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        prefect, dashboard = free_ports(2)
        base = free_range(20)
        self.options = ["--prefect-port", str(prefect), "--dashboard-port", str(dashboard)]
        self.options += ["--s3-port", str(base), "--ray-port", str(base + 10)]

    def command(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra", name, "--folder", str(self.folder), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    def processes(self) -> list[psutil.Process]:
        return processes_with(MARK, str(self.folder))

    def prefect(self, *arguments: str) -> str:
        """A command of Prefect's, on this stack; what it prints."""
        env = {**os.environ, **self.env()}
        done = subprocess.run([BIN / "prefect", *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deployment(self) -> dict[str, Any]:
        """That of the training, as Prefect has it."""
        url = f"{self.env()['PREFECT_API_URL']}/deployments/name/train-lenet/train-lenet"
        found: dict[str, Any] = httpx.get(url, timeout=30).raise_for_status().json()
        return found

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        """Prefect's own, for what changes something: it asks again when another writes to SQLite (503)."""
        url = self.env()["PREFECT_API_URL"]
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            yield client

    def submit(self, job_variables: dict[str, Any] | None = None, **parameters: object) -> None:
        """A flow run of the training, as the UI asks for it."""
        with self.client() as client:
            client.create_flow_run_from_deployment(
                self.deployment()["id"], parameters=parameters, job_variables=job_variables
            )

    def run(self, name: str, *parameters: str) -> None:
        """A deployment's flow, to its end; a failed test with all that was logged when it does not complete."""
        given = [word for parameter in parameters for word in ("-p", parameter)]
        said = self.prefect("deployment", "run", f"{name}/{name}", *given, "--watch")
        if "Completed" not in said:
            wanted = {"flow_run_id": {"any_": [self.flow_run()["id"]]}}
            logs = self.ask("/logs/filter", logs=wanted, limit=200, sort="TIMESTAMP_ASC")
            raise AssertionError("\n".join([said, *(f"{line['timestamp']} {line['message']}" for line in logs)]))

    def ask(self, path: str, **body: object) -> Any:
        """What Prefect's API says; nothing is changed by it."""
        return httpx.post(f"{self.env()['PREFECT_API_URL']}{path}", json=body, timeout=30).raise_for_status().json()

    def flow_run(self) -> dict[str, Any]:
        """The flow run that began last."""
        found: dict[str, Any] = self.ask("/flow_runs/filter", limit=1, sort="START_TIME_DESC")[0]
        return found

    def states(self, flow_run_id: str) -> list[dict[str, Any]]:
        """All states that a flow run was in."""
        url = f"{self.env()['PREFECT_API_URL']}/flow_run_states/"
        found: list[dict[str, Any]] = httpx.get(url, params={"flow_run_id": flow_run_id}, timeout=30).json()
        return found

    def ray(self, path: str) -> Any:
        """The API of Ray's dashboard."""
        token = {"Authorization": f"Bearer {(self.folder / 'ray-token').read_text()}"}
        url = f"{_found(self.folder).ray_jobs}{path}"
        return httpx.get(url, headers=token, timeout=30).raise_for_status().json()

    def jobs(self, run_id: str) -> list[str]:
        """The state of each Ray job of a run."""
        return [job["status"] for job in self.ray("/api/jobs/") if (job["metadata"] or {}).get("run_id") == run_id]

    def env(self) -> dict[str, str]:
        lines = (self.folder / "env").read_text().splitlines()
        return dict(line.removeprefix("export ").split("=", 1) for line in lines)
