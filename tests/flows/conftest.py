"""What tests of the command line share: the command in a session of its own, and a run that was interrupted."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from prefect.logging.configuration import setup_logging
from prefect.testing.utilities import prefect_test_harness

from pipeline.publish import find_run, read_latest
from pipeline.storage import open_store
from pipeline.train import staging
from tests.conftest import processes_with, wait_for

BIN = Path(sys.executable).parent


class Command:
    """`lenet train` in a session and a Prefect home of its own, its processes marked by an environment variable."""

    def __init__(self, folder: Path, storage: str | None = None) -> None:
        self.folder = folder
        self.storage = storage or str(folder / "store")
        self.env = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "LENET_TEST": str(folder)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [str(BIN / "lenet"), "train", "--storage", self.storage, *arguments]
        return subprocess.Popen(
            command,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # Tests that run in the background of a shell ignore Ctrl-C, and so would this, as it should.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def processes(self) -> list[psutil.Process]:
        """What still runs of it, and of all that it started."""
        return processes_with("LENET_TEST", str(self.folder))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    out: str
    err: str


@dataclass(frozen=True)
class GoneOn:
    """A run of three epochs, `r`: interrupted after the first, and gone on with by the same command."""

    storage: str
    first: Ended
    published_by_the_first: bool
    second: Ended
    shards_written_by_the_second: list[Path]


@pytest.fixture
def prefect() -> Iterator[None]:
    """A Prefect server for flows that run in this process."""
    # At a process's first flow run Prefect would take the root logger's handlers away, caplog's among them.
    setup_logging()
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> GoneOn:
    """It takes a minute, so it is there once. Neither command leaves a process behind."""
    folder = tmp_path_factory.mktemp("gone-on")
    command = Command(folder)
    store = open_store(command.storage)

    def run(interrupted: bool) -> Ended:
        process = command.start("--epochs", "3", "--run-id", "r")
        try:
            if interrupted:
                wait_for(lambda: store.exists(f"{staging('r')}/progress/00001.json"))
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the foreground
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        wait_for(lambda: not command.processes())
        return Ended(process.returncode, out, err)

    first = run(interrupted=True)
    published = find_run(store, "r") is not None or read_latest(store) is not None
    before = shards(folder)
    second = run(interrupted=False)
    written = [path for path, when in shards(folder).items() if before.get(path) != when]
    return GoneOn(command.storage, first, published, second, written)


def shards(folder: Path) -> dict[Path, int]:
    """When each shard of a dataset was written."""
    return {path: path.stat().st_mtime_ns for path in (folder / "store" / "datasets").rglob("*.parquet")}
