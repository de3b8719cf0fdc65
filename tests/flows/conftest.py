"""What tests of the command line share: the command in a session of its own, and a run that was interrupted."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from prefect.logging.configuration import setup_logging
from prefect.testing.utilities import prefect_test_harness

from pipeline.progress import LOG, PROGRESS
from pipeline.publish import find_run, read_latest
from pipeline.storage import open_store
from pipeline.train import find_training, staging
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


EPOCHS = 12


@dataclass(frozen=True)
class GoneOn:
    """A run, `r`, by three times the same command: the first ended by Ctrl-C and the second by SIGTERM, before training
    was over."""

    storage: str
    first: Ended
    second: Ended
    third: Ended
    shards_written_again: list[Path]


@pytest.fixture
def prefect() -> Iterator[None]:
    """A Prefect server for flows that run in this process."""
    # At a process's first flow run Prefect would take the root logger's handlers away, caplog's among them.
    setup_logging()
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> GoneOn:
    """It takes a minute, so it is there once. No command leaves a process behind."""
    folder = tmp_path_factory.mktemp("gone-on")
    command = Command(folder)
    store = open_store(command.storage)

    def run(end: Callable[[int], None] | None = None) -> Ended:
        """Ended, if at all, when an epoch is over that was not when its workers began."""
        log, progress = f"{staging('r')}/{LOG}", f"{staging('r')}/{PROGRESS}"
        told = store.keys(log)
        process = command.start("--epochs", str(EPOCHS), "--run-id", "r")
        try:
            if end:
                # Its workers have said where they begin, which is told a little later than it is said.
                wait_for(lambda: store.keys(log) != told)
                before = store.keys(progress)
                wait_for(lambda: store.keys(progress) != before)
                end(process.pid)
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        wait_for(lambda: not command.processes())
        return Ended(process.returncode, out, err)

    first = run(lambda pid: os.killpg(pid, signal.SIGINT))  # as a terminal does: to all of the foreground
    before = shards(folder)
    second = run(lambda pid: os.kill(pid, signal.SIGTERM))
    assert find_training(store, "r") is None
    assert find_run(store, "r") is read_latest(store) is None
    third = run()
    written = [path for path, when in shards(folder).items() if before.get(path) != when]
    return GoneOn(command.storage, first, second, third, written)


def shards(folder: Path) -> dict[Path, int]:
    """When each shard of a dataset was written."""
    return {path: path.stat().st_mtime_ns for path in (folder / "store" / "datasets").rglob("*.parquet")}
