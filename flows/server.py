"""Prefect's server for as long as one command lives, for people without a server of their own.

Prefect would start one itself, by code of the server's own package: to import that costs the command 2.4 s. This one
is asked for sooner, imports beside the command, and ends with it however that ends.
"""

import atexit
import contextlib
import functools
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from typing import IO, NamedTuple

from pipeline.errors import ConfigError, first_line
from pipeline.imports import for_good

# Nothing is scheduled on a server that lives as long as one command.
UNUSED_SERVICES = (
    "SCHEDULER",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "CANCELLATION_CLEANUP",
    "FOREMAN",
    "REPOSSESSOR",
    "TRIGGERS",
    "EVENT_LOGGER",
    "CLEANUP_RECONCILER",
)
# Read when prefect is imported.
SETTINGS = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal is ours; the server keeps all logs
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline,flows",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # infra/automations.yaml, if the user's own server has it, counts on it
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",  # and say nothing of it
    **{f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "false" for service in UNUSED_SERVICES},
}
START_S, STOP_S = 120, 5


class Started(NamedTuple):
    """The server's process, which may not answer yet, and what it prints: a terminal is the command's own."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]


def past_proxies(variables: Mapping[str, str]) -> dict[str, str]:
    """What to add to a shell's variables so that no proxy is asked for what is on this machine."""
    if not any(name.lower().endswith("_proxy") for name in variables):
        return {}
    spared = variables.get("no_proxy") or variables.get("NO_PROXY") or ""
    names = [stripped for name in spared.split(",") if (stripped := name.strip())]
    # To urllib * means all only if nothing stands beside it.
    value = "*" if "*" in names else ",".join(dict.fromkeys([*names, "127.0.0.1", "localhost"]))
    return {"no_proxy": value, "NO_PROXY": value}


@functools.cache
def begin() -> Started | None:
    """Start it, unless the user has one."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=UserWarning, module="prefect")  # what is wrong there is told in a line
    try:
        from prefect.context import refresh_global_settings_context
        from prefect.settings import get_current_settings
    except (ValueError, OSError) as error:
        home = os.environ.get("PREFECT_HOME", "~/.prefect")
        rule = f"Prefect's settings cannot be read ({first_line(error)})"
        raise ConfigError("PREFECT_HOME", home, rule, "mend its profiles.toml, or the PREFECT_ variables") from None

    if get_current_settings().api.url is not None:
        return None
    output = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as this process
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # by whose end it sees ours
            stdout=output,
            stderr=output,
            # A terminal sends Ctrl-C to all in the foreground. Were the server to stop too, the flow would wait for
            # it, for more than a minute, to report that it was interrupted.
            start_new_session=True,
        )
        atexit.register(_stop, process)
        # Whoever asks before it answers waits in the listener's queue.
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    refresh_global_settings_context()
    return Started(process, output)


def require() -> None:
    """Return once a server answers. ConfigError when the user's own does not, or this command's does not start."""
    started, deadline = begin(), time.monotonic() + START_S
    while trouble := _ask():
        if started is None or started.process.poll() is not None or time.monotonic() > deadline:
            raise _refusal(started, trouble)
        time.sleep(0.1)


def require_url() -> None:
    """ConfigError unless Prefect is said where its server is: it would ask one of its own, which nobody else does."""
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        raise ConfigError("PREFECT_API_URL", "", "is not set", "say where Prefect is, e.g. http://127.0.0.1:4200/api")


def _refusal(started: Started | None, trouble: Exception) -> ConfigError:
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if started is None:
        return ConfigError(
            "PREFECT_API_URL",
            settings.api.url,
            f"no Prefect server answers there ({first_line(trouble)})",
            "start it, or unset it, here and by prefect config unset, for a server that lives as long as this command",
        )
    started.output.seek(0)
    said = started.output.read().decode(errors="replace")
    errors = re.findall(r"^\S*(?:Error|Exception): .+", said, re.MULTILINE)
    return ConfigError(
        "PREFECT_HOME",
        str(settings.home),
        f"Prefect's server for this command does not start ({errors[-1] if errors else first_line(trouble)})",
        "mend that, or set PREFECT_API_URL to a server of yours",
    )


def _ask() -> Exception | None:
    """What is wrong with the server."""
    from prefect import get_client

    with get_client(sync_client=True) as client:
        return client.api_healthcheck()


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=STOP_S)  # which closes its input
    process.kill()


def main(listener: int) -> None:
    """Be the server on the socket of this number, until whoever holds the other end of the input is gone."""
    with for_good():
        import uvicorn
        from prefect.server.api.server import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(ephemeral=True), log_level="error", lifespan="on"))

    def watch() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=watch, name="watch", daemon=True).start()
    server.run(sockets=[socket.socket(fileno=listener)])


if __name__ == "__main__":
    main(int(sys.argv[1]))
