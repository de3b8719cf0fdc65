"""Proves that workers on hosts of their own find each other, whatever the hosts are called. `make hosts` does more."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.progress import LOG
from pipeline.shards import Manifest
from pipeline.storage import Store
from pipeline.train import find_training, staging
from tests.bench.network import network
from tests.bench.programs import Cluster

ROOT = Path(__file__).parents[2]
# Long enough that the workers, who tell what they log a tenth of a second later, have told where they are.
DRIVER = """
import sys
from pipeline.placement import ClusterConfig
from pipeline.loader import LoadConfig
from pipeline.recipe import TrainConfig
from pipeline.shards import require_manifest
from pipeline.storage import open_store
from pipeline.train import fit
url, folder, address = sys.argv[1:]
store = open_store(url)
cluster = ClusterConfig(workers=2, gpu="no", ray_address=address)
fit(store, "hosts", require_manifest(store, folder), TrainConfig(epochs=20), cluster, LoadConfig())
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    yield folder
    shutil.rmtree(folder)


def test_workers_on_two_hosts_find_each_other(
    short_folder: Path,
    local_store: Store,
    small_manifest: Callable[[Store], Manifest],
) -> None:
    if os.geteuid() != 0:
        pytest.fail("network namespaces need root; `make test` leaves this test out where it cannot run")
    manifest = small_manifest(local_store)
    with network(4, short_folder, ROOT) as hosts:
        cluster = Cluster(hosts, short_folder, soon=False)
        cluster.start_ray()
        driver = [sys.executable, "-W", "ignore", "-c", DRIVER]
        cluster.head.run([*driver, local_store.url, manifest.folder, cluster.address], cluster.env)
    training = find_training(local_store, "hosts")
    assert training is not None
    assert [epoch.world_size for epoch in training.history] == [2] * 20
    logs = [json.loads(local_store.read(key)) for key in local_store.keys(f"{staging('hosts')}/{LOG}")]
    assert {host for host in ("host-1", "host-2", "host-3") if f" of {host}," in str(logs)} == {"host-2", "host-3"}
