"""What a run is begun with, kept in its folder: parameters and code, and the version of its dataset.

staging/<run id>/run.json       parameters, the versions of all that computes, and the machine
staging/<run id>/dataset.json   which version of the dataset
"""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from lenet.compiled import lanes
from pipeline.documents import find_document, keep_document, read_document
from pipeline.storage import Store, sha256
from pipeline.train import staging

RECORDED_PACKAGES = ("lenet-pipeline", "torch", "torchvision", "ray", "pyarrow", "prefect", "s3fs", "numpy")


class RunRecord(BaseModel):
    """What a run was begun with, kept in the store: parameters, the versions of all that computes, and where from."""

    model_config = ConfigDict(frozen=True)

    parameters: dict[str, Any]
    versions: dict[str, str]
    lineage: dict[str, str] = {}


def keep_record(store: Store, run_id: str, record: RunRecord) -> RunRecord:
    """Keep it, if there is none; what the run was begun with."""
    return keep_document(store, f"{staging(run_id)}/run.json", record)


def read_record(store: Store, run_id: str) -> RunRecord:
    """What the run was begun with."""
    return read_document(store, f"{staging(run_id)}/run.json", RunRecord)


class RunDataset(BaseModel):
    """The version of a dataset, by its digest, that a run is about, and the key of the folder that it is in.

    A run keeps to it, whatever becomes of the source: it might have test images that the run was trained on.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    digest: str


def dataset_of(store: Store, run_id: str | None) -> RunDataset | None:
    """What the run is about; None while that has not been decided."""
    return None if run_id is None else find_document(store, f"{staging(run_id)}/dataset.json", RunDataset)


def keep_dataset(store: Store, run_id: str, dataset: RunDataset) -> RunDataset:
    """Decide it, if it has not been decided; what it is."""
    return keep_document(store, f"{staging(run_id)}/dataset.json", dataset)


def versions() -> dict[str, str]:
    """Of this code, of Python and of the packages that results depend on."""
    packages = {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES}
    return {"code": _commit(), "python": platform.python_version(), **packages}


def lineage() -> dict[str, str]:
    """What else the result may depend on: the locked set of packages (sha256 of the lock, hex), the machine, and what
    convolves on its CPU."""
    compiled = f"compiled, {found} images at a time" if (found := lanes()) else "torch's"
    lock = Path(__file__).parents[1] / "requirements.lock"
    memory = psutil.virtual_memory().total / 2**30
    return {
        "lock": sha256(lock.read_bytes()) if lock.is_file() else "unknown",
        "hardware": f"{platform.machine()}, {psutil.cpu_count()} CPUs with {torch.backends.cpu.get_cpu_capability()}, "
        f"{memory:.0f} GiB, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}",
        "system": platform.platform(),
        "convolutions": compiled,
    }


def _commit() -> str:
    """The commit this code runs from, with -dirty if it was changed since; outside a git checkout
    LENET_REVISION, which our image sets, or unknown."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LENET_REVISION") or "unknown"
