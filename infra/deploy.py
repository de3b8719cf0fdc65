"""`python -m infra.deploy`: what Prefect has to know before it runs anything: work pool, deployments and automation.

Where runs are published and where Ray is, the deployments learn from LENET_STORAGE and LENET_RAY_ADDRESS; without the
latter each run starts Ray for itself. A second time leaves alone what was set in Prefect meanwhile: schedules,
parameters that prefect.yaml does not have, whether the pool is paused and the automation enabled. A parameter that the
flow does not have any more goes, and is told of.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker
from pydantic import BaseModel

from flows.server import require_url
from infra.stack import BIN, ROOT
from pipeline.errors import ClusterError, ConfigError, PipelineError, first_line

POOL, COMMAND = "lenet", "python -m flows.engine"
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
    require_url()
    if not os.environ.get(STORAGE):
        raise ConfigError(STORAGE, "", "is not set", "say where runs are published, e.g. s3://bucket/prefix")
    try:
        with get_client(sync_client=True) as client:
            _make_pool(client)
            content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
            content["deployments"] = [
                merged(entry, _there_is(client, entry["name"]), os.environ) for entry in content["deployments"]
            ]
            _deploy_all(content)
            automate(client)
    except httpx.HTTPError as error:
        url = get_current_settings().api.url
        raise ClusterError(f"{url}: {first_line(error)}; check that Prefect is up") from error


def automate(client: SyncPrefectClient) -> None:
    """Tell the server of the automations. One that is the same already stays: with it would go what it waits for."""
    for automation in yaml.safe_load(AUTOMATIONS.read_text())["automations"]:
        there_are = client.read_automations_by_name(automation["name"])
        enabled = automation["enabled"] and all(old.enabled for old in there_are)
        wanted = AutomationCore.model_validate(automation | {"enabled": enabled})
        if [AutomationCore.model_validate(old.model_dump()) for old in there_are] == [wanted]:
            continue
        for old in there_are:  # Prefect would take an automation of the same name a second time
            client.delete_automation(old.id)
        client.create_automation(wanted)


def merged(
    entry: dict[str, Any], there_is: DeploymentResponse | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """A deployment's entry of prefect.yaml, with what the environment says, and what was set at the server. Says what
    of the latter is dropped: with a parameter that it does not know, a flow would fail before it begins."""
    given = {field: value for field, name in PARAMETERS[entry["name"]].items() if (value := environment.get(name))}
    theirs = {
        field: value
        for field, value in (there_is.parameters if there_is else {}).items()
        if field not in PARAMETERS[entry["name"]]
    }
    gone = sorted(theirs.keys() - _fields(entry["name"])) if theirs else []
    if gone:
        print(f"{entry['name']}: dropped, as the flow has no such parameter any more: {', '.join(gone)}", flush=True)
    kept = {field: value for field, value in theirs.items() if field not in gone}
    result = entry | {"parameters": kept | entry.get("parameters", {}) | given}
    if there_is and there_is.schedules:
        result.pop("schedules", None)  # Prefect keeps what it has where it is given none
    return result


def _fields(name: str) -> set[str]:
    """The parameters that a deployment's flow has."""
    # 3 s and more, which most who deploy need not wait for: they have set nothing at the server.
    from pipeline.batch import PredictConfig
    from pipeline.retention import RetentionConfig
    from pipeline.run import RunConfig

    configs: dict[str, type[BaseModel]] = {
        "train-lenet": RunConfig,
        "predict-lenet": PredictConfig,
        "retention": RetentionConfig,
    }
    return set(configs[name].model_fields)


def _make_pool(client: SyncPrefectClient) -> None:
    """Prefect's own template of a pool, but for the command: flows/engine.py says why."""
    template = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["command"]["default"] = COMMAND
    try:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    except ObjectAlreadyExists:
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))


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
        raise ClusterError(f"prefect deploy: {said[-1] if said else done.returncode}; check prefect.yaml")


if __name__ == "__main__":
    try:
        deploy()
    except PipelineError as error:
        print(f"deploy: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
