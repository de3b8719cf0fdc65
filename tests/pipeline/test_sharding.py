"""Proves that a source becomes the same shards however it is cut up, in threads or on Ray, in one go or in two."""

import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import run_on_ray
from pipeline.errors import DataError
from pipeline.placement import ClusterConfig
from pipeline.sharding import (
    Part,
    ShardConfig,
    ShardTask,
    plan_shards,
    plan_splits,
    run_in_threads,
    write_shard,
    write_shards,
)
from pipeline.shards import Manifest, find_manifest, read_rows, verify_shards
from pipeline.source import Source
from pipeline.storage import LocalStore, Store, open_store, sha256

if TYPE_CHECKING:
    from tests.conftest import Splits

MakeSource = Callable[[Path, "Splits"], Source]
CONFIG = ShardConfig(shard_mib=0.05)


@given(rows=st.integers(1, 10**7), shard_mib=st.floats(0.1, 1024))
def test_shards_lie_end_to_end_and_keep_to_the_target(rows: int, shard_mib: float) -> None:
    ranges = plan_shards(rows, 784, ShardConfig(shard_mib=shard_mib))
    assert (ranges[0][0], ranges[-1][1]) == (0, rows)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    sizes = {stop - start for start, stop in ranges}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    # One image more than the target at most, and no more shards than that takes.
    assert max(sizes) * 784 <= shard_mib * 2**20 + 784
    assert len(ranges) == min(rows, max(1, math.ceil(rows * 784 / (shard_mib * 2**20))))


def test_too_many_shards_are_refused() -> None:
    with pytest.raises(DataError, match=r"^200,000 images make 200,000 shards of shard_mib=1e-06; use larger ones$"):
        plan_shards(200_000, 784, ShardConfig(shard_mib=1e-6))


def test_the_hold_out_is_stratified_and_leaves_the_rest(fashion_mnist: Source) -> None:
    splits = plan_splits(fashion_mnist, ShardConfig(validation_fraction=0.1))
    assert {split: (source, len(rows)) for split, (source, rows) in splits.items()} == {
        "test": ("test", 10_000),
        "validation": ("train", 6_000),
        "train": ("train", 54_000),
    }
    labels = fashion_mnist.labels("train")
    assert np.bincount(labels[splits["validation"][1]]).tolist() == [600] * 10
    both = np.concatenate([splits["validation"][1], splits["train"][1]])
    assert np.array_equal(np.sort(both), np.arange(60_000))


def test_a_validation_split_holds_the_images_it_names(small_source: Source, store: Store) -> None:
    manifest = write_shards(store, small_source, ShardConfig(shard_mib=0.05, validation_fraction=0.25))
    assert list(manifest.splits) == ["train", "validation", "test"]
    for split, (source_split, rows) in plan_splits(small_source, ShardConfig(validation_fraction=0.25)).items():
        images, labels = read_rows(store, manifest, split)
        assert np.array_equal(images, small_source.read(source_split, rows))
        assert np.array_equal(labels, small_source.labels(source_split)[rows])


def test_ray_writes_the_same_shards_as_threads(small_source: Source, tmp_path: Path) -> None:
    threads, on_ray = open_store(str(tmp_path / "threads")), open_store(str(tmp_path / "ray"))

    def run(work: Callable[[ShardTask], Part], tasks: Iterable[ShardTask]) -> Iterator[Part]:
        return run_on_ray(ClusterConfig(workers=1, gpu="no"), work, tasks)

    assert write_shards(on_ray, small_source, CONFIG, run) == write_shards(threads, small_source, CONFIG)
    keys = threads.keys("datasets")
    assert on_ray.keys("datasets") == keys
    assert all(on_ray.read(key) == threads.read(key) for key in keys)


@pytest.mark.parametrize("done", [1, 5, 11])
def test_after_a_crash_the_rerun_goes_on_with_the_shards_that_are_missing(
    small_source: Source, store: Store, tmp_path: Path, done: int
) -> None:
    written: list[str] = []

    def crash_after(work: Callable[[ShardTask], Part], tasks: Iterable[ShardTask]) -> Iterator[Part]:
        for task in tasks:
            if len(written) == done:
                raise KeyboardInterrupt
            written.append(task.name)
            yield work(task)

    def watch(work: Callable[[ShardTask], Part], tasks: Iterable[ShardTask]) -> Iterator[Part]:
        for task in tasks:
            stamps[task.name] = stamp(task)
            yield work(task)
            stamps[task.name] = (*stamps[task.name], *stamp(task))

    def stamp(task: ShardTask) -> tuple[object, ...]:
        path = store.path(f"{task.folder}/{task.name}")
        return (store.fs.modified(path),) if store.fs.exists(path) else (None,)

    stamps: dict[str, tuple[object, ...]] = {}
    with pytest.raises(KeyboardInterrupt):
        write_shards(store, small_source, CONFIG, crash_after)
    (folder,) = {"/".join(key.split("/")[:3]) for key in store.keys("datasets")}
    assert find_manifest(store, folder) is None
    manifest = write_shards(store, small_source, CONFIG, watch)
    assert {name for name, (before, after) in stamps.items() if before == after} == set(written)
    verify_shards(store, manifest)
    assert manifest == write_shards(open_store(str(tmp_path / "undisturbed")), small_source, CONFIG)
    assert not [key for key in store.keys("datasets") if "/parts/" in key]


def test_a_receipt_whose_shard_is_damaged_or_gone_counts_for_nothing(small_source: Source, local_store: Store) -> None:
    def crash_at_the_end(work: Callable[[ShardTask], Part], tasks: Iterable[ShardTask]) -> Iterator[Part]:
        yield from map(work, tasks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(local_store, small_source, CONFIG, crash_at_the_end)
    shards = [key for key in local_store.keys("datasets") if key.endswith(".parquet")]
    local_store.put(shards[0], b"torn")
    local_store.delete(shards[2])
    receipts = [key for key in local_store.keys("datasets") if key.endswith(".json")]
    local_store.put(receipts[1], b"torn")
    verify_shards(local_store, write_shards(local_store, small_source, CONFIG))


def test_runs_that_shard_the_same_at_once_all_succeed(small_source: Source, store: Store) -> None:
    """Whoever is first removes the receipts while the others look for theirs."""
    for shard_mib in (0.05, 0.06, 0.07, 0.08) if isinstance(store, LocalStore) else (0.05,):
        config = ShardConfig(shard_mib=shard_mib)
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(write_shards, open_store(store.url), small_source, config) for _ in range(4)]
        manifests = [run.result() for run in runs]
        assert manifests.count(manifests[0]) == 4
        verify_shards(store, manifests[0])


def test_a_published_shard_is_not_written_again(small_source: Source, local_store: Store) -> None:
    """Another release may pack the same rows otherwise; a run that comes late must not change what is published."""
    seen: list[ShardTask] = []

    def watch(work: Callable[[ShardTask], Part], tasks: Iterable[ShardTask]) -> Iterator[Part]:
        for task in tasks:
            seen.append(task)
            yield work(task)

    write_shards(local_store, small_source, CONFIG, watch)
    task = seen[-1]
    key = f"{task.folder}/{task.name}"
    otherwise = pa.BufferOutputStream()
    pq.write_table(pq.read_table(pa.BufferReader(local_store.read(key))), otherwise, compression="zstd")
    packed = bytes(otherwise.getvalue())
    local_store.put(key, packed)
    assert write_shard(task).shard.sha256 == sha256(packed)
    assert local_store.read(key) == packed


def test_receipts_that_stay_are_no_failure(
    small_source: Source, local_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", fail)
    verify_shards(local_store, write_shards(local_store, small_source, CONFIG))
    assert "Directory not empty" in caplog.text


def test_images_that_are_all_of_one_grey_are_refused(
    small_splits: "Splits", make_source: MakeSource, tmp_path: Path, local_store: Store
) -> None:
    images, labels = small_splits["train"]
    source = make_source(tmp_path / "idx", {**small_splits, "train": (np.full_like(images, 7), labels)})
    with pytest.raises(DataError, match=r"^fashion-mnist: all pixels to train on have the same value; "):
        write_shards(local_store, source, CONFIG)


def test_the_report_says_what_the_data_are_like(fashion_mnist: Source, local_store: Store) -> None:
    report = write_shards(local_store, fashion_mnist, ShardConfig()).report
    pixels = fashion_mnist.read("train", np.arange(60_000)) / np.float64(255)
    assert report.class_counts == {"test": (1000,) * 10, "train": (6000,) * 10}
    assert report.pixel_mean == pytest.approx(pixels.mean(), rel=1e-12)
    assert report.pixel_std == pytest.approx(pixels.std(), rel=1e-12)
    train = {image.tobytes() for image in fashion_mnist.read("train", np.arange(60_000))}
    again = sum(image.tobytes() in train for image in fashion_mnist.read("test", np.arange(10_000)))
    assert report.duplicates == {"test": again}


def test_duplicates_are_counted_by_content_and_told_of(
    small_splits: "Splits", make_source: MakeSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = small_splits["train"]
    test = (np.concatenate([images[:5], images[:2], small_splits["test"][0][:3]]), labels[:10])
    source = make_source(tmp_path / "idx", {"train": (images, labels), "test": test})
    config = ShardConfig(shard_mib=0.05, validation_fraction=0)
    assert write_shards(open_store(str(tmp_path / "s")), source, config).report.duplicates == {"test": 7}
    assert re.search(r": of \d+ test images 7 are training images too, pixel by pixel; to know", caplog.text)


def test_a_class_without_training_images_is_named(
    small_splits: "Splits", make_source: MakeSource, tmp_path: Path, local_store: Store
) -> None:
    images, labels = small_splits["train"]
    kept = labels != 3
    source = make_source(tmp_path / "idx", {**small_splits, "train": (images[kept], labels[kept])})
    with pytest.raises(DataError, match=r"^fashion-mnist: class 'Dress' has no training image"):
        write_shards(local_store, source, CONFIG)
    assert not [key for key in local_store.keys("datasets") if key.endswith("manifest.json")]


def test_tasks_are_few_at_a_time(small_source: Source, local_store: Store) -> None:
    begun: list[ShardTask] = []

    def watched(tasks: Iterable[ShardTask]) -> Iterator[ShardTask]:
        for task in tasks:
            begun.append(task)
            yield task

    def run(work: Callable[[ShardTask], Part], tasks: Iterable[ShardTask]) -> Iterator[Part]:
        for number, part in enumerate(run_in_threads(work, watched(tasks)), start=1):
            assert len(begun) - number <= 5
            yield part
        begun.clear()

    manifest: Manifest = write_shards(local_store, small_source, ShardConfig(shard_mib=0.01), run)
    assert len(manifest.splits["train"]) == 45
