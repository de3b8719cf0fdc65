"""`python -m infra.deploy`: what Prefect has to know before it runs anything: work pool, deployments and automation.

Where runs are published and where Ray is, the deployments learn from LENET_STORAGE and LENET_RAY_ADDRESS; without the
latter each run starts Ray for itself. A second time does no harm: a schedule that was switched on or off stays so.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from infra.stack import BIN, ROOT
from pipeline.errors import ClusterError, ConfigError, PipelineError, first_line

# Prefect's own template of a pool, but for the command: flows/engine.py says why.
POOL = ROOT / "infra" / "work-pool.json"
AUTOMATIONS = ROOT / "infra" / "automations.yaml"
STORAGE, RAY_ADDRESS = "LENET_STORAGE", "LENET_RAY_ADDRESS"
# Parameters of each deployment, and the variables that they come from.
PARAMETERS = {
    "train-lenet": {"storage": STORAGE, "ray_address": RAY_ADDRESS},
    "predict-lenet": {"model": STORAGE, "ray_address": RAY_ADDRESS},
    "retention": {"storage": STORAGE},
}


def deploy() -> None:
    """Tell the Prefect server at PREFECT_API_URL. Raises ConfigError for what is not set, ClusterError for the rest."""
    if not get_current_settings().api.url:
        raise ConfigError("PREFECT_API_URL", "", "is not set", "say where Prefect is, e.g. http://127.0.0.1:4200/api")
    if not os.environ.get(STORAGE):
        raise ConfigError(STORAGE, "", "is not set", "say where runs are published, e.g. s3://bucket/prefix")
    try:
        with get_client(sync_client=True) as client:
            pool = WorkPoolCreate(name="lenet", type="process", base_job_template=json.loads(POOL.read_text()))
            client.create_work_pool(pool, overwrite=True)
            content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
            for deployment in content["deployments"]:
                deployment.setdefault("parameters", {}).update(
                    {
                        field: given
                        for field, name in PARAMETERS[deployment["name"]].items()
                        if (given := os.getenv(name))
                    }
                )
                keep_switches(deployment, _there_is(client, deployment["name"]))
            _deploy_all(content)
            # Prefect would take an automation of the same name a second time: those of a version before go first.
            for automation in yaml.safe_load(AUTOMATIONS.read_text())["automations"]:
                for old in client.read_automations_by_name(automation["name"]):
                    client.delete_automation(old.id)
                client.create_automation(AutomationCore.model_validate(automation))
    except httpx.HTTPError as error:
        url = get_current_settings().api.url
        raise ClusterError(f"{url}: {first_line(error)}; check that Prefect is up") from error


def keep_switches(deployment: dict[str, Any], there_is: DeploymentResponse | None) -> None:
    """Let the schedules of an entry of prefect.yaml be on or off as the same ones are at the server."""
    now = {
        (schedule.schedule.cron, schedule.schedule.timezone): schedule.active
        for schedule in (there_is.schedules if there_is else [])
        if isinstance(schedule.schedule, CronSchedule)
    }
    for schedule in deployment.get("schedules", []):
        schedule["active"] = now.get((schedule["cron"], schedule["timezone"]), schedule["active"])


def _there_is(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(f"{name}/{name}")
    except ObjectNotFound:
        return None


def _deploy_all(content: dict[str, Any]) -> None:
    """`prefect deploy --all` with a file of this content; the code's own folder may be read-only."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(content, file)
        file.flush()
        command = [str(BIN / "prefect"), "--no-prompt", "deploy", "--all"]
        command += ["--prefect-file", file.name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ClusterError(f"prefect deploy: {said[-1] if said else done.returncode}; see its log")


if __name__ == "__main__":
    try:
        deploy()
    except PipelineError as error:
        print(f"deploy: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
