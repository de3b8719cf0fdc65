"""What the tests share: the files for real clusters, read as their tools read them, and a running local stack."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.storage import Store, open_store
from tests.conftest import RAY_TOKEN
from tests.infra.stack import Running

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
INFRA = ROOT / "infra"
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
UP: dict[str, Any] = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
TOOL_ENV = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
Object = dict[str, Any]


@pytest.fixture(scope="session")
def objects() -> list[Object]:
    """What `kubectl apply --kustomize infra/k8s` would send."""
    command = [BIN / "kubectl", "kustomize", INFRA / "k8s"]
    done = subprocess.run(command, env=TOOL_ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="session")
def ray(objects: list[Object]) -> Object:
    return next(each for each in objects if each["kind"] == "RayCluster")


def groups(ray: Object) -> list[Object]:
    """The head's group, and the workers'."""
    return [ray["spec"]["headGroupSpec"], *ray["spec"]["workerGroupSpecs"]]


@pytest.fixture(scope="session")
def pods(objects: list[Object], ray: Object) -> list[Object]:
    """Every pod's specification."""
    deployments = [each["spec"] for each in objects if each["kind"] == "Deployment"]
    return [each["template"]["spec"] for each in deployments + groups(ray)]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("stack"))
    (running.folder / "ray-token").write_text(RAY_TOKEN)  # up would make another
    try:
        done = running.command("up", *running.options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "next:" in done.stdout
        yield running
    finally:
        running.command("down")
        for process in running.processes():
            with suppress(psutil.Error):
                process.kill()


@pytest.fixture
def bucket(stack: Running, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of the stack."""
    for name, value in stack.env().items():
        monkeypatch.setenv(name, value)
    return open_store(stack.env()["LENET_STORAGE"])
