"""Proves the Prefect server of one command: it ends with the command, and says why it cannot start."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.server import past_proxies
from tests.conftest import wait_for
from tests.flows.conftest import Command

HOLDER = """
import time
from flows import server
started = server.begin()
server.require()
print(started.process.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_the_command_even_one_that_was_killed(tmp_path: Path) -> None:
    started, command = Command(tmp_path), [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, env=started.env, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        server = psutil.Process(int(holder.stdout.readline()))
        assert server.is_running()
        assert server.ppid() == holder.pid
        holder.kill()
    wait_for(lambda: not started.processes())


@pytest.mark.parametrize(
    ("given", "spared"),
    [
        ({}, {}),
        ({"no_proxy": "mine"}, "mine,127.0.0.1,localhost"),
        ({"no_proxy": "*"}, "*"),
        ({"no_proxy": "mine, *"}, "*"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "localhost,mine"}, "localhost,mine,127.0.0.1"),
        ({"http_proxy": "http://p:1", "no_proxy": "", "NO_PROXY": ""}, "127.0.0.1,localhost"),
    ],
)
def test_no_proxy_is_asked_for_what_is_here(given: dict[str, str], spared: Any) -> None:
    assert past_proxies(given) == ({"no_proxy": spared, "NO_PROXY": spared} if spared else {})


def test_behind_a_proxy_it_answers(tmp_path: Path) -> None:
    proxied = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    env = Command(tmp_path).env | proxied
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, env=env | past_proxies(proxied), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert int(holder.stdout.readline())
        holder.kill()


def test_settings_of_prefects_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    command = Command(tmp_path)
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "profiles.toml").write_text("[torn")
    process = command.start("--epochs", "1")
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (2, "")
    [said] = [line for line in err.splitlines() if "plugins" not in line]  # Prefect's own
    assert re.fullmatch(r"lenet: PREFECT_HOME='\S+': Prefect's settings cannot be read \(.+\); mend .+", said)


def test_one_that_cannot_start_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.env["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{tmp_path}/none/p.db"
    process = command.start("--epochs", "1")
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (2, "")
    message = rf"lenet: PREFECT_HOME='{tmp_path}/prefect': Prefect's server for this command does not start "
    message += r"\(\S+Error: [^\n]+unable to open database file\); mend that, [^\n]+\n"
    assert re.fullmatch(message, err), err
    wait_for(lambda: not command.processes())
