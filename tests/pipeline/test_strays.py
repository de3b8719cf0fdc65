"""Proves that a publisher may die at any write: readers see the old or the new, a rerun completes it, and what it left
is found and nothing else."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lenet.model import LeNet
from pipeline.promotion import PromoteConfig
from pipeline.publish import read_latest, verify_run
from pipeline.registry import find_champion, list_versions, open_model, promote, register
from pipeline.storage import Store, open_store
from pipeline.strays import find_strays, remove

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

NOW = timedelta(0)
RULE = PromoteConfig(max_f1_drop=1, max_ece_rise=1)
# Nine artifacts and the manifest, the pointer to the latest, then version, champion and decision.
WRITES = 14
Trained = Callable[..., "Receipts"]


class Crash(Exception):
    """The publisher's process ends here."""


class Dying:
    """A store that dies at its write of that number, before or after the write is done."""

    def __init__(self, store: Store, write: int, after: bool) -> None:
        self.written = 0
        for name in ("put", "create", "replace"):
            setattr(store, name, self.wrapped(getattr(store, name), write, after))

    def wrapped(self, method: Callable[..., bool], write: int, after: bool) -> Callable[..., bool]:
        def dying(*args: object, **options: object) -> bool:
            if self.written == write and not after:
                raise Crash
            outcome = method(*args, **options)
            self.written += 1
            if self.written == write + 1 and after:
                raise Crash
            return outcome

        return dying


def publish_and_promote(store: Store, left: "Receipts") -> None:
    left.publish(store)
    promote(store, RULE, register(store, "lenet", left.run_id))


def objects(store: Store) -> dict[str, bytes]:
    return {key: store.read(key) for key in store.keys("runs") + store.keys("models")}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("write", range(WRITES))
def test_a_publisher_that_dies_at_any_write_leaves_the_old_or_the_new(
    local_store: Store, trained: Trained, good_models: list[LeNet], write: int, after: bool
) -> None:
    publish_and_promote(local_store, trained(local_store, "old", model=good_models[0]))
    old = objects(local_store)
    left = trained(local_store, "new", model=good_models[3])
    dying = open_store(local_store.url)
    Dying(dying, write, after)
    with pytest.raises(Crash):
        publish_and_promote(dying, left)
    # A reader sees the old champion or the new, whole, and a latest run that is whole.
    assert open_model(local_store.url).run_id in ("old", "new")
    latest = read_latest(local_store)
    assert latest is not None
    verify_run(local_store, latest.run_id)
    for version in list_versions(local_store, "lenet"):
        verify_run(local_store, version.run_id)
    # What it left is known for it, and removing that harms nobody.
    strays = find_strays(local_store, NOW)
    assert {stray.key.split("/")[1] for stray in strays} <= {"new"}
    assert not any(stray.key in old for stray in strays)
    remove(local_store, strays)
    assert find_strays(local_store, NOW) == []
    assert {key: data for key, data in objects(local_store).items() if key in old and "champion" not in key}.keys() == {
        key for key in old if "champion" not in key
    }
    # The same again completes it.
    publish_and_promote(local_store, left)
    assert find_champion(local_store, "lenet").run_id == "new"  # type: ignore[union-attr]
    assert [version.run_id for version in list_versions(local_store, "lenet")] == ["old", "new"]
    assert find_strays(local_store, NOW) == []


def test_there_are_as_many_writes_as_are_tried(local_store: Store, trained: Trained, good_models: list[LeNet]) -> None:
    publish_and_promote(local_store, trained(local_store, "old", model=good_models[0]))
    left = trained(local_store, "new", model=good_models[3])
    counting = open_store(local_store.url)
    counter = Dying(counting, -1, after=False)
    publish_and_promote(counting, left)
    assert counter.written == WRITES


def test_strays_are_what_nothing_points_to(store: Store, trained: Trained) -> None:
    publish_and_promote(store, trained(store, "r"))
    assert find_strays(store, NOW) == []
    whole = objects(store)
    junk = {
        "runs/r/extra.bin": "not in the manifest of run r",
        "runs/gone/model.safetensors": "run gone was not published",
        "models/lenet/versions/9/decision.json": "there is no such version",
        "datasets/mine/0123/train-00000-of-00001.parquet": "dataset mine/0123 was not finished",
        ".probe-1": "a write that broke off",
    }
    for key in junk:
        store.put(key, b"x")
    found = find_strays(store, NOW)
    assert {stray.key: stray.why for stray in found} == junk
    assert find_strays(store, timedelta(hours=1)) == []  # somebody may be at work on what is young
    remove(store, found)
    assert find_strays(store, NOW) == []
    assert objects(store) == whole


def test_a_temporary_file_of_a_killed_writer_is_a_stray(local_store: Store, trained: Trained) -> None:
    publish_and_promote(local_store, trained(local_store, "r"))
    left = Path(local_store.path("runs/r/.model.onnx.123.tmp"))
    left.write_bytes(b"half")
    assert [stray.key for stray in find_strays(local_store, NOW)] == ["runs/r/.model.onnx.123.tmp"]
    remove(local_store, find_strays(local_store, NOW))
    assert not left.exists()
