"""What tests share: the real Fashion-MNIST, a real S3 server (SeaweedFS), stores of both kinds, a clean environment."""

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.config
import botocore.exceptions
import botocore.session
import numpy as np
import psutil
import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from flows.server import past_proxies
from infra.stack import ONLY_S3
from pipeline.download import SourceConfig, fetch
from pipeline.errors import DataError, PipelineError
from pipeline.idx import Pixels
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest
from pipeline.source import FACTS, FILES, IMAGES, LABELS, SPLITS, Source, SourceFacts, file_sha256, open_source
from pipeline.storage import Store, open_store

# Time limits on single examples fail on busy machines and prove nothing. The same examples every time: a commit that
# has passed passes again.
settings.register_profile("lenet", deadline=None, derandomize=True)
settings.load_profile("lenet")

Splits = dict[str, tuple[Pixels, Pixels]]

START_DEADLINE_S = 120
# One token for every Ray that tests start, on loopback, the stack's too.
RAY_TOKEN = "5" * 64
STRANGERS = ("AWS_", "LENET_", "PREFECT_", "RAY_", "FORCE_COLOR", "NO_COLOR", "TTY_", "COLUMNS")
# No credentials, cluster, server, database, GPU or terminal of the developer's own reaches a test or fixture; nor is
# a proxy asked for what tests start. A process reads these when it imports Ray or Prefect, and the conftests of the
# folders below do so. A Ray worker that a test started has the token, and when it imports a file of tests it keeps what
# it was given. Workers get their share of a busy machine, as those of a local Ray do.
if os.environ.get("RAY_AUTH_TOKEN") != RAY_TOKEN:
    for stranger in [name for name in os.environ if name.startswith(STRANGERS)]:
        del os.environ[stranger]
    os.environ.update(
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        AWS_EC2_METADATA_DISABLED="true",
        CUDA_VISIBLE_DEVICES="",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=RAY_TOKEN,
        RAY_worker_niceness="0",
        **past_proxies(os.environ),
    )
# Files that share what takes a minute to make.
SHARED = {
    "tests/infra/test_jobs.py": "stack",
    "tests/infra/test_stack.py": "stack",
    "tests/flows/test_models.py": "gone on",
    "tests/flows/test_whole.py": "gone on",
}
# Files that take half a minute to seven minutes, the longest first: begun late, one would run alone at the end.
LONG = ("test_jobs", "test_stack", "test_train", "test_faults", "test_models", "test_whole", "test_outages",
        "test_verify", "test_registry", "test_worker", "test_publish", "test_strays", "test_batch", "test_hosts",
        "test_storage", "test_tune")  # fmt: skip
SMALL = {"train": 600, "test": 200}
SMALL_SHARD_MIB = 0.125  # 167 images


class S3Server:
    """SeaweedFS with one bucket on ports of its own. It keeps its data and ports from stop() to start()."""

    bucket = "lenet-tests"
    access_key = "test-access-key"
    secret_key = "test-secret-key"  # noqa: S105 - known to this server on loopback only

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._choose_ports()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    @property
    def env(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Return once an object can be written. Call it on the main thread: the server dies with its thread."""
        for _ in range(3):
            if self._started():
                return
            self._choose_ports()  # another process took one of them
        raise RuntimeError(f"SeaweedFS did not start:\n{(self.folder / 'log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Like a power cut: at once, whatever is under way."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        for port in self._ports.values():  # the sockets it keeps there, whatever TMPDIR says
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108
                left.unlink()

    def _choose_ports(self) -> None:
        names = ("master", "filer", "volume", "s3", "admin")
        ports = free_ports(2 * len(names))
        self._ports = dict(zip([f"{name}.port{kind}" for name in names for kind in ("", ".grpc")], ports, strict=True))

    def _started(self) -> bool:
        die_with_parent = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        weed = str(Path(sys.executable).with_name("weed"))
        options = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ONLY_S3]
        options += [f"-{name}={port}" for name, port in self._ports.items()]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*die_with_parent, weed, "mini", f"-dir={self.folder}", *options],
                cwd=self.folder,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(self.folder),
                    "TMPDIR": str(self.folder),
                    "AWS_ACCESS_KEY_ID": self.access_key,
                    "AWS_SECRET_ACCESS_KEY": self.secret_key,
                    "S3_BUCKET": self.bucket,
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        client = botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=botocore.config.Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0}),
        )
        deadline = time.monotonic() + START_DEADLINE_S
        try:
            while time.monotonic() < deadline and self._process.poll() is None:
                with contextlib.suppress(botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
                    client.put_object(Bucket=self.bucket, Key="ready", Body=b"ready")
                    return True
                time.sleep(0.05)
        finally:
            client.close()
        self.stop()
        return False


class _ByFile(LoadFileScheduling):
    """The tests of a file, and of files that share something, stay in one of the processes that tests are spread over.

    xdist's own groups by a mark do nothing with pytest 9: it reads them from a name that pytest keeps no more.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return SHARED.get(file, file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast files first, then the long ones, then the rest."""

    def place(item: pytest.Item) -> int:
        if item.path.parent.name in ("tests", "lenet"):
            return -1
        return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)

    items.sort(key=place)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _ByFile(config, log)


def idx_bytes(array: Pixels) -> bytes:
    """IDX as the MNIST page describes it: two zeros, type 8, number of dimensions, big-endian sizes, the bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, outside the ranges that the system and Ray hand out by themselves."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)  # noqa: S311
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


def free_range(count: int) -> int:
    """The first of so many ports in a row that nobody listens on, where `free_ports` looks."""
    while True:
        first = random.randrange(20_000, 32_000 - count)  # noqa: S311
        for port in range(first, first + count):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        else:
            return first


def refusal(call: Callable[[], object], kind: type[PipelineError] = DataError) -> str:
    """The message of the error of that kind that `call` raises: one line."""
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    return message


def wait_for(condition: Callable[[], object], seconds: float = 600) -> None:
    """Until something is so; a failed test when it is not, for so long: longer than on the busiest machine, where it
    costs nothing."""
    deadline, asked = time.monotonic() + seconds, time.monotonic()
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(min(1, max(0.05, 5 * (time.monotonic() - asked))))  # what is waited for wants the processor, too
        asked = time.monotonic()


def processes_with(name: str, value: str, command: str = "") -> list[psutil.Process]:
    """The processes, of any parent, that have a variable of this value in their environment, and this in their command
    line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended since
            mine = process.environ().get(name) == value and command in " ".join(process.cmdline())
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Small tensors gain nothing from a second thread, and on a busy machine two of them wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fashion_mnist() -> Source:
    """The real, verified Fashion-MNIST; on a bare machine it is fetched first."""
    return open_source(fetch(SourceConfig()))


@pytest.fixture(scope="session")
def full_splits(fashion_mnist: Source) -> Splits:
    """Images uint8 (N, 28, 28) and labels uint8 (N,) of all 60,000 and 10,000 real images."""
    return {
        split: (fashion_mnist.read(split, np.arange(fashion_mnist.rows(split))), fashion_mnist.labels(split))
        for split in SPLITS
    }


@pytest.fixture(scope="session")
def small_splits(full_splits: Splits) -> Splits:
    """The first 600 train and 200 test images, and their labels."""
    return {
        split: (np.array(images[: SMALL[split]]), np.array(labels[: SMALL[split]]))
        for split, (images, labels) in full_splits.items()
    }


@pytest.fixture(scope="session")
def make_source(fashion_mnist: Source) -> Callable[[Path, Splits], Source]:
    """Function that writes arrays to a folder as IDX, as if it were Fashion-MNIST, and opens it as a source."""

    def make(folder: Path, splits: Splits) -> Source:
        folder.mkdir(parents=True, exist_ok=True)
        for split, arrays in splits.items():
            for name, array in zip((IMAGES[split], LABELS[split]), arrays, strict=True):
                (folder / name).write_bytes(idx_bytes(array))
        digests = {name: file_sha256(folder / name) for name in FILES}
        shape = splits["train"][0].shape[1:]
        facts = fashion_mnist.facts.model_copy(
            update={"made_of": digests, "sha256": digests, "image_shape": (shape[0], shape[1])}
        )
        (folder / FACTS).write_text(SourceFacts.model_validate(facts.model_dump()).model_dump_json())
        return open_source(folder)

    return make


@pytest.fixture(scope="session")
def small_source(
    small_splits: Splits, make_source: Callable[[Path, Splits], Source], tmp_path_factory: pytest.TempPathFactory
) -> Source:
    """The small splits as a source."""
    return make_source(tmp_path_factory.mktemp("small-source"), small_splits)


@pytest.fixture(scope="session")
def small_manifest(small_source: Source) -> Callable[[Store], Manifest]:
    """Function that shards the small splits to a store, four shards of train and two of test; their manifest."""
    return lambda store: write_shards(store, small_source, ShardConfig(shard_mib=SMALL_SHARD_MIB))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The S3 server that tests share; nobody stops it."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_s3_server(tmp_path: Path) -> Iterator[S3Server]:
    """A server for one test, which may stop it and start it again."""
    folder = tmp_path / "s3"
    folder.mkdir()
    server = S3Server(folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The shared server's address and credentials, set in the environment."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server.env


@pytest.fixture
def s3_store(s3_server: S3Server, s3_env: dict[str, str]) -> Store:
    """An empty prefix of the bucket."""
    return open_store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    """An empty folder."""
    return open_store(str(tmp_path / "store"))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store of either kind: for tests of what holds for both."""
    found: Store = request.getfixturevalue(f"{request.param}_store")
    return found
