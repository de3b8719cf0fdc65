"""What the local stack consists of: its parts with their commands, ports, environment and credentials.

Everything is kept in one folder: logs, data, credentials, and `env`, which a shell reads to use the stack.
"""

import os
import secrets
import shlex
import sys
from collections.abc import Mapping
from configparser import RawConfigParser
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from flows.server import past_proxies

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
BUCKET = "lenet"
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
MARK = "LENET_STACK"  # in the environment of every process of the stack
NODES = ("ray-head", "ray-node-1", "ray-node-2")
PARTS = ("s3", "prefect-server", *NODES, "prefect-worker", "caretaker")
# Of SeaweedFS nothing else: no telemetry, WebDAV, Iceberg or Lance, and no bucket that comes into being by a PUT.
ONLY_S3 = ("-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
           "-s3.autoCreateBucket=false")  # fmt: skip
AT_ONCE = ("s3", "prefect-server", NODES[0])  # need nobody; each other starts once those before it are up


class Stack(BaseModel):
    """Where it is kept, and the ports that people use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path = Field(Path(".stack"), description="Where everything is kept.")
    prefect_port: int = Field(4200, ge=1024, le=65_000, description="Prefect's server and its UI.")
    s3_port: int = Field(8333, ge=1024, le=65_000, description="SeaweedFS's S3; nine ports after it are taken too.")
    ray_port: int = Field(
        6379, ge=1024, le=65_000, description="Ray's head; six ports after it are taken too, three of them for metrics."
    )
    dashboard_port: int = Field(8265, ge=1024, le=65_000, description="Ray's dashboard.")
    cpus: int = Field(1, ge=1, le=1024, description="CPU cores that each of the three Ray nodes offers.")

    @property
    def storage(self) -> str:
        """URL of the store that flow runs use."""
        return f"s3://{BUCKET}/store"

    @property
    def api(self) -> str:
        """URL of Prefect's API."""
        return f"http://127.0.0.1:{self.prefect_port}/api"

    @property
    def ray_address(self) -> str:
        """Where Ray's head listens."""
        return f"127.0.0.1:{self.ray_port}"

    @property
    def ray_jobs(self) -> str:
        """Where Ray's dashboard listens, and takes jobs."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def index(self) -> str:
        """URL of the page of all runs, for a browser: SeaweedFS's filer shows what the bucket holds."""
        return f"http://127.0.0.1:{self.s3_ports['filer.port']}/buckets/{BUCKET}/store/index.html"

    @property
    def s3_ports(self) -> dict[str, int]:
        """SeaweedFS's, by the option that sets each."""
        names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "filer.port", "filer.port.grpc",
                 "volume.port", "volume.port.grpc", "admin.port", "admin.port.grpc")  # fmt: skip
        return {name: self.s3_port + place for place, name in enumerate(names)}

    @property
    def metrics_ports(self) -> list[int]:
        """Where each Ray node has its metrics, the run's among them, for Prometheus."""
        return [self.ray_port + 1 + len(NODES) + place for place in range(len(NODES))]

    @property
    def ports(self) -> dict[str, list[int]]:
        """All that have to be free, by option."""
        return {
            "prefect-port": [self.prefect_port],
            "s3-port": list(self.s3_ports.values()),
            "ray-port": list(range(self.ray_port, self.ray_port + 1 + 2 * len(NODES))),
            "dashboard-port": [self.dashboard_port],
        }


def inherited(variables: Mapping[str, str]) -> dict[str, str]:
    """What of a shell's variables the parts have too. What it has of another cluster's, a token or a profile, would go
    before the stack's own; but where Prefect's server keeps its state, if not in SQLite, the shell may say."""
    return {
        name: value
        for name, value in variables.items()
        if name == DATABASE or not name.startswith(("AWS_", "RAY_", "PREFECT_"))
    }


def environment(stack: Stack) -> dict[str, str]:
    """What a client of the stack needs in its environment; secrets are made once and kept, for this user alone."""
    file = stack.folder / "env"
    kept = (
        dict(line.removeprefix("export ").split("=", 1) for line in file.read_text().splitlines())
        if file.exists()
        else {}
    )
    token = stack.folder / "ray-token"
    found = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{stack.s3_port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": kept.get("AWS_ACCESS_KEY_ID") or secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": kept.get("AWS_SECRET_ACCESS_KEY") or secrets.token_hex(20),
        "PREFECT_API_URL": stack.api,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token.absolute()),
        "LENET_STORAGE": stack.storage,
        "LENET_RAY_ADDRESS": stack.ray_jobs,
        **past_proxies(os.environ),
    }
    _write_private(file, "".join(f"export {name}={shlex.quote(value)}\n" for name, value in found.items()))
    if not token.exists():
        _write_private(token, secrets.token_hex(32))
    return found


def programs(stack: Stack) -> dict[str, list[str]]:
    """The command of each part."""
    node = ["--block", "--node-ip-address", "127.0.0.1", "--num-cpus", str(stack.cpus), "--disable-usage-stats"]
    # Ray would keep 10002 to 19999 for its workers, and start nothing whose own port is among these.
    node += ["--min-worker-port", "0", "--max-worker-port", "0"]
    agents = [
        ["--dashboard-agent-listen-port", str(stack.ray_port + 1 + place), "--metrics-export-port", str(port)]
        for place, port in enumerate(stack.metrics_ports)
    ]
    head = ["--head", "--port", str(stack.ray_port), "--dashboard-port", str(stack.dashboard_port)]
    head += ["--include-dashboard", "true", "--dashboard-host", "127.0.0.1"]
    ports = [f"-{name}={port}" for name, port in stack.s3_ports.items()]
    ray_start = [str(BIN / "ray"), "start", *node]
    return {
        "s3": [
            str(BIN / "weed"), "mini", f"-dir={(stack.folder / 's3').absolute()}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", *ONLY_S3, *ports,
        ],
        "prefect-server": [
            str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(stack.prefect_port),
        ],
        "prefect-worker": [str(BIN / "prefect"), "worker", "start", "--pool", "lenet", "--name", "stack"],
        "caretaker": [sys.executable, "-m", "flows.caretaker"],
        "ray-head": [*ray_start, *head, *agents[0]],
        **{
            name: [*ray_start, "--address", stack.ray_address, *agents[place]]
            for place, name in enumerate(NODES) if place
        },
    }  # fmt: skip


def configuration(stack: Stack) -> str:
    """supervisord's configuration: every part a program that is started when asked, and again when it dies."""
    folder = stack.folder.absolute()
    config = RawConfigParser()
    sections: dict[str, dict[str, str]] = {
        "supervisord": {
            "logfile": f"{folder}/logs/supervisord.log",
            "pidfile": f"{folder}/supervisord.pid",
            "directory": str(ROOT),
            "silent": "true",
        },
        "unix_http_server": {"file": f"{folder}/supervisor.sock", "chmod": "0600"},
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
    }
    for name, command in programs(stack).items():
        sections[f"program:{name}"] = {
            "command": shlex.join(command).replace("%", "%%"),
            "autostart": "false",
            "autorestart": "true",
            "startretries": "10",
            "stopasgroup": "true",
            "killasgroup": "true",
            "stopwaitsecs": "20",
            "redirect_stderr": "true",
            "stdout_logfile": f"{folder}/logs/{name}.log",
        }
    # Told to stop, a node waits for who is at work on it; the head, the last of them, would wait in vain and be killed.
    sections[f"program:{NODES[0]}"]["environment"] = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0"
    config.read_dict(sections)
    path = folder / "supervisord.conf"
    with path.open("w") as file:
        config.write(file)
    return str(path)


def _write_private(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.chmod(0o600)
    file.write_text(text)
