"""Proves that the files for real clusters are valid, keep to the rules of safety, and hold no secret.

No container runs here: each file is held to the tool that will read it (hadolint, Docker Compose, kubectl's kustomize,
Kubernetes' and KubeRay's schemas, Ray's own check).
"""

import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
from prefect.settings.models.server.ui import ServerUISettings
from ray.autoscaler._private.util import prepare_config, validate_config

from infra.stack import Stack
from pipeline.catalog import CATALOG
from tests.infra.conftest import BIN, COMPOSE, INFRA, ROOT, TOOL_ENV, UP, VERSION, Object, groups

DOCKERFILE = (INFRA / "Dockerfile").read_text()
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "POSTGRES_PASSWORD")
SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET")


def compose(*leave_out: str) -> subprocess.CompletedProcess[str]:
    """What Docker Compose makes of the file, with every secret but those left out."""
    env = TOOL_ENV | {name: "x" for name in SECRETS if name not in leave_out}
    command = [BIN / "docker-compose", "--file", INFRA / "compose.yaml", "--profile", "gpu", "config", "--quiet"]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def closed(schema: Any) -> Any:
    """The schema, but a field that it does not name is a mistake."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        new.setdefault("additionalProperties", False)
    return new


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run([BIN / "hadolint", INFRA / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_and_not_for_root() -> None:
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    assert {line.split()[1] for line in lines if line.startswith("FROM")} == {"python:$PYTHON"}
    [python] = re.findall(r"^ARG PYTHON=(\d+\.\d+)\.\d+-slim-bookworm$", DOCKERFILE, re.MULTILINE)
    assert f"Python {python}" in (ROOT / "requirements.lock").read_text().splitlines()[0]
    installs = [line for line in lines if "pip install" in line]
    assert [("--constraint requirements.lock" in line, "--no-deps" in line) for line in installs] == [
        (True, False), (False, True)
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    assert not [line for line in lines if line.startswith(("ENTRYPOINT", "ADD"))]
    assert f'image.version="{VERSION}"' in DOCKERFILE


def test_the_image_knows_its_commit() -> None:
    last = DOCKERFILE.rpartition("FROM ")[2]
    assert last.index("ARG REVISION=unknown") < last.index("LENET_REVISION=$REVISION")
    for service in COMPOSE.values():
        assert "build" not in service or service["build"]["args"]["REVISION"] == "${REVISION:-unknown}"
    documented = re.findall(r"REVISION=\$\((.*)\)", (ROOT / "docs" / "clusters.md").read_text())
    recorded = ["git", "describe", "--always", "--dirty", "--abbrev=12"]  # by pipeline/run.py
    assert [command.split() for command in documented] == [recorded, recorded]


def test_only_what_the_image_needs_is_sent_to_the_builder() -> None:
    first, *rules = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and line[0] != "#"]
    allowed = {rule[1:] for rule in rules if rule[0] == "!"}
    assert first == "*"
    assert [name for name in allowed if not (ROOT / name).exists()] == []
    assert allowed == {"LICENSE", "README.md", "prefect.yaml", "pyproject.toml", "requirements.lock"} | {
        "flows", "infra", "lenet", "pipeline"
    }  # fmt: skip
    assert "infra/*.env" in rules
    assert "infra/compose.env" in (ROOT / ".gitignore").read_text().split()


def test_docker_compose_accepts_the_file_only_with_every_secret() -> None:
    done = compose()
    assert (done.returncode, done.stderr) == (0, "")
    for name in SECRETS:
        refused = compose(name)
        assert refused.returncode != 0
        assert name in refused.stderr


def test_prefect_may_write_where_compose_has_it_put_its_ui(monkeypatch: pytest.MonkeyPatch) -> None:
    server = COMPOSE["prefect-server"]
    for name, value in server["environment"].items():
        monkeypatch.setenv(name, value)
    folder = ServerUISettings().static_directory
    assert folder is not None
    [home] = re.findall(r"HOME=(\S+)", DOCKERFILE)
    assert Path(folder).parent == Path(home)
    assert "useradd --uid 1000 --gid 1000 --create-home" in DOCKERFILE
    assert (server["user"], "read_only" in server) == ("1000:1000", False)


def test_every_kubernetes_object_fits_its_schema(objects: list[Object], ray: Object) -> None:
    for each in objects:
        if each["kind"] != "RayCluster":
            kubernetes_validate.validate(each, "1.37", strict=True)
    schema = json.loads(gzip.decompress((Path(__file__).parent / "raycluster-v1.json.gz").read_bytes()))
    jsonschema.validate(ray, closed(schema))
    for group in groups(ray):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.37", strict=True)


def test_ray_accepts_the_file_for_ray_up() -> None:
    config = prepare_config(UP)
    validate_config(config)
    types = config["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert (types["gpu"]["min_workers"], types["head"]["max_workers"]) == (0, 0)
    assert sum(each.get("max_workers", 0) for each in types.values()) == config["max_workers"]
    assert [config[f"{whose}setup_commands"] for whose in ("", "head_", "worker_")] == [[], [], []]
    profiles = {name: each["node_config"]["IamInstanceProfile"]["Name"] for name, each in types.items()}
    # The head alone may start machines.
    assert profiles == {"head": "lenet-ray-head", "cpu": "lenet-ray", "gpu": "lenet-ray"}


def test_containers_are_not_root_and_have_limits(pods: list[Object], ray: Object) -> None:
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    autoscaler = ray["spec"]["autoscalerOptions"]
    for container in [*(container for pod in pods for container in pod["containers"]), autoscaler]:
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]) & set(container["resources"]["requests"])
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for service in COMPOSE.values():
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_no_file_holds_a_secret_or_names_a_registry(objects: list[Object], pods: list[Object]) -> None:
    assert "Secret" not in {each["kind"] for each in objects}
    settings = {name for each in objects if each["kind"] == "ConfigMap" for name in each["data"]}
    assert not [name for name in settings if SECRET.search(name)]
    found = [entry for pod in pods for container in pod["containers"] for entry in container.get("env", [])]
    assert {entry["name"] for entry in found if "secretKeyRef" in entry.get("valueFrom", {})} == {"RAY_AUTH_TOKEN"}
    assert not [entry["name"] for entry in found if SECRET.search(entry["name"]) and "value" in entry]
    for service in COMPOSE.values():
        for name, value in service.get("environment", {}).items():
            assert not SECRET.search(name) or re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", value), name
    for file in [ROOT / ".dockerignore", ROOT / "docs" / "clusters.md", *INFRA.rglob("*.*"), INFRA / "Dockerfile"]:
        if file.suffix not in {".py", ".pyc", ".env"}:
            text = file.read_text()
            assert not re.search(r"(?i)(key|token|password|secret)\w*[\"']?\s*[:=]\s*[\"']?[a-z0-9+/]{16,}", text), file
            assert not re.search(r"pypi|pythonhosted|pytorch\.org|docker\.io|ghcr|quay", text), file


def test_the_network_is_closed_but_for_what_is_named(objects: list[Object], ray: Object) -> None:
    rules = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "NetworkPolicy"}
    assert rules["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    into = {name: spec["ingress"] for name, spec in rules.items() if "ingress" in spec}
    assert set(into) == {"ray", "ray-jobs", "ray-metrics"}
    assert [port["port"] for port in into["ray-jobs"][0]["ports"]] == [Stack().dashboard_port]
    [metrics] = into["ray-metrics"]
    assert metrics["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert metrics["ports"] == [{"protocol": "TCP", "port": 8080}]
    assert rules["ray-metrics"]["podSelector"]["matchLabels"] == {"ray.io/cluster": ray["metadata"]["name"]}
    (worker,) = (each for each in objects if each["kind"] == "Deployment")
    labels = worker["spec"]["template"]["metadata"]["labels"].items()
    for selector in (into["ray-jobs"][0]["from"][0]["podSelector"], rules["prefect-worker"]["podSelector"]):
        assert selector["matchLabels"].items() <= labels
    accounts = {each["metadata"]["name"]: each for each in objects if each["kind"] == "ServiceAccount"}
    assert [name for name, each in accounts.items() if each["automountServiceAccountToken"]] == ["lenet-ray"]


def test_pods_ask_for_names_wherever_a_cluster_may_answer(objects: list[Object]) -> None:
    [names] = [each["spec"] for each in objects if each["metadata"]["name"] == "names"]
    [rule] = names["egress"]
    # NodeLocal DNSCache, and Cloud DNS on GKE, beside the pods of most clusters.
    assert {peer["ipBlock"]["cidr"] for peer in rule["to"] if "ipBlock" in peer} == {
        "169.254.20.10/32", "169.254.169.254/32"
    }  # fmt: skip
    assert {"k8s-app": "kube-dns"} in [peer.get("podSelector", {}).get("matchLabels") for peer in rule["to"]]
    assert [(port["protocol"], port["port"]) for port in rule["ports"]] == [("UDP", 53), ("TCP", 53)]


def test_pods_reach_every_mirror_of_the_catalogue(objects: list[Object]) -> None:
    [web] = [each["spec"] for each in objects if (each["kind"], each["metadata"]["name"]) == ("NetworkPolicy", "web")]
    allowed = {port["port"] for rule in web["egress"] for port in rule["ports"]}
    mirrors = [urlsplit(mirror) for entry in CATALOG.values() for mirror in entry.mirrors]
    assert {mirror.port or {"http": 80, "https": 443}[mirror.scheme] for mirror in mirrors} <= allowed
