"""Objects that nobody points to: what publishers and others that were killed have left in a store."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby

from pydantic import BaseModel, ConfigDict

from pipeline.errors import DataError
from pipeline.publish import LATEST, find_run
from pipeline.storage import Store

log = logging.getLogger(__name__)


class Stray(BaseModel):
    """An object that nothing leads to, when it was written, and how it is known. `unless` is the key of what would lead
    to it, if anything can, `active` when anything was last written of the run, version or dataset that it is of."""

    model_config = ConfigDict(frozen=True)

    key: str
    modified: datetime
    why: str
    unless: str | None
    active: datetime


def find_strays(store: Store, older_than: timedelta) -> list[Stray]:
    """All strays in the store of runs, versions and datasets that nothing was written of for so long, by key.

    What is younger may be of somebody who is at work: whoever goes on later leaves what is there as it is.
    """
    found = [*_of_runs(store), *_of_models(store), *_of_datasets(store), *_leftovers(store)]
    listed = store.listing("")  # last: what it has not any more is somebody's who was at work
    newest: dict[str, datetime] = {}
    for key, (_, written) in listed.items():
        newest[_belongs(key)] = max(written, newest.get(_belongs(key), written))
    limit = datetime.now(UTC) - older_than
    strays = [
        Stray(key=key, modified=listed[key].written, why=why, unless=unless, active=newest[_belongs(key)])
        for key, why, unless in found
        if key in listed and newest[_belongs(key)] < limit
    ]
    return sorted(strays, key=lambda stray: stray.key)


def remove(store: Store, strays: list[Stray]) -> list[Stray]:
    """Delete them, but for what something leads to by now, or somebody has gone on with; what was deleted."""
    gone = []
    for whole, parts in groupby(strays, lambda stray: _belongs(stray.key)):
        active = store.last_written(*_folders(whole))
        for stray in parts:
            if active <= stray.active and (stray.unless is None or not store.exists(stray.unless)):
                store.delete(stray.key)
                gone.append(stray)
    return gone


def _of_runs(store: Store) -> Iterator[tuple[str, str, str | None]]:
    for run_id, keys in _by_folder(store, "runs", depth=2).items():
        if f"runs/{run_id}" == LATEST:
            continue
        try:
            manifest = find_run(store, run_id)
        except DataError as error:
            log.warning("%s; so nothing of run %s is taken for a stray", error, run_id)
            continue
        for key in keys:
            name = key.removeprefix(f"runs/{run_id}/")
            if manifest is None:
                yield key, f"run {run_id} was not published", f"runs/{run_id}/manifest.json"
            elif name != "manifest.json" and name not in manifest.artifacts:
                yield key, f"not in the manifest of run {run_id}", None


def _of_models(store: Store) -> Iterator[tuple[str, str, str | None]]:
    for folder, keys in _by_folder(store, "models", depth=4).items():
        if "/versions/" in folder and (version := f"models/{folder}/version.json") not in keys:
            yield from ((key, "there is no such version", version) for key in keys)


def _of_datasets(store: Store) -> Iterator[tuple[str, str, str | None]]:
    for folder, keys in _by_folder(store, "datasets", depth=3).items():
        if (manifest := f"datasets/{folder}/manifest.json") not in keys:
            yield from ((key, f"dataset {folder} was not finished", manifest) for key in keys)


def _leftovers(store: Store) -> Iterator[tuple[str, str, str | None]]:
    yield from ((key, "a write that broke off", None) for key in store.leftovers())


def _belongs(key: str) -> str:
    """What the object is written together with: a run with its staging, a version, a dataset, or nothing else."""
    top, *rest = key.split("/")
    names = {"runs": 1, "staging": 1, "datasets": 2, "models": 3}.get(top, len(rest))
    return "/".join(["runs" if top == "staging" else top, *rest[:names]])


def _folders(whole: str) -> list[str]:
    """Where all that `_belongs` calls so lies."""
    return [whole, f"staging/{whole.removeprefix('runs/')}"] if whole.startswith("runs/") else [whole]


def _by_folder(store: Store, prefix: str, depth: int) -> dict[str, list[str]]:
    """Keys under a prefix by the folder that they are in, `depth` names deep with the prefix, named without it."""
    folders: dict[str, list[str]] = defaultdict(list)
    for key in store.keys(prefix):
        folders["/".join(key.split("/")[1:depth])].append(key)
    return folders
