"""The whole pipeline on one machine, with no container: S3, Prefect with a worker, and a Ray cluster of three nodes.

    python -m infra up | status | down        (make up, make status, make down)

supervisor keeps the parts running: one that dies is started again.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from cyclopts import App, CycloptsError
from supervisor.xmlrpc import SupervisorTransport

from flows.options import option
from flows.parameters import with_parameters
from infra.stack import AT_ONCE, BIN, BUCKET, MARK, NODES, PARTS, ROOT, Stack, configuration, environment, inherited
from pipeline.config import config_of
from pipeline.errors import ClusterError, ConfigError, PipelineError, StorageError, first_line
from pipeline.storage import open_store

PATIENCE_S = 120.0
FOLDER: Path = Stack.model_fields["folder"].default
SETTINGS = "stack.json"
GONE = (psutil.Error, OSError, xmlrpc.client.Error)  # what is gone already needs no stopping
PATH_LENGTH = 80  # 107 of a socket's, less its name and supervisor's own ending


def up(stack: Stack) -> None:
    """Start what is not running, wait until each part answers, and deploy the flows. Again: the same, and no harm.

    Raises ConfigError for a port in use, ClusterError for a part that does not come up.
    """
    if _supervisor(stack) is not None and (running := _found(stack.folder)) != stack:
        stack = running  # a second call need not repeat the options of the first
    if _supervisor(stack) is None:
        _require_usable_path(stack)
        _require_free_ports(stack)
        for part in ("logs", "s3", "prefect"):
            (stack.folder / part).mkdir(parents=True, exist_ok=True)
        (stack.folder / SETTINGS).write_text(stack.model_dump_json(indent=2))
        own = {
            **environment(stack),
            MARK: str(stack.folder.absolute()),
            "PATH": f"{BIN}:{os.environ['PATH']}",  # where Ray's jobs find their python
            "S3_BUCKET": BUCKET,
            "TMPDIR": "/tmp",  # noqa: S108 - where SeaweedFS puts its sockets, whose names have to be short
            "PREFECT_HOME": str((stack.folder / "prefect").absolute()),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_DATABASE_TIMEOUT": "60",  # SQLite has one writer; others wait for it rather than fail
            # Else it forgets, when it starts again, who holds a deployment's place, and that flow run is ended for it.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",  # until a schedule that is switched on is seen
            "PREFECT_WORKER_QUERY_SECONDS": "1",  # how often a worker asks for work: 10 is what a person waits for
            "RAY_worker_niceness": "0",  # as of a local Ray: training does not give way to all else on this machine
            "PYTHONWARNINGS": "ignore",
        }
        subprocess.run(
            [BIN / "supervisord", "--configuration", configuration(stack)], env=inherited(os.environ) | own, check=True
        )
    os.environ.update(environment(stack))
    for part in AT_ONCE:
        _start(stack, part)
    for part in PARTS:
        if part == "prefect-worker":
            _deploy()
        _start(stack, part)
        _wait(stack, part)
        print(f"{part:>15}  up", flush=True)
    print(
        f"\nPrefect   http://127.0.0.1:{stack.prefect_port}\nRay       http://127.0.0.1:{stack.dashboard_port}\n"
        f"runs      {stack.index}\nS3        {os.environ['AWS_ENDPOINT_URL']}  {stack.storage}\n"
        f"logs      {stack.folder / 'logs'}\n\n"
        f"next:     . {stack.folder / 'env'}\n"
        "          .venv/bin/prefect deployment run train-lenet/train-lenet -p epochs=3 --watch"
    )


def status(stack: Stack) -> bool:
    """Print each part's state; whether all are well."""
    os.environ.update(environment(stack))
    every = True
    for part in PARTS:
        why = _trouble(stack, part)
        every = every and why is None
        print(f"{part:>15}  {'up' if why is None else f'DOWN: {why}'}")
    return every


def down(stack: Stack) -> None:
    """Stop all parts, the last started first, and whatever they may have left. Data and logs stay."""
    supervisor = _supervisor(stack)
    if supervisor is not None:
        for part in reversed(PARTS):
            with suppress(*GONE):
                supervisor.supervisor.stopProcess(part)
        with suppress(*GONE):
            supervisor.supervisor.shutdown()
    left = _processes(stack)
    psutil.wait_procs(left, timeout=10)
    for process in _processes(stack):
        with suppress(*GONE):
            process.kill()
    psutil.wait_procs(left, timeout=10)
    print("down")


def _found(folder: Path) -> Stack:
    """The stack that was started in a folder. ConfigError when there is none."""
    file = folder / SETTINGS
    if not file.exists():
        raise ConfigError("folder", str(folder), "no stack was started here", "start one with: make up")
    kept = json.loads(file.read_bytes())  # perhaps of another version, which had more to say
    return Stack.model_validate({name: kept[name] for name in Stack.model_fields if name in kept})


def _require_usable_path(stack: Stack) -> None:
    if re.search(r"[^\w@%+=:,./-]", sys.executable):  # what a shell minds; shlex.quote minds é, too
        rule = "Ray starts no workers from a path with spaces or quotes"
        raise ConfigError("python", sys.executable, rule, "move the checkout, and set .venv up anew")
    if len(str(stack.folder.absolute())) > PATH_LENGTH:
        rule = f"the whole path may have {PATH_LENGTH} characters, for the kernel's sake: a socket is kept there"
        raise ConfigError("folder", str(stack.folder.absolute()), rule, "choose a shorter one with --folder")


def _require_free_ports(stack: Stack) -> None:
    taken: dict[int, str] = {}
    for name, ports in stack.ports.items():
        for port in ports:
            if other := taken.get(port):
                rule = f"port {port} is one of --{other}'s, too"
                raise ConfigError(name, ports[0], rule, f"choose another with --{name}")
            taken[port] = name
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    rule = f"port {port} is in use by another program"
                    raise ConfigError(name, ports[0], rule, f"stop that, or choose another with --{name}")


def _supervisor(stack: Stack) -> Any:
    """The running supervisor; None when there is none."""
    file = stack.folder.absolute() / "supervisor.sock"
    if not file.exists():
        return None
    proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", SupervisorTransport(None, None, f"unix://{file}"))
    try:
        proxy.supervisor.getState()
    except (OSError, xmlrpc.client.Error):
        return None
    return proxy


def _start(stack: Stack, part: str) -> None:
    supervisor = _supervisor(stack)
    if supervisor is None:
        raise ClusterError(
            f"supervisor has stopped; see {stack.folder / 'logs' / 'supervisord.log'}, then run up again"
        )
    if supervisor.supervisor.getProcessInfo(part)["statename"] not in ("RUNNING", "STARTING", "BACKOFF"):
        supervisor.supervisor.startProcess(part, False)


def _wait(stack: Stack, part: str) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while (why := _trouble(stack, part)) is not None:
        if time.monotonic() > give_up:
            log = stack.folder / "logs" / f"{part}.log"
            lines = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise ClusterError(f"{part}: not up after {PATIENCE_S:.0f} s ({why}); {log} ends with: {lines[-1]}")
        time.sleep(0.5)


def _trouble(stack: Stack, part: str) -> str | None:
    """What is wrong with a part; None for one that answers."""
    supervisor = _supervisor(stack)
    if supervisor is None:
        return "the stack is not up"
    state = supervisor.supervisor.getProcessInfo(part)
    if state["statename"] not in ("RUNNING", "STARTING"):
        return str(state["statename"]).lower()
    if part in NODES:
        return _ask(lambda: _node_trouble(stack, part))
    if part == "caretaker":  # asks, and is asked nothing
        return None if state["statename"] == "RUNNING" else "it is starting"
    return _ask({"s3": _s3_trouble, "prefect-server": _server_trouble, "prefect-worker": _worker_trouble}[part], stack)


def _ask(question: Callable[..., str | None], *arguments: Any) -> str | None:
    try:
        return question(*arguments)
    except (httpx.HTTPError, StorageError, OSError, ConnectionError, RuntimeError, ValueError) as error:
        return first_line(error)


def _s3_trouble(stack: Stack) -> str | None:
    with socket.create_connection(("127.0.0.1", stack.s3_port), timeout=1):
        pass
    open_store(stack.storage).check_writable()
    return None


def _server_trouble(stack: Stack) -> str | None:
    answer = httpx.get(f"{stack.api}/health", timeout=5)
    return None if answer.is_success else f"its API answers {answer.status_code}"


def _worker_trouble(stack: Stack) -> str | None:
    workers = httpx.post(f"{stack.api}/work_pools/lenet/workers/filter", json={}, timeout=5).json()
    return None if any(worker["status"] == "ONLINE" for worker in workers) else "no worker of pool lenet is online"


def _node_trouble(stack: Stack, part: str) -> str | None:
    """Ask Ray's dashboard how many nodes are alive; a node is well if as many are as were started up to it."""
    token = {"Authorization": f"Bearer {Path(os.environ['RAY_AUTH_TOKEN_PATH']).read_text()}"}
    answer = httpx.get(f"http://127.0.0.1:{stack.dashboard_port}/api/v0/nodes", headers=token, timeout=10)
    nodes = answer.raise_for_status().json()["data"]["result"]["result"]
    alive = sum(node["state"] == "ALIVE" for node in nodes)
    wanted = NODES.index(part) + 1
    return None if alive >= wanted else f"{alive} of {wanted} Ray nodes are alive"


def _deploy() -> None:
    """In a process of its own, as to import Prefect takes 2 s that the other commands do not need."""
    done = subprocess.run([sys.executable, "-m", "infra.deploy"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ClusterError(said[-1].removeprefix("deploy: ") if said else f"infra.deploy ended with {done.returncode}")
    print(done.stdout, end="", flush=True)


def _processes(stack: Stack) -> list[psutil.Process]:
    """Every process of the stack, by the mark in its environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(*GONE):
            if process.environ().get(MARK) == str(stack.folder.absolute()) and process.status() != "zombie":
                found.append(process)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line on stderr and an exit code for what the user can mend."""
    app = App(name="infra", help=__doc__, print_error=False, exit_on_error=False)

    @app.command(name="up")
    @with_parameters(Stack, option)
    def start(**parameters: Any) -> None:
        """Start the stack, or what of it is not running."""
        up(config_of(parameters, Stack))

    @app.command(name="status")
    def show(*, folder: Path = FOLDER) -> None:
        """Say how each part is; exit code 1 unless all are up."""
        if not status(_found(folder)):
            sys.exit(1)

    @app.command(name="down")
    def stop(*, folder: Path = FOLDER) -> None:
        """Stop the stack; data and logs stay."""
        down(_found(folder))

    try:
        app(sys.argv[1:] if arguments is None else arguments)
    except CycloptsError as error:
        print(f"stack: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except xmlrpc.client.Fault as error:
        print(f"stack: {error.faultString}: what runs is of another version; make down, then make up", file=sys.stderr)
        sys.exit(1)
    except PipelineError as error:
        print(f"stack: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
