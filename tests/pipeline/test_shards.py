"""Proves that shards give back exactly the pixels that went in, the same bytes every time, and refuse any damage."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import shards
from pipeline.catalog import FASHION_MNIST
from pipeline.errors import DataError, StorageError
from pipeline.shards import (
    Manifest,
    Shard,
    ShardConfig,
    dataset_folder,
    decode_shard,
    encode_shard,
    find_manifest,
    overlapping,
    read_rows,
    require_manifest,
    verify_shards,
    write_shards,
)
from pipeline.storage import Store, open_store, sha256

if TYPE_CHECKING:
    from tests.conftest import Splits

Write = Callable[[Store], Manifest]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    return message


def shard_key(manifest: Manifest, index: int = 1) -> str:
    return f"{manifest.folder}/{manifest.splits['train'][index].name}"


def with_shard(manifest: Manifest, index: int, data: bytes) -> Manifest:
    """The manifest as if shard `index` of train had been written with other bytes on purpose."""
    changed = list(manifest.splits["train"])
    changed[index] = changed[index].model_copy(update={"bytes": len(data), "sha256": sha256(data)})
    return manifest.model_copy(update={"splits": {**manifest.splits, "train": tuple(changed)}})


@pytest.fixture(scope="module")
def sharded(small_manifest: Write, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    """A store with the small splits, which no test changes."""
    store = open_store(str(tmp_path_factory.mktemp("sharded")))
    return store, small_manifest(store)


# What comes back.


def test_all_70000_real_images_come_back_exactly(full_splits: "Splits", local_store: Store) -> None:
    manifest = write_shards(local_store, FASHION_MNIST, full_splits, ShardConfig())
    assert {split: manifest.rows(split) for split in manifest.splits} == {"train": 60_000, "test": 10_000}
    assert len(manifest.splits["train"]) == 8
    for split, (images, labels) in full_splits.items():
        read_images, read_labels = read_rows(local_store, manifest, split)
        assert np.array_equal(read_images, images)
        assert np.array_equal(read_labels, labels)


def test_both_kinds_of_store_give_back_the_images(store: Store, small_manifest: Write, small_splits: "Splits") -> None:
    manifest = small_manifest(store)
    for split, (images, labels) in small_splits.items():
        read_images, read_labels = read_rows(store, manifest, split)
        assert np.array_equal(read_images, images)
        assert np.array_equal(read_labels, labels)


@given(ends=st.tuples(st.integers(0, 600), st.integers(0, 600)))
def test_any_range_of_rows_is_that_slice(
    sharded: tuple[Store, Manifest], small_splits: "Splits", ends: tuple[int, int]
) -> None:
    start, stop = sorted(ends)
    images, labels = read_rows(*sharded, "train", start, stop)
    assert np.array_equal(images, small_splits["train"][0][start:stop])
    assert np.array_equal(labels, small_splits["train"][1][start:stop])


def test_other_programs_can_read_the_shards(sharded: tuple[Store, Manifest], small_splits: "Splits") -> None:
    store, manifest = sharded
    tables = [pq.read_table(store.path(shard_key(manifest, index)), filesystem=store.arrow) for index in range(4)]
    table = pa.concat_tables(tables)
    assert {column.name: str(column.type) for column in table.schema} == manifest.columns
    assert table["row_id"].to_pylist() == list(range(600))
    assert table["image"][599].as_py() == small_splits["train"][0][599].tobytes()


def test_more_shards_than_rows_lose_nothing(local_store: Store, small_splits: "Splits") -> None:
    few = {split: (images[:3], labels[:3]) for split, (images, labels) in small_splits.items()}
    manifest = write_shards(local_store, FASHION_MNIST, few, ShardConfig(shards=5))
    assert [shard.rows for shard in manifest.splits["train"]] == [0, 1, 0, 1, 1]
    assert np.array_equal(read_rows(local_store, manifest, "train")[0], few["train"][0])


@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=10), data=st.data())
def test_overlapping_names_exactly_the_shards_that_hold_the_rows(rows: list[int], data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, sum(rows))] * 2)))
    made = [Shard(name=f"train-{i:05d}-of-00010.parquet", rows=n, bytes=0, sha256="") for i, n in enumerate(rows)]
    holders = [(sum(rows[:i]), made[i]) for i, count in enumerate(rows) for _ in range(count)]  # one for each row
    expected = list(dict.fromkeys((first, shard.name) for first, shard in holders[start:stop]))
    assert [(first, shard.name) for first, shard in overlapping(tuple(made), start, stop)] == expected


# The same input, the same bytes.


def test_the_same_images_give_the_same_bytes_in_any_store(
    small_manifest: Write, local_store: Store, s3_store: Store
) -> None:
    manifest = small_manifest(local_store)
    assert small_manifest(s3_store) == manifest
    keys = local_store.keys(manifest.folder)
    assert s3_store.keys(manifest.folder) == keys
    assert len(keys) == 4 + 4 + 1
    assert all(local_store.read(key) == s3_store.read(key) for key in keys)


def test_the_folder_is_named_by_what_the_dataset_is_made_of(sharded: tuple[Store, Manifest]) -> None:
    assert sharded[1].folder == dataset_folder(FASHION_MNIST, ShardConfig(shards=4))
    assert sharded[1].folder != dataset_folder(FASHION_MNIST, ShardConfig(shards=5))


def test_other_images_give_another_digest(
    small_splits: "Splits", sharded: tuple[Store, Manifest], local_store: Store
) -> None:
    images, labels = small_splits["train"]
    other = {**small_splits, "train": (images[::-1], labels[::-1])}
    assert write_shards(local_store, FASHION_MNIST, other, ShardConfig(shards=4)).digest != sharded[1].digest


def test_sharding_again_writes_nothing(store: Store, small_manifest: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = small_manifest(store)

    def forbidden(*_: object) -> None:
        raise AssertionError("a second sharding wrote to the store")

    monkeypatch.setattr(store, "put", forbidden)
    monkeypatch.setattr(store, "create", forbidden)
    assert small_manifest(store) == manifest


def test_sharding_again_leaves_every_file_as_it_was(small_manifest: Write, tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    store = open_store(str(tmp_path))
    small_manifest(store)
    before = times()
    small_manifest(store)
    assert times() == before


# Crashes.


@pytest.mark.parametrize("step", ["put", "create"])
def test_after_a_crash_there_is_no_dataset_until_a_rerun_completes_it(
    store: Store, small_manifest: Write, step: str
) -> None:
    def crash(*_: object) -> bool:
        raise StorageError("power cut")

    folder = dataset_folder(FASHION_MNIST, ShardConfig(shards=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, step, crash)
        with pytest.raises(StorageError, match="power cut"):
            small_manifest(store)
    assert find_manifest(store, folder) is None
    assert refusal(lambda: require_manifest(store, folder)) == (
        f"{store.locate(folder)}: holds no manifest; shard the dataset first"
    )
    manifest = small_manifest(store)
    assert require_manifest(store, folder) == manifest
    verify_shards(store, manifest)


# Damage.


def test_a_flipped_byte_is_refused(local_store: Store, small_manifest: Write) -> None:
    manifest = small_manifest(local_store)
    data = bytearray(local_store.read(shard_key(manifest)))
    data[len(data) // 2] ^= 1
    local_store.put(shard_key(manifest), bytes(data))
    where, remedy = local_store.locate(shard_key(manifest)), local_store.locate(manifest.folder)
    expected = (
        f"{where}: shard is altered, its sha256 is not the manifest's; delete {remedy} and run again to rebuild it"
    )
    assert refusal(lambda: verify_shards(local_store, manifest)) == expected
    assert refusal(lambda: read_rows(local_store, manifest, "train")) == expected
    read_rows(local_store, manifest, "train", 0, 150)  # the first shard is whole


def test_a_truncated_shard_is_refused(local_store: Store, small_manifest: Write) -> None:
    manifest = small_manifest(local_store)
    local_store.put(shard_key(manifest), local_store.read(shard_key(manifest))[:-1])
    assert f"{shard_key(manifest)}: shard is altered" in refusal(lambda: verify_shards(local_store, manifest))


def test_a_missing_shard_is_refused(store: Store, small_manifest: Write) -> None:
    manifest = small_manifest(store)
    store.delete(shard_key(manifest))
    message = refusal(lambda: verify_shards(store, manifest))
    assert message.startswith(f"{store.locate(shard_key(manifest))}: shard is missing; delete {store.locate('')}")


def test_every_shard_is_verified_the_empty_ones_too(local_store: Store, small_splits: "Splits") -> None:
    few = {split: (images[:3], labels[:3]) for split, (images, labels) in small_splits.items()}
    manifest = write_shards(local_store, FASHION_MNIST, few, ShardConfig(shards=5))
    for split in ("train", "test"):
        for shard in manifest.splits[split]:
            key = f"{manifest.folder}/{shard.name}"
            data = local_store.read(key)
            local_store.delete(key)
            assert f"{key}: shard is missing" in refusal(lambda: verify_shards(local_store, manifest))
            local_store.put(key, data)


def test_a_shard_of_other_columns_is_refused(local_store: Store, small_manifest: Write) -> None:
    manifest = small_manifest(local_store)
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": [1, 2]}), sink)
    local_store.put(shard_key(manifest), sink.getvalue())
    message = refusal(lambda: verify_shards(local_store, with_shard(manifest, 1, sink.getvalue())))
    assert f"{shard_key(manifest)}: its columns are x int64, not row_id uint32, image fixed_size_binary[784]" in message


def test_a_shard_of_another_number_of_rows_is_refused(
    local_store: Store, small_manifest: Write, small_splits: "Splits"
) -> None:
    manifest = small_manifest(local_store)
    data = encode_shard(small_splits["train"][0][:7], small_splits["train"][1][:7], first_row=150)
    local_store.put(shard_key(manifest), data)
    message = refusal(lambda: verify_shards(local_store, with_shard(manifest, 1, data)))
    assert f"{shard_key(manifest)}: 7 rows, the manifest says 150; " in message


@pytest.mark.parametrize("cut", [0, 3, 100, -1, -8])
def test_bytes_that_are_not_parquet_are_refused(small_splits: "Splits", cut: int) -> None:
    data = encode_shard(*(array[:10] for array in small_splits["train"]), first_row=0)
    assert refusal(lambda: decode_shard(data[:cut], (28, 28))).startswith("not a Parquet file (")


def test_a_parquet_file_broken_inside_is_refused(small_splits: "Splits") -> None:
    data = bytearray(encode_shard(*(array[:10] for array in small_splits["train"]), first_row=0))
    data[4] ^= 1  # the first page's header, just behind the magic number
    assert refusal(lambda: decode_shard(bytes(data), (28, 28))).startswith("not a Parquet file (")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"not json", "not a manifest (Expecting value"),
        (b"\xff\xfe", "not a manifest ("),
        (b"", "not a manifest (Expecting value"),
        (b"[]", "not a manifest ("),
        (b'{"format_version": 1}', "not a manifest ("),
        (b'{"format_version": 2, "other": "layout"}', "format 2, this release reads up to 1; upgrade lenet-pipeline"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(local_store: Store, content: bytes, complaint: str) -> None:
    local_store.put("d/manifest.json", content)
    message = refusal(lambda: find_manifest(local_store, "d"))
    assert message.startswith(f"{local_store.locate('d/manifest.json')}: {complaint}")
    assert "; upgrade" in message or message.endswith(f"; delete {local_store.locate('d')} and run again to rebuild it")


@pytest.mark.parametrize("field", ["dataset", "folder", "classes", "source_sha256", "splits"])
def test_an_edited_manifest_is_refused(local_store: Store, small_manifest: Write, field: str) -> None:
    manifest = small_manifest(local_store)
    content = json.loads(manifest.model_dump_json())
    edits = {"dataset": "mnist", "folder": "elsewhere", "classes": ["a"], "source_sha256": {}, "splits": {}}
    assert set(edits) | {"format_version", "image_shape", "columns", "digest"} == set(content)
    key = f"{manifest.folder}/manifest.json"
    local_store.put(key, json.dumps({**content, field: edits[field]}).encode())
    message = refusal(lambda: require_manifest(local_store, manifest.folder))
    assert message.startswith(f"{local_store.locate(key)}: its digest does not match its content; delete ")


def test_a_shard_outside_its_folder_is_refused(local_store: Store, small_manifest: Write) -> None:
    manifest = small_manifest(local_store)
    content = json.loads(manifest.model_dump_json())
    content["splits"]["train"][0]["name"] = "../../secret.parquet"
    local_store.put(f"{manifest.folder}/manifest.json", json.dumps(content).encode())
    assert "not a manifest" in refusal(lambda: require_manifest(local_store, manifest.folder))


def test_the_format_is_the_one_this_release_writes(sharded: tuple[Store, Manifest]) -> None:
    assert sharded[1].format_version == shards.FORMAT_VERSION == 1
