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
from pipeline.errors import StorageError
from pipeline.sharding import ShardConfig, dataset_folder, write_shards
from pipeline.shards import (
    Manifest,
    Shard,
    decode_shard,
    encode_shard,
    find_manifest,
    overlapping,
    pick_rows,
    read_rows,
    require_manifest,
    verify_shards,
)
from pipeline.source import Source
from pipeline.storage import Store, open_store, sha256
from tests.conftest import refusal

if TYPE_CHECKING:
    from tests.conftest import Splits

Write = Callable[[Store], Manifest]


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


def test_all_70000_real_images_come_back_exactly(
    fashion_mnist: Source, full_splits: "Splits", local_store: Store
) -> None:
    manifest = write_shards(local_store, fashion_mnist, ShardConfig())
    assert {split: manifest.rows(split) for split in manifest.splits} == {"train": 60_000, "test": 10_000}
    assert [len(manifest.splits[split]) for split in ("train", "test")] == [6, 1]
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


@given(rows=st.lists(st.integers(0, 599), max_size=20))
def test_any_rows_are_those_rows(sharded: tuple[Store, Manifest], small_splits: "Splits", rows: list[int]) -> None:
    images, labels = pick_rows(*sharded, "train", rows)
    assert np.array_equal(images, small_splits["train"][0][rows])
    assert np.array_equal(labels, small_splits["train"][1][rows])


def test_other_programs_can_read_the_shards(sharded: tuple[Store, Manifest], small_splits: "Splits") -> None:
    store, manifest = sharded
    tables = [pq.read_table(store.path(shard_key(manifest, index)), filesystem=store.arrow) for index in range(4)]
    table = pa.concat_tables(tables)
    assert {column.name: str(column.type) for column in table.schema} == manifest.columns
    assert table["row_id"].to_pylist() == list(range(600))
    assert table["image"][599].as_py() == small_splits["train"][0][599].tobytes()


def test_the_smallest_shards_hold_an_image_each(
    local_store: Store, small_splits: "Splits", make_source: Callable[..., Source], tmp_path: Path
) -> None:
    few = {split: (images[:30], labels[:30]) for split, (images, labels) in small_splits.items()}
    manifest = write_shards(local_store, make_source(tmp_path / "few", few), ShardConfig(shard_mib=1e-6))
    assert [shard.rows for shard in manifest.splits["train"]] == [1] * 30
    assert np.array_equal(read_rows(local_store, manifest, "train")[0], few["train"][0])


@given(rows=st.lists(st.integers(1, 4), min_size=1, max_size=10), data=st.data())
def test_overlapping_names_exactly_the_shards_that_hold_the_rows(rows: list[int], data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, sum(rows))] * 2)))
    made = [Shard(name=f"train-{i:05d}-of-00010.parquet", rows=n, bytes=1, sha256="") for i, n in enumerate(rows)]
    holders = [(i, sum(rows[:i])) for i, count in enumerate(rows) for _ in range(count)]  # one for each row
    assert list(overlapping(tuple(made), start, stop)) == list(dict.fromkeys(holders[start:stop]))


# The same input, the same bytes.


def test_the_same_images_give_the_same_bytes_in_any_store(
    small_manifest: Write, local_store: Store, s3_store: Store
) -> None:
    manifest = small_manifest(local_store)
    assert small_manifest(s3_store) == manifest
    keys = local_store.keys(manifest.folder)
    assert s3_store.keys(manifest.folder) == keys
    assert len(keys) == 4 + 2 + 1
    assert all(local_store.read(key) == s3_store.read(key) for key in keys)


def test_the_folder_is_named_by_what_the_dataset_is_made_of(sharded: tuple[Store, Manifest]) -> None:
    manifest = sharded[1]
    name, made_of = manifest.dataset, manifest.made_of
    assert manifest.folder == dataset_folder(name, made_of, {}, ShardConfig(shard_mib=0.125))
    whole = [dataset_folder(name, made_of, {}, ShardConfig.model_construct(shard_mib=mib)) for mib in (8, 8.0)]
    assert whole[0] == whole[1] == dataset_folder(name, made_of, {}, ShardConfig())
    others = [
        dataset_folder("other", made_of, {}, ShardConfig(shard_mib=0.125)),
        dataset_folder(name, {**made_of, "more": "sha256:0"}, {}, ShardConfig(shard_mib=0.125)),
        dataset_folder(name, made_of, {"image_size": 32}, ShardConfig(shard_mib=0.125)),
        dataset_folder(name, made_of, {}, ShardConfig(shard_mib=0.25)),
        dataset_folder(name, made_of, {}, ShardConfig(shard_mib=0.125, validation_fraction=0.1)),
    ]
    assert len({manifest.folder, *others}) == 6


def test_other_images_give_another_digest(
    small_splits: "Splits", sharded: tuple[Store, Manifest], local_store: Store, make_source: Callable[..., Source],
    tmp_path: Path,
) -> None:  # fmt: skip
    images, labels = small_splits["train"]
    other = make_source(tmp_path / "other", {**small_splits, "train": (images[::-1], labels[::-1])})
    assert write_shards(local_store, other, ShardConfig(shard_mib=0.125)).digest != sharded[1].digest


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
    store: Store, small_manifest: Write, step: str, sharded: tuple[Store, Manifest]
) -> None:
    def crash(*_: object) -> bool:
        raise StorageError("power cut")

    folder = sharded[1].folder
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


def test_a_store_that_fails_is_not_said_to_miss_a_shard(
    local_store: Store, small_manifest: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = small_manifest(local_store)

    def fail(key: str) -> bytes:
        raise StorageError(f"{key}: the disk is broken")

    monkeypatch.setattr(local_store, "read", fail)
    assert refusal(lambda: verify_shards(local_store, manifest), StorageError).endswith("the disk is broken")


def test_every_shard_is_verified(local_store: Store, small_manifest: Write) -> None:
    manifest = small_manifest(local_store)
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
    message = refusal(lambda: read_rows(local_store, with_shard(manifest, 1, sink.getvalue()), "train"))
    assert f"{shard_key(manifest)}: its columns are x int64, not row_id uint32, image fixed_size_binary[784]" in message


def test_a_shard_of_another_number_of_rows_is_refused(
    local_store: Store, small_manifest: Write, small_splits: "Splits"
) -> None:
    manifest = small_manifest(local_store)
    data = encode_shard(small_splits["train"][0][:7], small_splits["train"][1][:7], np.arange(150, 157))
    local_store.put(shard_key(manifest), data)
    message = refusal(lambda: read_rows(local_store, with_shard(manifest, 1, data), "train"))
    assert f"{shard_key(manifest)}: 7 rows, the manifest says 150; " in message


@pytest.mark.parametrize("cut", [0, 3, 100, -1, -8])
def test_bytes_that_are_not_parquet_are_refused(small_splits: "Splits", cut: int) -> None:
    data = encode_shard(*(array[:10] for array in small_splits["train"]), np.arange(10))
    assert refusal(lambda: decode_shard(data[:cut], (28, 28))).startswith("not a Parquet file (")


def test_a_parquet_file_broken_inside_is_refused(small_splits: "Splits") -> None:
    data = bytearray(encode_shard(*(array[:10] for array in small_splits["train"]), np.arange(10)))
    images = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(1)
    data[images.data_page_offset] ^= 1  # their first page's header
    assert refusal(lambda: decode_shard(bytes(data), (28, 28))).startswith("not a Parquet file (")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"not json", "not a manifest (Expecting value"),
        (b"\xff\xfe", "not a manifest ("),
        (b"", "not a manifest (Expecting value"),
        (b"[]", "not a manifest ("),
        (b'{"format_version": 1}', "not a manifest ("),
        (b'{"format_version": 3, "other": "layout"}', "format 3, this release reads up to 2; upgrade lenet-pipeline"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(local_store: Store, content: bytes, complaint: str) -> None:
    local_store.put("d/manifest.json", content)
    message = refusal(lambda: find_manifest(local_store, "d"))
    assert message.startswith(f"{local_store.locate('d/manifest.json')}: {complaint}")
    assert "; upgrade" in message or message.endswith(f"; delete {local_store.locate('d')} and run again to rebuild it")


@pytest.mark.parametrize("field", ["dataset", "folder", "classes", "made_of", "splits", "report"])
def test_an_edited_manifest_is_refused(local_store: Store, small_manifest: Write, field: str) -> None:
    manifest = small_manifest(local_store)
    content = json.loads(manifest.model_dump_json())
    report = {**content["report"], "pixel_mean": 0.5}
    edits = {"dataset": "mnist", "folder": "x", "classes": ["a"], "made_of": {}, "splits": {}, "report": report}
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
    assert sharded[1].format_version == shards.FORMAT_VERSION == 2


# The wrong images, labels and nulls.


def written(images: pa.Array, labels: pa.Array) -> bytes:
    sink = io.BytesIO()
    rows = pa.array(range(len(labels)), pa.uint32())
    pq.write_table(pa.table({"row_id": rows, "image": images, "label": labels}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (written(pa.array([b"x" * 100] * 2, pa.binary(100)), pa.array([1, 2], pa.uint8())), "fixed_size_binary[100]"),
        (written(pa.array([b"x" * 784] * 2, pa.binary(784)), pa.array([1, 2], pa.int64())), "label int64"),
        (written(pa.array([b"x" * 784, None], pa.binary(784)), pa.array([1, 2], pa.uint8())), "it holds nulls"),
        (written(pa.array([b"x" * 784] * 2, pa.binary(784)), pa.array([1, None], pa.uint8())), "it holds nulls"),
    ],
)
def test_a_shard_that_holds_something_else_is_refused(data: bytes, complaint: str) -> None:
    assert complaint in refusal(lambda: decode_shard(data, (28, 28)))


def test_a_label_outside_the_classes_is_refused(local_store: Store, small_manifest: Write) -> None:
    manifest = small_manifest(local_store)
    data = written(pa.array([b"x" * 784] * 150, pa.binary(784)), pa.array([10] * 150, pa.uint8()))
    local_store.put(shard_key(manifest), data)
    assert "label 10 of 10 classes" in refusal(lambda: read_rows(local_store, with_shard(manifest, 1, data), "train"))
