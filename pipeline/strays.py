"""Objects that nobody points to: what publishers and others that were killed have left in a store."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict

from pipeline.publish import LATEST, find_run
from pipeline.storage import Store


class Stray(BaseModel):
    """An object that nothing leads to, when it was written, and how it is known."""

    model_config = ConfigDict(frozen=True)

    key: str
    modified: datetime
    why: str


def find_strays(store: Store, older_than: timedelta) -> list[Stray]:
    """All strays in the store that are older than this, by key.

    What is younger may be of somebody who is at work. A publisher, or a sharding, that goes on later writes anew what
    was removed.
    """
    found = [*_of_runs(store), *_of_models(store), *_of_datasets(store), *_leftovers(store)]
    limit = datetime.now(UTC) - older_than
    strays = [Stray(key=key, modified=store.modified(key), why=why) for key, why in found]
    return sorted((stray for stray in strays if stray.modified < limit), key=lambda stray: stray.key)


def remove(store: Store, strays: list[Stray]) -> None:
    """Delete them."""
    for stray in strays:
        store.delete(stray.key)


def _of_runs(store: Store) -> Iterator[tuple[str, str]]:
    for run_id, keys in _by_folder(store, "runs", depth=2).items():
        if f"runs/{run_id}" == LATEST:
            continue
        manifest = find_run(store, run_id)
        for key in keys:
            name = key.removeprefix(f"runs/{run_id}/")
            if manifest is None:
                yield key, f"run {run_id} was not published"
            elif name != "manifest.json" and name not in manifest.artifacts:
                yield key, f"not in the manifest of run {run_id}"


def _of_models(store: Store) -> Iterator[tuple[str, str]]:
    for folder, keys in _by_folder(store, "models", depth=4).items():
        if "/versions/" in folder and f"models/{folder}/version.json" not in keys:
            yield from ((key, "there is no such version") for key in keys)


def _of_datasets(store: Store) -> Iterator[tuple[str, str]]:
    for folder, keys in _by_folder(store, "datasets", depth=3).items():
        if f"datasets/{folder}/manifest.json" not in keys:
            yield from ((key, f"dataset {folder} was not finished") for key in keys)


def _leftovers(store: Store) -> Iterator[tuple[str, str]]:
    yield from ((key, "a write that broke off") for key in store.leftovers())


def _by_folder(store: Store, prefix: str, depth: int) -> dict[str, list[str]]:
    """Keys under a prefix by the folder that they are in, `depth` names deep with the prefix, named without it."""
    folders: dict[str, list[str]] = defaultdict(list)
    for key in store.keys(prefix):
        folders["/".join(key.split("/")[1:depth])].append(key)
    return folders
