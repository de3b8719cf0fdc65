"""Reaching Ray: a cluster that is there, or a local one for the time of the training; and waiting for room on it."""

import contextlib
import logging
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
    AutoscalingState,
    GetClusterStatusReply,
)
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.ahead import Result, Task, in_order
from pipeline.errors import ClusterError, ConfigError, PipelineError, first_line
from pipeline.placement import ClusterConfig, decide_gpu, local_resources, total
from pipeline.storage import patience_s

log = logging.getLogger(__name__)

# Ray Train and Ray Tune read these from the environment; what the user has set there stays.
RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # give up a hung worker after 2 minutes, not 10
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "25",  # Ray Train counts on a lost node for up to 20 s: not for 60
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor, 2 s of a core: pipeline/trainer.py looks out by itself,
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # and every second, not every five
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # take in reports, and see the end, after 0.2 seconds, not two
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # the control loop is of this process, and its log ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would go on with what there is, as if nobody had interrupted it
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # by a traceback: pipeline/tune.py says each in a line
    "RAY_AIR_NEW_OUTPUT": "0",  # that sends people to folders that are gone
}
# Ray's workers give way to all other processes, at niceness 15. On a machine of one's own, with three that were busy on
# two cores, training had not begun after 130 s; this way, after 18. No variable: other threads read the environment.
LOCAL_RAY_SETTINGS = {"worker_niceness": 0}

_connecting = threading.Lock()
_wanted_no_more = threading.Event()  # the Ray that was started ahead
CONNECT_TIMEOUT_S = 5
# Ray itself would try for ever to connect to an address where something else listens.
CONNECT_PATIENCE_S = 25
HTTP2_SETTINGS = b"\x04"
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + HTTP2_SETTINGS + b"\0\0\0\0\0"  # as gRPC begins
# What an autoscaler may take: to say what it does about workers without room, and to have machines ready in a cloud,
# which load gigabytes of image.
ANSWER_S, GROW_S = 20, 900


def check_cluster(config: ClusterConfig) -> None:
    """Before any work: ConfigError when a local Ray could not hold the workers, ClusterError for a dead address."""
    if config.ray_address is None:
        decide_gpu(config, [local_resources()])
    elif config.by_job:
        raise ConfigError(
            "ray_address", config.ray_address, "jobs are for training; this connects to Ray", "give auto or host:port"
        )
    elif config.ray_address != "auto":
        host, _, port = config.ray_address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S) as connection:
                connection.sendall(HTTP2_HELLO)
                # A frame's type is its fourth byte, and the first frame of whoever speaks HTTP/2 is its settings.
                if connection.recv(4)[3:] != HTTP2_SETTINGS:
                    raise OSError("what listens there is not Ray")
        except (OSError, ValueError) as error:
            raise _no_cluster(config, error) from None


@contextlib.contextmanager
def ray_ahead(config: ClusterConfig) -> Iterator[None]:
    """Start a local Ray, if one is to be started at all, in the background; it goes after the first `ray_session`."""
    if config.ray_address is not None:
        yield
        return

    def live() -> None:
        with contextlib.suppress(Exception), _connecting:  # ray_session will try again, and say what is wrong
            _connect(config)
        started.set()
        _wanted_no_more.wait()  # Ray's processes die with the thread that started them
        with _connecting:
            ray.shutdown()

    started = threading.Event()
    _wanted_no_more.clear()
    thread = threading.Thread(target=live, name="ray", daemon=True)
    thread.start()
    try:
        yield
    finally:
        started.wait()  # Ray ends the whole process, without a word, when it is shut down under a call
        _wanted_no_more.set()
        thread.join()


@contextlib.contextmanager
def ray_session(config: ClusterConfig) -> Iterator[bool]:
    """Connect to Ray, starting a local one if none is named, and yield whether the workers get GPUs.

    A cluster's autoscaler, if it has one, starts what is missing. Raises ClusterError when the named cluster does not
    answer or grow, ConfigError when the workers do not fit.
    """
    local = config.ray_address is None
    with _defaults(RAY_TRAIN_SETTINGS | {"RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(patience_s())}):  # not for ever
        with _connecting:
            started = not ray.is_initialized()
            if started:
                _connect(config)
        try:
            yield _find_room(config)
        finally:
            if started:
                ray.shutdown()
            elif local:
                _wanted_no_more.set()


def use_interface_of_ray() -> None:
    """Let gloo, in this process, talk by the interface whose address this host has in Ray.

    It would take the address of the host's own name, which is loopback on many hosts, and nobody else would reach it.
    """
    mine = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == mine for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def run_on_ray(config: ClusterConfig, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """The results in the order of the tasks, as many at work as the cluster has CPUs for.

    The tasks read files of this machine: on a cluster of several, they stay on this one.
    """
    with ray_session(config):
        here = ray.get_runtime_context().get_node_id()
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        cpus = next(node["Resources"].get("CPU", 0) for node in nodes if node["NodeID"] == here)
        stay = NodeAffinitySchedulingStrategy(here, soft=False)
        # A head that offers no CPU, as is usual, would take no task that asks for one.

        def call(task: Task) -> Result:  # Ray takes functions only; each of its processes keeps this one, and `work`
            return work(task)

        def get(started: Any) -> Result:
            try:
                return ray.get(started)  # type: ignore[no-any-return]
            except RayTaskError as error:  # which has a page of Ray's to say
                raise error.cause if isinstance(error.cause, PipelineError) else error from None

        remote: Any = ray.remote(call).options(scheduling_strategy=stay, num_cpus=min(1, cpus))
        yield from in_order(remote.remote, get, tasks, ahead=2 * max(1, int(cpus)))


def _find_room(config: ClusterConfig) -> bool:
    """Whether the workers get GPUs, once there is room for them."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2  # 0.1 s to import

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    try:
        gpu = decide_gpu(config, nodes)
    except ConfigError as refusal:
        # Of an autoscaler of the first version, nobody can tell what it will do.
        if config.ray_address is None or not is_autoscaler_v2(fetch_from_server=True):
            raise
        gpu = config.gpu == "yes"
        # What stays unplaced for a moment is what an autoscaler acts on.
        group = placement_group([config.resources(gpu)] * config.least_workers)
        try:
            _wait_for_machines(config, group, refusal)
        finally:
            remove_placement_group(group)
        return gpu
    idle = total("GPU", nodes)
    if idle and not gpu and config.gpu == "auto":
        log.info(
            "training on CPUs: %s workers would need a GPU each, and there are %d; ask for fewer to use them",
            config.wanted, idle,
        )  # fmt: skip
    return gpu


def _wait_for_machines(config: ClusterConfig, group: PlacementGroup, refusal: ConfigError) -> None:
    """Until an autoscaler has started what the group needs; the refusal if it cannot, or there is none."""
    asked, starting = time.monotonic(), False
    while not group.wait(timeout_seconds=1):
        waited, state = time.monotonic() - asked, _autoscaling_state()
        refused = any(request.details.startswith(group.id.hex()) for request in state.infeasible_gang_resource_requests)
        if not starting and (state.pending_instances or state.pending_instance_requests) and not refused:
            starting = True
            minutes = GROW_S // 60
            log.info("the cluster starts machines for %s workers; waiting up to %d minutes", config.wanted, minutes)
        if refused or (not starting and waited > ANSWER_S):
            raise refusal
        if waited > GROW_S:
            raise ClusterError(
                f"workers={config.wanted}: the cluster has not started machines for them in {GROW_S // 60} minutes; "
                "see its autoscaler's log, or ask for fewer"
            )


def _autoscaling_state() -> AutoscalingState:
    """What the cluster's autoscaler has last said; nothing, where there is none."""
    client = GcsClient(ray.get_runtime_context().gcs_address)
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=CONNECT_TIMEOUT_S)).autoscaling_state


@contextlib.contextmanager
def _defaults(environment: Mapping[str, str]) -> Iterator[None]:
    """These variables are set for the time of the block, but for those that are set already."""
    added = {name: value for name, value in environment.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _connect(config: ClusterConfig) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.ray_address is None:
        resources = local_resources()
        cpus, gpus = int(resources["CPU"]), int(resources["GPU"])
        # Ray gives the path to a shell as it is, for workers with variables of their own: training would wait for ever.
        if re.search(r"[^\w@%+=:,./-]", sys.executable):
            quiet["runtime_env"] = {"py_executable": shlex.quote(sys.executable)}
        ray.init(
            address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, _system_config=LOCAL_RAY_SETTINGS,
            **quiet,
        )  # fmt: skip
        return
    # In a thread of its own: it ends with this process, if not before.
    connecting: Future[Any] = Future()

    def connect() -> None:
        try:
            connecting.set_result(ray.init(address=config.ray_address, **quiet))
        except BaseException as error:  # for whoever waits to hear
            connecting.set_exception(error)

    threading.Thread(target=connect, name="connect", daemon=True).start()
    try:
        connecting.result(CONNECT_PATIENCE_S)
    except TimeoutError:
        raise _no_cluster(config, TimeoutError(f"not within {CONNECT_PATIENCE_S} s")) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        ray.shutdown()  # half connected, it would show the next cluster's nodes as this one's
        if "Version mismatch" in str(error):
            raise ClusterError(
                f"ray_address={config.ray_address!r}: {' '.join(str(error).split())}; install the same versions on both"
            ) from None
        raise _no_cluster(config, error) from None


def _no_cluster(config: ClusterConfig, error: Exception) -> ClusterError:
    return ClusterError(
        f"ray_address={config.ray_address!r}: no Ray cluster answers there ({first_line(error)}); "
        "give the head's host:port, on a machine of the cluster, with RAY_AUTH_MODE and the token that it has, or "
        "http://host:8265 from elsewhere, or leave it out for a local Ray"
    )
