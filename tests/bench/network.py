"""Hosts in network namespaces: each with an address, a host name, processes and shared memory of its own, on a bridge.

Needs root and iproute2. What was started on a host goes with it, and nothing of the network is left at the end.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PATIENCE_S = 60

# As a machine has them: a name, a folder and shared memory that no other sees. The first process buries the orphans.
INIT = """
hostname "$1" && mount --bind "$2" "$3" && mount -t tmpfs shm /dev/shm && touch "$3/ready" && sleep infinity &
wait
"""


@dataclass
class Host:
    """One machine. `folder` is the same path on all hosts, and another place on each."""

    number: int
    network: str
    address: str
    folder: Path
    root: Path
    init: psutil.Process
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def link(self) -> str:
        """This machine's end of the cable: the interface on the bridge."""
        return f"{self.network}n{self.number}"

    def command(self, *words: str) -> list[str]:
        """What runs a command on this host, in the working directory that it was asked for."""
        enter = ["nsenter", "--target", str(self.init.pid), "--net", "--mount", "--uts", "--pid"]
        return [*enter, "env", f"--chdir={self.root}", *words]

    def start(self, name: str, command: list[str], env: dict[str, str]) -> "subprocess.Popen[bytes]":
        """A program that runs until it is stopped, or the host is gone. Its output goes to <folder>/<name>.log."""
        words = self.command(*command)
        with (self.kept / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.started.append(process)
        return process

    def run(self, command: list[str], env: dict[str, str]) -> str:
        """A command to its end; its output. Raises RuntimeError when it fails."""
        done = subprocess.run(
            self.command(*command), env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180
        )
        if done.returncode:
            raise RuntimeError(f"host {self.number}: {' '.join(command[:4])}: {done.stdout}{done.stderr}")
        return done.stdout

    @property
    def kept(self) -> Path:
        """The folder, as this process sees it."""
        return self.folder.parent / f"host-{self.number}"

    def unplug(self) -> None:
        """As when a cable is pulled: whatever is sent, either way, is lost without a word."""
        _ip("link", "set", self.link, "down")

    def plug(self) -> None:
        """The cable is in again."""
        _ip("link", "set", self.link, "up")


def kill(process: "subprocess.Popen[bytes]") -> None:
    """A program that a host has started, and what it has started in turn, at once."""
    every = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


@contextlib.contextmanager
def network(count: int, folder: Path, root: Path) -> Iterator[list[Host]]:
    """So many hosts at the addresses .1, .2, … of a network that this process has the address .254 in."""
    name = f"lh{os.getpid()}"  # an interface's name has at most 15 letters
    prefix = f"198.18.{os.getpid() % 256}"  # kept by RFC 2544 for measuring networks
    shared = folder / "own"
    shared.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(_ip, "link", "delete", name, check=False)
        _ip("link", "add", name, "type", "bridge")
        _ip("address", "add", f"{prefix}.254/24", "dev", name)
        _ip("link", "set", name, "up")
        yield [
            stack.enter_context(_host(number, name, f"{prefix}.{number}", shared, root))
            for number in range(1, count + 1)
        ]


@contextlib.contextmanager
def _host(number: int, network: str, address: str, folder: Path, root: Path) -> Iterator[Host]:
    space, link = f"{network}-{number}", f"{network}n{number}"
    kept = folder.parent / f"host-{number}"
    kept.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(_ip, "netns", "delete", space, check=False)
        _ip("netns", "add", space)
        stack.callback(_ip, "link", "delete", link, check=False)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for inside in ("lo", "eth0"):
            _ip("-n", space, "link", "set", inside, "up")
        _ip("link", "set", link, "master", network, "up")
        enter = ["ip", "netns", "exec", space, "unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
        with (kept / "init.log").open("wb") as log:
            keeper = subprocess.Popen(
                [*enter, "--mount-proc", "bash", "-c", INIT, "init", f"host-{number}", str(kept), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the hosts
            )
        stack.callback(_bury, keeper)
        give_up = time.monotonic() + PATIENCE_S
        while not (kept / "ready").exists():
            if keeper.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"host {number}: its namespaces cannot be made: {(kept / 'init.log').read_text()}")
            time.sleep(0.02)
        init = psutil.Process(keeper.pid).children()[0]
        host = Host(number, network, address, folder, root, init)
        stack.callback(_collect, host)
        yield host


def _bury(keeper: "subprocess.Popen[bytes]") -> None:
    # With a host's first process the kernel ends all others of the host.
    for child in psutil.Process(keeper.pid).children():
        child.kill()
    keeper.wait()


def _collect(host: Host) -> None:
    for process in host.started:
        if process.poll() is None:
            kill(process)


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
