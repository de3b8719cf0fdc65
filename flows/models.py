"""`lenet models` and what can be done with what is published: promote, rollback, index, verify, export, gc…"""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.table import Table

import pipeline.registry
import pipeline.reproduce
import pipeline.retention
import pipeline.verify
from flows.display import Display, Lasting
from flows.options import DEFAULT_STORAGE, Storage, option, plain_console, whole
from flows.parameters import with_parameters
from pipeline.config import config_of
from pipeline.errors import DataError
from pipeline.index import INDEX, refresh_index, write_index
from pipeline.publish import copy_run
from pipeline.registry import find_champion, find_decision, list_models, list_versions
from pipeline.retention import RetentionConfig
from pipeline.served import DEFAULT_MODEL, check_version, find_place
from pipeline.storage import open_store
from pipeline.strays import find_strays, remove

Model = Annotated[str, Parameter(help="Name of the model.")]
Published = Annotated[str, Parameter(name=["--url", "--storage"])]


def models(*, storage: Storage = DEFAULT_STORAGE) -> None:
    """List the models' versions: which is the champion, how good each is, and what was decided about it."""
    store, console = open_store(storage), plain_console()
    table = Table("model", "version", "", "run", "accuracy", "finished", "decision", box=None)
    for name in list_models(store):
        champion = find_champion(store, name)
        for version in list_versions(store, name):
            decision = find_decision(store, version)
            table.add_row(
                name,
                str(version.version),
                "champion" if champion is not None and champion.version == version.version else "",
                version.run_id,
                f"{version.accuracy:.4f}",
                f"{version.finished:%Y-%m-%d %H:%M} UTC",
                "" if decision is None else "; ".join(decision.reasons),
            )
    console.print(table if table.row_count else f"no model yet: {store}", soft_wrap=True)


def promote(
    version: Annotated[int, Parameter(validator=Number(gte=1), converter=whole)],
    /,
    *,
    model: Model = DEFAULT_MODEL,
    storage: Storage = DEFAULT_STORAGE,
) -> None:
    """Make a version the champion, whatever the rule says of it.

    Args:
        version: Its number, as lenet models lists it.
    """
    store = open_store(storage)
    champion = pipeline.registry.promote_by_hand(store, model, version)
    refresh_index(store)
    print(f"champion of {model}: version {champion.version} ({champion.run_id})")


def rollback(*, model: Model = DEFAULT_MODEL, storage: Storage = DEFAULT_STORAGE) -> None:
    """Make the version that was champion before this one the champion again."""
    store = open_store(storage)
    champion = pipeline.registry.roll_back(store, model)
    refresh_index(store)
    print(f"champion of {model}: version {champion.version} ({champion.run_id})")


def index(*, storage: Storage = DEFAULT_STORAGE) -> None:
    """Write the page of all runs, index.html in the store, anew. Every run and every change of champion does so."""
    store = open_store(storage)
    if not (store.exists(INDEX) or store.keys("runs") or store.keys("models")):
        raise DataError(f"no run yet: {store}")
    write_index(store)
    print(store.locate(INDEX))


def verify(url: Published) -> None:
    """Prove a published run: its hashes, that its predictions are the model's, that every figure of accuracy follows
    from them, that all forms of the model agree, and that page and card say what the report says.

    Args:
        url: A run's folder (STORE/runs/ID), a version (STORE/models/NAME/versions/N), a model (STORE/models/NAME: its
            champion) or a store (the champion of lenet).
    """
    doubts = []
    for found in pipeline.verify.verify(url):
        print(found, flush=True)
        doubts += [found.open_to_doubt] if found.open_to_doubt else []
    print(f"verified{', but for ' if doubts else ''}{' and '.join(doubts)}: {url}")


def export(url: Published, output: Path) -> None:
    """Write a published model to a folder: model.safetensors, model.onnx, model.pt2 and its card.

    Args:
        url: Where the model is, as for lenet verify.
        output: Folder to write to.
    """
    place = find_place(url)
    check_version(place)
    for file in copy_run(place.store, place.run_id, output):
        print(f"{place}: {file}")


def reproduce(run_id: str, *, storage: Storage = DEFAULT_STORAGE, ray_address: str | None = None) -> None:
    """Do a run's training again, and say whether the same model came of it, byte for byte.

    Args:
        run_id: The run's id.
        ray_address: Ray cluster to train on: auto or host:port. A local Ray is started if not given.
    """
    with Display(Lasting()):
        found = pipeline.reproduce.reproduce(open_store(storage), run_id, ray_address)
    for difference in found.differences:
        print(f"other than then: {difference}")
    if not found.same:
        raise DataError(
            f"run {run_id}: not reproduced, weights differ by up to {found.largest_difference:.2g} (sha256 "
            f"{found.found_sha256[:12]}… and not {found.expected_sha256[:12]}…); see what was other than then"
        )
    print(f"reproduced: {run_id}, model.safetensors is the same byte for byte, sha256 {found.found_sha256}")


def gc(
    *,
    storage: Storage = DEFAULT_STORAGE,
    older_than_hours: Annotated[float, Parameter(validator=Number(gte=0, lte=876_000))] = 24,
    delete: bool = False,
) -> None:
    """List what publishers and others that were killed have left in the store; with --delete, remove it.

    Args:
        older_than_hours: A run, version or dataset that anything was written of since is left alone: somebody may be
            at work on it.
        delete: Remove what is listed.
    """
    store = open_store(storage)
    strays = find_strays(store, timedelta(hours=older_than_hours))
    for stray in strays:
        print(f"{store.locate(stray.key)}  {stray.modified:%Y-%m-%d %H:%M} UTC  {stray.why}")
    if delete:
        strays = remove(store, strays)
    print(f"{len(strays)} {'stray' if len(strays) == 1 else 'strays'}{' removed' if delete else ''}")


@with_parameters(RetentionConfig, option)
def retention(**parameters: Any) -> None:
    """List old runs that are no version of a model, and the checkpoints and copies of other old ones; with --delete,
    remove them. Versions, champions and datasets stay."""
    plan = pipeline.retention.retain(config_of(parameters, RetentionConfig))
    for row in plan.table():
        print(f"{row['run']}  {row['what']}  {row['MiB']} MiB  {row['why']}")
    print(plan)
