"""Proves that both loaders give every rank exactly its slices of the order, from any step, and read little for it."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenet.augment import Augment, augment
from pipeline import loader
from pipeline.errors import DataError
from pipeline.loader import Batch, LoadConfig, Loading, Place, augmented, choose_loading, open_loader
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest
from pipeline.source import Source
from pipeline.storage import Store, open_store

LOADINGS: tuple[Loading, ...] = ("resident", "streaming")
Full = tuple[Store, Manifest]


@pytest.fixture(scope="module")
def full(fashion_mnist: Source, tmp_path_factory: pytest.TempPathFactory) -> Full:
    """All real images, in 24 shards of train."""
    store = open_store(str(tmp_path_factory.mktemp("full")))
    return store, write_shards(store, fashion_mnist, ShardConfig(shard_mib=1.9))


@pytest.fixture(scope="module")
def small(small_manifest: Callable[[Store], Manifest], tmp_path_factory: pytest.TempPathFactory) -> Full:
    store = open_store(str(tmp_path_factory.mktemp("small")))
    return store, small_manifest(store)


def batches(
    data: Full,
    loading: Loading,
    rank: int,
    world: int,
    *,
    size: int = 256,
    seed: int = 0,
    epoch: int = 1,
    first: int = 0,
) -> list[Batch]:
    place = Place(*data, "train", seed, size, rank, world, torch.device("cpu"))
    return list(open_loader(loading, place).batches(epoch, first))


def global_rows(parts: list[list[Batch]]) -> list[list[int]]:
    """Row numbers of each global batch, from the batches of every rank."""
    return [[int(row) for part in step for row in part.rows] for step in zip(*parts, strict=True)]


@pytest.mark.parametrize("loading", LOADINGS)
def test_on_real_images_the_global_batches_are_the_same_for_any_workers_and_after_a_switch(
    full: Full, full_splits: dict[str, tuple[np.ndarray, np.ndarray]], loading: Loading
) -> None:
    images, labels = full_splits["train"]
    (alone,) = [batches(full, loading, 0, 1)]
    for batch in alone:
        assert np.array_equal(batch.images.numpy(), images[batch.rows.numpy()])
        assert np.array_equal(batch.labels.numpy(), labels[batch.rows.numpy()])
    expected = global_rows([alone])
    assert sorted(row for step in expected for row in step) == list(range(60_000))
    assert {len(step) for step in expected[:-1]} == {256}
    for world in (2, 3, 4):
        assert global_rows([batches(full, loading, rank, world) for rank in range(world)]) == expected
    switched = [
        *global_rows([batches(full, loading, rank, 2) for rank in range(2)])[:50],
        *global_rows([batches(full, loading, 0, 1, first=50)])[:70],
        *global_rows([batches(full, loading, rank, 3, first=120) for rank in range(3)]),
    ]
    assert switched == expected


@settings(max_examples=25)
@given(
    loading=st.sampled_from(LOADINGS), world=st.integers(1, 64), size=st.integers(1, 700), seed=st.integers(0, 99),
    epoch=st.integers(1, 9), data=st.data(),
)  # fmt: skip
def test_for_any_sizes_and_start_the_ranks_together_give_the_rest_of_the_epoch(
    small: Full, loading: Loading, world: int, size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, -(-600 // size)))
    whole = global_rows([batches(small, loading, 0, 1, size=size, seed=seed, epoch=epoch)])
    parts = [batches(small, loading, r, world, size=size, seed=seed, epoch=epoch, first=first) for r in range(world)]
    assert global_rows(parts) == whole[first:]
    assert sorted(row for step in whole for row in step) == list(range(600))
    assert all(batch.size == len(rows) for part in parts for batch, rows in zip(part, whole[first:], strict=True))


@pytest.mark.parametrize("at_once", [0, 100, 1000])
@pytest.mark.parametrize("loading", LOADINGS)
def test_however_many_are_augmented_at_once_the_batches_are_the_same(
    small: Full, loading: Loading, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loader.AUGMENTED_AT_ONCE, "cpu", at_once)
    plain = batches(small, loading, 1, 3, size=100)
    config = Augment(shift=2, rotate=10)
    for batch, found in zip(plain, augmented(iter(plain), config, 7, 2), strict=True):
        assert torch.equal(found.images, augment(batch.images, batch.rows, config, 7, 2))
        assert not torch.equal(found.images, batch.images)
        assert torch.equal(found.rows, batch.rows)
        assert torch.equal(found.labels, batch.labels)
        assert found.size == batch.size
    assert list(augmented(iter(plain), Augment(), 7, 2)) == plain


@pytest.mark.parametrize("loading", LOADINGS)
def test_epochs_and_seeds_differ(small: Full, loading: Loading) -> None:
    orders = {
        tuple(global_rows([batches(small, loading, 0, 1, seed=seed, epoch=epoch)])[0])
        for seed in (0, 1)
        for epoch in (1, 2)
    }
    assert len(orders) == 4


def test_a_streamed_batch_mixes_images_from_all_over(full: Full) -> None:
    shards = full[1].splits["train"]
    edges = np.cumsum([shard.rows for shard in shards])
    for batch in batches(full, "streaming", 0, 1)[:20]:
        assert len(np.unique(np.searchsorted(edges, batch.rows.numpy(), side="right"))) >= 14
        counts = np.bincount(batch.labels.numpy(), minlength=10)
        assert counts.min() >= 8  # 25.6 of each are expected, with a standard deviation of 4.8


def test_each_worker_streams_only_what_it_needs_and_few_shards_at_a_time(
    full: Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read_shard = loader.read_shard

    def counted(store: Store, manifest: Manifest, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        reads.append(number)
        return read_shard(store, manifest, split, number)

    monkeypatch.setattr(loader, "read_shard", counted)
    batches(full, "streaming", 0, 4)
    # A quarter of 24 shards, and one more for each of its 4 lanes that begins in the middle of one.
    assert len(reads) <= 24 / 4 + 4 + 1
    reads.clear()
    stream = open_loader("streaming", Place(*full, "train", 0, 256, 0, 4, torch.device("cpu"))).batches(1)
    next(stream)
    assert len(reads) <= 4 + loader.READ_AHEAD + 1
    stream.close()  # type: ignore[attr-defined]


def test_a_stream_that_is_not_read_to_its_end_leaves_no_thread(full: Full) -> None:
    stream = open_loader("streaming", Place(*full, "train", 0, 256, 0, 1, torch.device("cpu"))).batches(1)
    next(stream)
    del stream
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("read-ahead"):
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_a_shard_lost_in_mid_epoch_is_named(small_manifest: Callable[[Store], Manifest], tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = small_manifest(store)
    lost = f"{manifest.folder}/{manifest.splits['train'][2].name}"
    store.delete(lost)
    with pytest.raises(DataError, match="shard is missing") as raised:
        batches((store, manifest), "streaming", 0, 1)
    assert store.locate(lost) in str(raised.value)


@pytest.mark.parametrize(
    ("loading", "budget", "chosen"),
    [("auto", 45, "resident"), ("auto", 44, "streaming"), ("resident", 1, "resident"), ("streaming", 99, "streaming")],
)
def test_the_budget_decides_unless_told_otherwise(full: Full, loading: str, budget: int, chosen: str) -> None:
    config = LoadConfig.model_validate({"loading": loading, "memory_budget_mib": budget})
    assert choose_loading(full[1], config) == chosen  # 60,000 images are 44.9 MiB
