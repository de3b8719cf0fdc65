"""A local stack for tests, in a folder and on ports of its own."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient

from infra.__main__ import _found
from infra.stack import MARK
from tests.conftest import free_range, processes_with

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Running:
    """The stack in a folder and on ports of its own, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = free_range(22)
        self.options = ["--prefect-port", str(base + 20), "--dashboard-port", str(base + 21)]
        self.options += ["--s3-port", str(base), "--ray-port", str(base + 10)]
        self.http = httpx.Client(timeout=120)  # one, for to make it takes longer than to ask

    def command(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra", name, "--folder", str(self.folder), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    def processes(self, command: str = "") -> list[psutil.Process]:
        """Those of the stack whose command line has this in it."""
        return processes_with(MARK, str(self.folder), command)

    def prefect(self, *arguments: str) -> str:
        """A command of Prefect's, on this stack; what it prints."""
        env = {**os.environ, **self.env()}
        done = subprocess.run([BIN / "prefect", *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deployment(self) -> dict[str, Any]:
        """That of the training, as Prefect has it."""
        found: dict[str, Any] = self.client.request("GET", "/deployments/name/train-lenet/train-lenet").json()
        return found

    @functools.cached_property
    def client(self) -> SyncPrefectClient:
        """Prefect's own: it asks again when another writes to SQLite (503), and when no answer comes."""
        return SyncPrefectClient(self.env()["PREFECT_API_URL"])

    def submit(self, job_variables: dict[str, Any] | None = None, **parameters: object) -> None:
        """A flow run of the training, as the UI asks for it."""
        self.client.create_flow_run_from_deployment(
            self.deployment()["id"], parameters=parameters, job_variables=job_variables
        )

    def run(self, name: str, *parameters: str) -> None:
        """A deployment's flow, to its end; a failed test with all that was logged when it does not complete."""
        given = [word for parameter in parameters for word in ("-p", parameter)]
        said = self.prefect("deployment", "run", f"{name}/{name}", *given, "--watch")
        if "Completed" not in said:
            raise AssertionError("\n".join([said, *self.messages()]))

    def messages(self) -> list[str]:
        """What the flow run that began last has logged."""
        wanted = {"flow_run_id": {"any_": [self.flow_run()["id"]]}}
        return [line["message"] for line in self.ask("/logs/filter", logs=wanted, limit=200, sort="TIMESTAMP_ASC")]

    def ask(self, path: str, **body: object) -> Any:
        """What Prefect's API says; nothing is changed by it."""
        return self.client.request("POST", path, json=body).json()

    def flow_run(self) -> dict[str, Any]:
        """The flow run that began last."""
        begun = {"start_time": {"is_null_": False}}
        found: dict[str, Any] = self.ask("/flow_runs/filter", flow_runs=begun, limit=1, sort="START_TIME_DESC")[0]
        return found

    def states(self, flow_run_id: str) -> list[dict[str, Any]]:
        """All states that a flow run was in."""
        asked = {"flow_run_id": flow_run_id}
        found: list[dict[str, Any]] = self.client.request("GET", "/flow_run_states/", params=asked).json()
        return found

    def ray(self, path: str) -> Any:
        """The API of Ray's dashboard."""
        token = {"Authorization": f"Bearer {(self.folder / 'ray-token').read_text()}"}
        url = f"{_found(self.folder).ray_jobs}{path}"
        return self.http.get(url, headers=token).raise_for_status().json()

    def jobs(self, run_id: str) -> list[str]:
        """The state of each Ray job of a run."""
        return [job["status"] for job in self.ray("/api/jobs/") if (job["metadata"] or {}).get("run_id") == run_id]

    def env(self) -> dict[str, str]:
        lines = (self.folder / "env").read_text().splitlines()
        return dict(line.removeprefix("export ").split("=", 1) for line in lines)
