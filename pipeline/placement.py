"""How many workers there are to be, and with GPUs or without: what fits on machines with such resources."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import joblib
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline.errors import ConfigError

MAX_WORKERS = 10_000
AUTO, AUTO_WORKERS = "auto", 2


def _checked_workers(value: int | str) -> int | str:
    """Auto, a number, or a range with its ends apart. ValueError for anything else."""
    if value == AUTO:
        return AUTO
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value))
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most <= MAX_WORKERS:
        raise ValueError(
            f"it should be auto, a number from 1 to {MAX_WORKERS} or a range of them; use one like 2 or 2-8"
        )
    return least if least == most else f"{least}-{most}"


Workers = Annotated[int | str, AfterValidator(_checked_workers)]


class ClusterConfig(BaseModel):
    """The workers, and the cluster they run on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: Workers = Field(
        AUTO,
        description="Ray Train workers, from 1 to 10000; each takes its part of every batch. A range like 2-8 starts "
        "with as many as there is room for, and grows and shrinks with the cluster. auto is one for each GPU of this "
        "machine, or else two, or one on a single core; on a cluster it is two.",
    )
    cpus_per_worker: float = Field(
        1, gt=0, le=256, description="CPU cores for each worker; below 1, workers share a core."
    )
    gpu: Literal["auto", "yes", "no"] = Field(
        "auto", description="Give each worker a GPU: yes, no, or auto (yes if the cluster has one for every worker)."
    )
    ray_address: str | None = Field(
        None,
        description="Ray cluster to train on: auto or host:port connects to it, from one of its machines; "
        "http://host:8265 of its dashboard submits the training as a Ray job, which outlives this process. A local Ray "
        "is started if not given.",
    )

    @property
    def wanted(self) -> int | str:
        """The workers as a number or a range: what auto comes to."""
        if self.workers != AUTO:
            return self.workers
        if self.ray_address is not None:
            return AUTO_WORKERS
        return auto_workers(local_resources(), self.cpus_per_worker, self.gpu != "no")

    @property
    def world_size(self) -> int | tuple[int, int]:
        """The number of workers, or the least and the most, as Ray Train takes it."""
        wanted = self.wanted
        if isinstance(wanted, int):
            return wanted
        least, _, most = wanted.partition("-")
        return int(least), int(most)

    @property
    def by_job(self) -> bool:
        """Whether the training is submitted to the cluster, rather than this process connected to it."""
        return self.ray_address is not None and self.ray_address.startswith(("http://", "https://"))

    @property
    def connectable(self) -> str | None:
        """The cluster as `ray_session` takes it; None, for a local Ray, if it takes jobs only."""
        return None if self.by_job else self.ray_address

    @property
    def least_workers(self) -> int:
        """How many have to fit."""
        return self.world_size if isinstance(self.world_size, int) else self.world_size[0]

    def resources(self, gpu: bool) -> dict[str, float]:
        """What one worker asks of Ray, with a GPU or without."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if gpu else {})}


def placeable(nodes: Iterable[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many workers of `cpus` and `gpus` each fit on nodes with those resources: a worker never spans nodes."""
    fitting = 0
    for node in nodes:
        # 7 / 0.07 is 99.99999999999999.
        counts = [int(node.get("CPU", 0) / cpus + 1e-9)] + ([int(node.get("GPU", 0) / gpus)] if gpus else [])
        fitting += min(counts)
    return fitting


def auto_workers(node: Mapping[str, float], cpus: float, gpu: bool) -> int:
    """How many workers of `cpus` each a machine with these resources is asked for, if it may be with a GPU each."""
    with_gpu = placeable([node], cpus, 1) if gpu else 0
    return with_gpu or max(1, min(AUTO_WORKERS, placeable([node], cpus, 0)))


def local_resources() -> dict[str, float]:
    """CPUs (affinity and cgroup limits counted) and GPUs of this machine."""
    return {"CPU": float(joblib.cpu_count()), "GPU": float(torch.cuda.device_count())}


def decide_gpu(config: ClusterConfig, nodes: list[Mapping[str, float]]) -> bool:
    """Whether each worker gets a GPU. Raises ConfigError when the workers, or their GPUs, do not fit on `nodes`."""
    room = placeable(nodes, config.cpus_per_worker, 0)
    least = config.least_workers
    if room < least:
        cpus = total("CPU", nodes)
        raise ConfigError(
            "workers",
            config.wanted,
            f"Ray has room for {room} on {cpus} CPUs with cpus_per_worker={config.cpus_per_worker:g}",
            "ask for fewer, or lower cpus_per_worker",
        )
    with_gpu = placeable(nodes, config.cpus_per_worker, 1)
    if config.gpu == "yes" and with_gpu < least:
        count = total("GPU", nodes)
        remedy = "use gpu=no or fewer workers" if count else "use gpu=no, or see that PyTorch and its driver find one"
        raise ConfigError("gpu", "yes", f"{least} workers need a GPU each and Ray has {count}", remedy)
    return config.gpu != "no" and with_gpu >= least


def total(resource: str, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many of a resource these nodes have together."""
    return int(sum(node.get(resource, 0) for node in nodes))
