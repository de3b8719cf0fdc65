"""Proves that a publisher may die at any write: readers see the old or the new, a rerun completes it, and what it left
is found and nothing else."""

import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING

import pytest

from lenet.model import LeNet
from pipeline.promotion import PromoteConfig
from pipeline.publish import LATEST, find_run, read_latest, verify_run
from pipeline.registry import champion_key, find_champion, list_versions, promote, register
from pipeline.served import open_model
from pipeline.storage import Store, open_store
from pipeline.strays import find_strays, remove

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

NOW = timedelta(0)
FINISHED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
RULE = PromoteConfig(max_f1_drop=1, max_ece_rise=1)
# That it is being published, nine artifacts and the manifest, the pointer to the latest, then version, champion and
# decision.
WRITES = 15
Trained = Callable[..., "Receipts"]


class Crash(Exception):
    """The publisher's process ends here."""


class Dying:
    """A store that dies at its write of that number, before or after the write is done."""

    def __init__(self, store: Store, write: int, after: bool) -> None:
        self.written: list[object] = []
        for name in ("put", "create", "replace"):
            setattr(store, name, self.wrapped(getattr(store, name), write, after))

    def wrapped(self, method: Callable[..., bool], write: int, after: bool) -> Callable[..., bool]:
        def dying(*args: object, **options: object) -> bool:
            if len(self.written) == write and not after:
                raise Crash
            outcome = method(*args, **options)
            self.written.append(args[0])
            if len(self.written) == write + 1 and after:
                raise Crash
            return outcome

        return dying


def publish_and_promote(store: Store, left: "Receipts") -> None:
    left.publish(store)
    promote(store, RULE, register(store, "lenet", left.run_id))


def objects(store: Store) -> dict[str, bytes]:
    return {key: store.read(key) for key in store.keys("runs") + store.keys("models")}


@pytest.fixture(scope="module")
def template(
    tmp_path_factory: pytest.TempPathFactory, trained: Trained, good_models: list[LeNet]
) -> tuple[Path, "Receipts"]:
    """A store with a run that is champion, and with all that is needed to publish a better one."""
    store = open_store(str(tmp_path_factory.mktemp("template")))
    publish_and_promote(store, trained(store, "old", model=good_models[0]))
    return Path(store.root), trained(store, "new", FINISHED + timedelta(hours=1), model=good_models[3])


@pytest.fixture
def begun(template: tuple[Path, "Receipts"], local_store: Store) -> "Receipts":
    """The same in a store of the test's own."""
    shutil.copytree(template[0], local_store.root)
    return template[1]


def kept(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without the pointers, which move."""
    return {key: data for key, data in found.items() if key not in (LATEST, champion_key("lenet"))}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("write", range(WRITES))
def test_a_publisher_that_dies_at_any_write_leaves_the_old_or_the_new(
    local_store: Store, begun: "Receipts", write: int, after: bool
) -> None:
    old = objects(local_store)
    dying = open_store(local_store.url)
    counter = Dying(dying, write, after)
    with pytest.raises(Crash):
        publish_and_promote(dying, begun)
    assert len(counter.written) == write + after
    # A reader sees the old champion or the new, whole, and a latest run that is whole.
    assert open_model(local_store.url).run_id in ("old", "new")
    latest, published = read_latest(local_store), "runs/new/manifest.json" in counter.written
    assert latest is not None
    verify_run(local_store, latest.run_id)
    assert (find_run(local_store, "new") is not None) == published
    assert latest.run_id == "old" or published
    if published:
        verify_run(local_store, "new")
    for version in list_versions(local_store, "lenet"):
        verify_run(local_store, version.run_id)
    # What it left is known for it, and removing that harms nobody.
    strays = find_strays(local_store, NOW)
    assert {stray.key.split("/")[1] for stray in strays} <= {"new"}
    assert not any(stray.key in old for stray in strays)
    assert remove(local_store, strays) == strays
    assert find_strays(local_store, NOW) == []
    assert kept(old).items() <= objects(local_store).items()
    # The same again completes it.
    publish_and_promote(local_store, begun)
    assert find_champion(local_store, "lenet").run_id == "new"  # type: ignore[union-attr]
    assert read_latest(local_store).run_id == "new"  # type: ignore[union-attr]
    assert [version.run_id for version in list_versions(local_store, "lenet")] == ["old", "new"]
    assert find_strays(local_store, NOW) == []
    assert kept(old).items() <= objects(local_store).items()


def test_there_are_as_many_writes_as_are_tried(local_store: Store, begun: "Receipts") -> None:
    counting = open_store(local_store.url)
    counter = Dying(counting, -1, after=False)
    publish_and_promote(counting, begun)
    assert len(counter.written) == WRITES


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


def test_nothing_is_a_stray_beside_a_manifest_that_cannot_be_read(
    store: Store, trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    trained(store, "r").publish(store)
    for run_id, manifest in {"damaged": b"{", "copy": store.read("runs/r/manifest.json")}.items():
        store.put(f"runs/{run_id}/manifest.json", manifest)
        store.put(f"runs/{run_id}/extra.bin", b"x")
    store.put("runs/r/extra.bin", b"x")
    assert [stray.key for stray in find_strays(store, NOW)] == ["runs/r/extra.bin"]
    said = [record.getMessage() for record in caplog.records if record.name == "pipeline.strays"]
    assert [line.rpartition("; ")[2] for line in said] == [
        f"so nothing of run {run_id} is taken for a stray" for run_id in ("copy", "damaged")
    ]


def test_a_temporary_file_of_a_killed_writer_is_a_stray(local_store: Store, trained: Trained) -> None:
    publish_and_promote(local_store, trained(local_store, "r"))
    left = Path(local_store.path("runs/r/.model.onnx.123.tmp"))
    left.write_bytes(b"half")
    assert [stray.key for stray in find_strays(local_store, NOW)] == ["runs/r/.model.onnx.123.tmp"]
    remove(local_store, find_strays(local_store, NOW))
    assert not left.exists()


def test_nothing_goes_of_what_somebody_goes_on_with(local_store: Store) -> None:
    """Who goes on leaves what is there as it is, and so as old as it is."""
    for key in (
        "datasets/mine/0123/train-00000-of-00002.parquet",
        "runs/r/model.onnx",
        "models/m/versions/1/decision.json",
    ):
        local_store.put(key, b"x")
        os.utime(local_store.path(key), (0, 0))
    day = timedelta(hours=24)
    assert len(find_strays(local_store, day)) == 3
    for key in ("datasets/mine/0123/parts/1.json", "staging/r/lease.json", "models/m/versions/1/other.json"):
        local_store.put(key, b"x")
    assert find_strays(local_store, day) == []


def test_what_a_publisher_goes_on_with_meanwhile_stays(
    store: Store, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds all artifacts there and writes none of them: the manifest alone would not save what it names."""
    receipts = trained(store, "r")
    receipts.publish(store)
    store.delete("runs/r/manifest.json")
    found, gone = find_strays(store, NOW), []
    assert len(found) == 9
    sleep(1.1)  # S3 tells seconds
    real = store.keep

    def keep(key: str, data: bytes) -> bytes:
        if key == "runs/r/manifest.json":
            gone.extend(remove(open_store(store.url), found))
        return real(key, data)

    monkeypatch.setattr(store, "keep", keep)
    receipts.publish(store)
    assert gone == []
    verify_run(store, "r")


def test_what_something_leads_to_by_now_stays(local_store: Store) -> None:
    led = {
        "datasets/mine/0123/train-00000-of-00001.parquet": "datasets/mine/0123/manifest.json",
        "models/m/versions/1/decision.json": "models/m/versions/1/version.json",
        "runs/r/model.onnx": "runs/r/manifest.json",
    }
    for key in led:
        local_store.put(key, b"x")
    found = find_strays(local_store, NOW)
    assert [stray.key for stray in found] == sorted(led)
    for key in led.values():
        local_store.put(key, b"{}")
    assert remove(local_store, found) == []
    assert set(local_store.keys("")) == {*led, *led.values()}


def test_a_write_that_ends_meanwhile_is_no_stray(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = Path(local_store.path("runs/r/.model.onnx.123.tmp"))
    temporary.parent.mkdir(parents=True)
    temporary.write_bytes(b"half")
    listed = local_store.leftovers()
    assert listed == ["runs/r/.model.onnx.123.tmp"]

    def ended() -> list[str]:
        temporary.unlink()
        return listed

    monkeypatch.setattr(local_store, "leftovers", ended)
    assert "runs/r/.model.onnx.123.tmp" not in {stray.key for stray in find_strays(local_store, NOW)}
