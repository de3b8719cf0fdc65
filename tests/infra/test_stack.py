"""Proves the local stack: it comes up, runs a flow on its own S3 and Ray, mends itself, and goes down."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from infra.stack import MARK, PARTS, Stack, configuration, environment, programs
from pipeline.registry import open_model
from pipeline.storage import open_store
from tests.conftest import free_ports

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Running:
    """The stack in a folder and on ports of its own, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        prefect, dashboard, base = *free_ports(2), 15_000 + os.getpid() % 4000
        self.options = ["--prefect-port", str(prefect), "--dashboard-port", str(dashboard)]
        self.options += ["--s3-port", str(base), "--ray-port", str(base + 10)]

    def command(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra", name, "--folder", str(self.folder), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder) and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def env(self) -> dict[str, str]:
        lines = (self.folder / "env").read_text().splitlines()
        return dict(line.removeprefix("export ").split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("stack"))
    done = running.command("up", *running.options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "next:" in done.stdout
    yield running
    running.command("down")
    for process in running.processes():
        process.kill()


def test_a_flow_runs_on_the_stack_and_its_model_is_in_the_bucket(
    stack: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = stack.env()
    run = ["deployment", "run", "train-lenet/train-lenet", "-p", "epochs=1", "-p", "run_id=first", "--watch"]
    done = subprocess.run(
        [BIN / "prefect", *run], env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert "Completed" in done.stdout, done.stdout + done.stderr
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    served = open_model(env["LENET_STORAGE"])
    assert served.place == "lenet version 1 (first)"
    page = open_store(env["LENET_STORAGE"]).read("runs/first/report.html")
    assert b"<title>" in page
    log = (stack.folder / "logs" / "prefect-worker.log").read_text()
    assert env["AWS_SECRET_ACCESS_KEY"] not in log


def test_up_again_says_the_same_and_starts_nothing(stack: Running) -> None:
    before = {process.pid for process in stack.processes() if "supervisord" in " ".join(process.cmdline())}
    again = stack.command("up")
    assert again.returncode == 0, again.stderr
    assert [line.split() for line in again.stdout.splitlines()[: len(PARTS)]] == [[part, "up"] for part in PARTS]
    after = {process.pid for process in stack.processes() if "supervisord" in " ".join(process.cmdline())}
    assert before == after
    deployments = httpx.post(f"{stack.env()['PREFECT_API_URL']}/deployments/filter", json={}).json()
    assert sorted(deployment["name"] for deployment in deployments) == ["predict-lenet", "train-lenet"]
    automations = httpx.post(f"{stack.env()['PREFECT_API_URL']}/automations/filter", json={}).json()
    assert [automation["name"] for automation in automations] == ["crash-zombie-flow-runs"]


def test_a_part_that_was_killed_is_seen_and_comes_back(stack: Running) -> None:
    server = next(process for process in stack.processes() if "mini" in process.cmdline())
    os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 90
    while (done := stack.command("status")).returncode:
        assert time.monotonic() < deadline, done.stdout
        time.sleep(1)
    assert [line.split() for line in done.stdout.splitlines()] == [[part, "up"] for part in PARTS]
    assert not server.is_running()


def test_down_leaves_nothing_but_data_and_logs(stack: Running) -> None:
    assert len(stack.processes()) > len(PARTS)
    assert stack.command("down").returncode == 0
    assert stack.processes() == []
    done = stack.command("status")
    assert done.returncode == 1
    assert all("DOWN: the stack is not up" in line for line in done.stdout.splitlines())
    assert (stack.folder / "logs" / "ray-head.log").exists()
    assert stack.command("down").returncode == 0  # nothing to do is no error


def test_a_port_in_use_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    running = Running(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = running.command("up", *running.options[2:], "--prefect-port", port)
    assert done.returncode == 2
    assert done.stderr == (
        f"stack: prefect-port={port}: port {port} is in use by another program; stop that, or choose another with "
        "--prefect-port\n"
    )
    assert running.processes() == []


def test_status_without_a_stack_is_one_line(tmp_path: Path) -> None:
    done = Running(tmp_path).command("status")
    assert done.returncode == 2
    assert done.stderr == f"stack: folder={str(tmp_path)!r}: no stack was started here; start one with: make up\n"


def test_credentials_are_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    stack = Stack(folder=tmp_path)
    first = environment(stack)
    assert environment(stack) == first
    assert environment(Stack(folder=tmp_path / "other"))["AWS_SECRET_ACCESS_KEY"] != first["AWS_SECRET_ACCESS_KEY"]
    for name in ("env", "ray-token"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    # No command line, which every user of the machine can read, has a secret in it; nor has the configuration.
    assert first["AWS_SECRET_ACCESS_KEY"] not in str(programs(stack))
    assert first["AWS_SECRET_ACCESS_KEY"] not in Path(configuration(stack)).read_text()


def test_no_two_parts_take_the_same_port() -> None:
    ports = [port for ports in Stack().ports.values() for port in ports]
    assert len(ports) == len(set(ports))
    given = [int(word.partition("=")[2]) for word in programs(Stack())["s3"] if ".port" in word and "=0" not in word]
    assert len(given) == len(set(given)) == 10
    assert set(given) <= set(ports)
