"""Proves the Prefect server of one command: it ends with the command, and says why it cannot start."""

import re
import subprocess
import sys
from pathlib import Path

import psutil

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
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, env=Command(tmp_path).env, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        server = psutil.Process(int(holder.stdout.readline()))
        assert server.is_running()
        assert server.ppid() == holder.pid
        holder.kill()
    wait_for(lambda: not server.is_running())


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
