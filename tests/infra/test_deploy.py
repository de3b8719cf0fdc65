"""Proves that deploying says in a line what it lacks. That it deploys, the tests of the stack show."""

import os
import subprocess
import sys

import pytest

from tests.conftest import free_ports
from tests.infra.conftest import ROOT

SET = {"PREFECT_API_URL": "http://127.0.0.1:1/api", "LENET_STORAGE": "s3://bucket/store"}


@pytest.mark.parametrize("missing", SET)
def test_what_is_not_set_is_one_line(missing: str) -> None:
    done = deploy(SET | {missing: ""})
    assert done.returncode == 2
    assert done.stderr.startswith(f"deploy: {missing}='': is not set; ")
    assert done.stderr.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}/api"
    done = deploy(SET | {"PREFECT_API_URL": url})
    assert done.returncode > 0
    assert done.stderr.startswith(f"deploy: {url}: ")
    assert done.stderr.endswith("check that Prefect is up\n")
    assert done.stderr.count("\n") == 1


def deploy(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infra.deploy"]
    return subprocess.run(command, env={**os.environ, **variables}, cwd=ROOT, capture_output=True, text=True)
