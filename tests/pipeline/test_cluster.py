"""Proves that Ray is reached and grown, and that what cannot be is refused before any work."""

import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from pipeline.cluster import check_cluster, ray_session, run_on_ray
from pipeline.errors import ClusterError, ConfigError, StorageError
from pipeline.placement import ClusterConfig, local_resources, placeable
from pipeline.scorer import _room
from tests.conftest import free_ports, processes_with, refusal

ROOT = Path(__file__).parents[2]
KEY, NAMESPACE = b"CLUSTER_METADATA", b"cluster"  # where a head keeps what it runs


def test_a_thousand_workers_are_refused_on_one_machine() -> None:
    cpus = int(local_resources()["CPU"])
    remedy = "ask for fewer, or lower cpus_per_worker"
    with pytest.raises(ConfigError) as raised:
        check_cluster(ClusterConfig(workers=1000, cpus_per_worker=8))
    room = cpus // 8
    expected = f"workers=1000: Ray has room for {room} on {cpus} CPUs with cpus_per_worker=8; {remedy}"
    assert str(raised.value) == expected


def test_what_fits_this_machine_passes() -> None:
    check_cluster(ClusterConfig(workers=1))
    check_cluster(ClusterConfig(workers=math.floor(local_resources()["CPU"])))


def test_a_cluster_elsewhere_is_not_judged_by_this_machine() -> None:
    check_cluster(ClusterConfig(workers=1000, cpus_per_worker=8, ray_address="auto"))


def test_the_workers_of_a_local_ray_do_not_give_way_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_worker_niceness")  # set for all tests
    assert list(run_on_ray(ClusterConfig(workers=1, gpu="no"), os.nice, [0])) == [os.nice(0)]


SPACED = """
import ray
from pipeline.cluster import ray_session
from pipeline.placement import ClusterConfig

@ray.remote(runtime_env={"env_vars": {"SAID": "so"}})
def said():
    import os, sys
    return os.environ["SAID"], sys.executable

with ray_session(ClusterConfig(workers=1, gpu="no")):
    print(*ray.get(said.remote(), timeout=120), sep="|")
"""


def test_workers_with_variables_of_their_own_start_from_a_path_with_spaces(tmp_path: Path) -> None:
    """As Ray Train's do."""
    folder = tmp_path / "it's a folder"
    folder.symlink_to(Path(sys.prefix))
    python = str(folder / "bin" / "python")
    done = subprocess.run([python, "-c", SPACED], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout == f"so|{python}\n", done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that offers no CPUs, and a node with one."""
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()  # what did not connect is half connected
        cluster.shutdown()


def test_work_that_stays_on_this_host_runs_on_a_head_that_offers_no_cpus(cluster: Cluster) -> None:
    config = ClusterConfig(workers=1, gpu="no", ray_address=cluster.address)
    check_cluster(config)
    assert list(run_on_ray(config, lambda number: number + 1, range(5))) == [1, 2, 3, 4, 5]


def test_what_a_task_fails_of_is_told_in_its_line(cluster: Cluster) -> None:
    def fail(error: Exception) -> None:
        raise error

    config = ClusterConfig(workers=1, gpu="no", ray_address=cluster.address)
    failures = [StorageError("x"), StorageError("x", may_pass=False), ConfigError("x", 1, "is not", "use 2")]
    for failure in failures:
        with pytest.raises(type(failure)) as raised:
            list(run_on_ray(config, fail, [failure]))
        assert (str(raised.value), raised.value.may_pass) == (str(failure), failure.may_pass)
    with pytest.raises(ZeroDivisionError, match="in call"):  # a bug keeps its traceback
        list(run_on_ray(config, fail, [ZeroDivisionError("x")]))


def test_files_of_a_machine_that_offers_no_cpus_cannot_be_predicted(cluster: Cluster) -> None:
    config = ClusterConfig(workers=1, gpu="no", ray_address=cluster.address)
    with ray_session(config):
        assert refusal(lambda: _room(config, pinned=True), ClusterError) == (
            "this machine gives Ray no CPU, and files of it are asked for; use s3:// for source and output"
        )
        assert _room(config, pinned=False) == (1, {})


class Counting:
    """Counts its calls, in each process anew."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, number: int) -> tuple[int, int]:
        self.calls += 1
        return number, self.calls


def test_an_object_that_can_be_called_is_kept_from_task_to_task(cluster: Cluster) -> None:
    config = ClusterConfig(workers=1, gpu="no", ray_address=cluster.address)
    found = list(run_on_ray(config, Counting(), range(6)))
    assert [number for number, _ in found] == list(range(6))
    assert max(calls for _, calls in found) > 1  # so what it has opened is not opened for every task


def test_other_versions_on_the_cluster_are_one_line(cluster: Cluster) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    found = json.loads(_internal_kv_get(KEY, namespace=NAMESPACE))
    # It stays so: nothing connects to this cluster after this.
    _internal_kv_put(KEY, json.dumps(found | {"ray_version": "2.59.0"}).encode(), namespace=NAMESPACE)
    ray.shutdown()
    message = r"Version mismatch: [^\n]*Ray: 2\.59\.0 [^\n]*; install the same versions on both$"
    config = ClusterConfig(workers=1, ray_address=cluster.address)
    with pytest.raises(ClusterError, match=message), ray_session(config):
        pass


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoscaler itself says what it can start, and what it cannot: no silence of its is taken for an answer."""
    monkeypatch.setattr("pipeline.cluster.ANSWER_S", 600)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a head that offers nothing, whose autoscaler may start three nodes, here: two of CPUs, one of a GPU.

    The GPU is one by name only: it is placed, and nothing is computed on it.
    """
    port, client_port = free_ports(2)
    config = tmp_path_factory.mktemp("growing") / "autoscaler.json"
    config.write_text(json.dumps(autoscaler(f"127.0.0.1:{port}")))
    env = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "LENET_TEST": str(config),
        "CUDA_VISIBLE_DEVICES": "0",  # a node of a GPU would not start where there is said to be none
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--ray-client-server-port={client_port}", "--min-worker-port=0"]
    command += ["--max-worker-port=0", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"]
    command += ["--disable-usage-stats", f"--autoscaling-config={config}"]
    try:
        subprocess.run(command, env=env, check=True, capture_output=True)
        yield f"127.0.0.1:{port}"
    finally:
        ray.shutdown()
        for process in processes_with("LENET_TEST", str(config)):
            process.kill()


def autoscaler(address: str) -> dict[str, object]:
    """Settings as `ray up` writes them, for Ray's own provider of nodes that are processes of the head's machine."""
    groups = {
        FAKE_HEAD_NODE_TYPE: {"resources": {}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        "gpu": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    }
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "growing",
        "max_workers": 3,
        "idle_timeout_minutes": 10,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__qualname__}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": groups,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in lists},
    }


@pytest.mark.usefixtures("_patient")
def test_workers_without_room_have_the_cluster_grow(growing: str, caplog: pytest.LogCaptureFixture) -> None:
    with ray_session(ClusterConfig(workers=2, ray_address=growing)) as gpu:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        assert placeable(nodes, cpus=1, gpus=0) >= 2
    assert not gpu
    with ray_session(ClusterConfig(workers=1, gpu="yes", ray_address=growing)) as gpu:
        assert ray.cluster_resources()["GPU"] == 1
    assert gpu
    with caplog.at_level(logging.INFO, "pipeline.cluster"), ray_session(ClusterConfig(workers=3, ray_address=growing)):
        pass
    said = "training on CPUs: 3 workers would need a GPU each, and there are 1; ask for fewer to use them"
    assert said in [record.message for record in caplog.records]


@pytest.mark.usefixtures("_patient")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 9}, r"^workers=9: Ray has room for \d on \d CPUs"),
        ({"workers": 2, "gpu": "yes"}, "^gpu='yes': 2 workers need a GPU each and Ray has 1; "),
    ],
)
def test_more_workers_than_a_cluster_can_grow_to_are_refused(growing: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said), ray_session(ClusterConfig(ray_address=growing, **given)):
        pass


def test_a_server_that_is_not_ray_is_one_line_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"^ray_address='{address}': no Ray cluster answers .*is not Ray"):
            check_cluster(ClusterConfig(ray_address=address))
