"""Proves that any source is found whole and cut into units that have every image once, whatever holds the pixels."""

import io
import os
import re
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import feed, predict
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.feed import _list, find_feed, read_column, read_unit, source_digest
from pipeline.idx import Pixels
from pipeline.storage import Store

if TYPE_CHECKING:
    from tests.conftest import Splits


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def images(small_splits: "Splits") -> Pixels:
    """Real images uint8 (200, 28, 28)."""
    return small_splits["test"][0]


def png(image: Pixels) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def tensors(images: Pixels) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))


COLUMNS = {
    "binary": lambda images: pa.array([png(image) for image in images]),
    "large_binary": lambda images: pa.array([png(image) for image in images], pa.large_binary()),
    "struct": lambda images: pa.array([{"bytes": png(image), "path": "x"} for image in images]),
    "fixed_size_binary": lambda images: pa.array([image.tobytes() for image in images], pa.binary(784)),
    "list": lambda images: pa.array([image.ravel().tolist() for image in images], pa.list_(pa.uint8())),
    "large_list": lambda images: pa.array([image.ravel().tolist() for image in images], pa.large_list(pa.uint8())),
    "fixed_size_list": lambda images: pa.array([image.ravel().tolist() for image in images], pa.list_(pa.uint8(), 784)),
    "tensor": tensors,
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_kind_of_column_holds_the_same_images(kind: str, images: Pixels, pool: Executor) -> None:
    column = COLUMNS[kind](images[:30])
    found, bad = read_column(column, 28, "auto", pool)
    assert np.array_equal(found, images[:30])
    assert bad == {}
    found, _ = read_column(column[7:20], 28, "auto", pool)
    assert np.array_equal(found, images[7:20])
    empty, _ = read_column(column[:0], 28, "auto", pool)
    assert empty.shape == (0, 28, 28)


@pytest.mark.parametrize("kind", [kind for kind in COLUMNS if kind != "tensor"])
def test_nulls_are_told_of_and_the_others_stay_in_their_places(kind: str, images: Pixels, pool: Executor) -> None:
    column = COLUMNS[kind](images[:6])
    holed = pa.array([None if row in (0, 4) else value for row, value in enumerate(column.to_pylist())], column.type)
    found, bad = read_column(holed, 28, "auto", pool)
    assert bad == {0: "null", 4: "null"}
    assert np.array_equal(found[[1, 2, 3, 5]], images[[1, 2, 3, 5]])
    assert not found[[0, 4]].any()


def test_what_is_no_image_is_told_of(images: Pixels, pool: Executor) -> None:
    column = pa.array([images[0].ravel().tolist(), [1, 2, 3], None], pa.list_(pa.uint8()))
    found, bad = read_column(column, 28, "auto", pool)
    assert bad == {1: "3 pixels, not 28x28", 2: "null"}
    assert np.array_equal(found[0], images[0])
    holed = pa.array([[1, 2, 3], [200] * 783 + [None], images[0].ravel().tolist(), [None] * 784], pa.list_(pa.uint8()))
    found, bad = read_column(holed, 28, "auto", pool)
    assert bad == {0: "3 pixels, not 28x28", 1: "a null pixel", 3: "a null pixel"}
    assert np.array_equal(found[2], images[0])
    assert not found[[0, 1, 3]].any()
    found, bad = read_column(pa.array([b"torn", png(images[1])]), 28, "auto", pool)
    assert bad == {0: "neither PNG nor JPEG"}
    assert np.array_equal(found[1], images[1])


def write(path: Path, images: Pixels, group: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": COLUMNS["fixed_size_binary"](images)}), path, row_group_size=group)


def test_units_are_row_groups_and_have_every_row_once(
    tmp_path: Path, images: Pixels, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "UNIT_PIXELS", 50)
    monkeypatch.setattr(feed, "READ_PIXELS", 17)
    write(tmp_path / "b" / "x.parquet", images[:90], 20)
    write(tmp_path / "a.PARQUET", images[90:], 60)
    write(tmp_path / "none.parquet", images[:0], 60)
    (tmp_path / "notes.txt").write_text("not looked at")
    write(tmp_path / ".hidden" / "x.parquet", images, 60)
    found = find_feed(str(tmp_path), "image", 28)
    assert found.images == 200
    assert [(unit.number, *unit.keys, unit.groups, unit.first_row, unit.rows) for unit in found.units] == [
        (0, "a.PARQUET", (0,), 0, 60),
        (1, "a.PARQUET", (1,), 60, 50),
        (2, "b/x.parquet", (0, 1), 0, 40),
        (3, "b/x.parquet", (2, 3, 4), 40, 50),
    ]
    read = [part for unit in found.units for part in read_unit(found.store, unit, "image", 28, "auto", pool)]
    assert max(len(part.images) for part in read) == 17
    where = {(path, int(row)) for part in read for path, row in zip(part.paths, part.rows, strict=True)}
    assert where == {("a.PARQUET", row) for row in range(110)} | {("b/x.parquet", row) for row in range(90)}
    every = np.concatenate([part.images for part in read])
    assert np.array_equal(every, np.concatenate([images[90:], images[:90]]))


def test_a_row_group_is_not_in_memory_as_a_whole(tmp_path: Path, pool: Executor) -> None:
    count = 50_000  # 39 MB
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(784), count, [None, pa.py_buffer(bytes(count * 784))])
    options = {"row_group_size": count, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"image": column}), tmp_path / "large.parquet", **options)
    found = find_feed(str(tmp_path), "image", 28)
    (unit,) = found.units
    tracemalloc.start()
    try:
        read = [len(part.images) for part in read_unit(found.store, unit, "image", 28, "auto", pool)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(read) == count
    assert peak < 10 * 2**20


def test_pictures_in_units(tmp_path: Path, images: Pixels, pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "UNIT_PICTURES", 4)
    monkeypatch.setattr(feed, "READ_PICTURES", 3)
    for row, name in enumerate(["b.png", "a/z.png", "a.PNG", "a/b.png", "c.png", "d.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(images[row]))
    found = find_feed(f"{tmp_path}/", "image", 28)
    assert [unit.keys for unit in found.units] == [("a/b.png", "a/z.png", "a.PNG", "b.png"), ("c.png", "d.png")]
    read = [part for unit in found.units for part in read_unit(found.store, unit, "image", 28, "auto", pool)]
    assert [len(part.images) for part in read] == [3, 1, 2]
    assert np.array_equal(np.concatenate([part.images for part in read]), images[[3, 1, 2, 0, 4, 5]])
    alone = find_feed(str(tmp_path / "c.png"), "image", 28)
    assert ([unit.keys for unit in alone.units], alone.whole, found.whole) == ([("c.png",)], False, True)
    some = find_feed(f"{tmp_path}/?.png", "image", 28)
    assert [unit.keys for unit in some.units] == [("b.png", "c.png", "d.png")]


def test_no_more_pictures_are_held_than_are_decoded(
    local_store: Store, images: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for row in range(4):
        local_store.put(f"{row}.png", png(images[row]))
    (unit,) = find_feed(local_store.url, "image", 28).units
    events: list[str] = []
    real_read, real_prepare = local_store.read, predict.prepare_picture
    monkeypatch.setattr(local_store, "read", lambda key: events.append("read") or real_read(key))
    monkeypatch.setattr(predict, "prepare_picture", lambda *all_: events.append("decoded") or real_prepare(*all_))
    with ThreadPoolExecutor(1) as pool:
        (part,) = read_unit(local_store, unit, "image", 28, "auto", pool)
    assert np.array_equal(part.images, images[:4])
    assert events == ["read", "decoded"] * 4


def test_what_is_too_large_for_a_picture_is_not_read(tmp_path: Path, images: Pixels, pool: Executor) -> None:
    (tmp_path / "a.png").write_bytes(png(images[0]))
    with (tmp_path / "video.png").open("wb") as file:
        file.truncate(feed.LARGEST + 1)  # which takes no room on the disk
    found = find_feed(str(tmp_path), "image", 28)
    (unit,) = found.units
    tracemalloc.start()
    try:
        (part,) = read_unit(found.store, unit, "image", 28, "auto", pool)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (part.paths, part.bad) == (["a.png", "video.png"], {1: "more than 512,000,000 bytes"})
    assert np.array_equal(part.images[0], images[0])
    assert peak < 10 * 2**20


def test_a_source_in_either_store(store: Store, images: Pixels, pool: Executor) -> None:
    for row in range(3):
        store.put(f"in/{row}.png", png(images[row]))
    found = find_feed(store.locate("in"), "image", 28)
    (unit,) = found.units
    (part,) = read_unit(found.store, unit, "image", 28, "auto", pool)
    assert (part.paths, part.bad) == (["0.png", "1.png", "2.png"], {})
    assert np.array_equal(part.images, images[:3])
    alone = find_feed(store.locate("in/1.png"), "image", 28)
    assert alone.units[0].keys == ("1.png",)
    assert alone.digest == source_digest(store.locate("in/1.*"))
    with pytest.raises(ConfigError, match="there is nothing to predict"):
        find_feed(store.locate("in/none*.png"), "image", 28)
    assert find_feed(store.locate("in/[0]*.png").replace("[0]", "?"), "image", 28).images == 3
    store.put("in/2.png", png(images[5]))
    assert source_digest(store.locate("in")) != found.digest


def test_a_url_of_a_file_may_have_escapes_in_its_name(tmp_path: Path, images: Pixels) -> None:
    folder = tmp_path / "my photos"
    folder.mkdir()
    for row, name in enumerate(("a b.png", "a c.png")):
        (folder / name).write_bytes(png(images[row]))
    for name, keys in (("a%20b.png", ("a b.png",)), ("a%20*.png", ("a b.png", "a c.png"))):
        (unit,) = find_feed(f"{folder.as_uri()}/{name}", "image", 28).units
        assert unit.keys == keys
    (folder / "a%20b.png").write_bytes(png(images[2]))
    assert find_feed(f"{folder}/a%20b.png", "image", 28).units[0].keys == ("a%20b.png",)


def test_one_file_is_that_file_whatever_lies_beside_it(tmp_path: Path, images: Pixels) -> None:
    for row, name in enumerate(("a[1].png", "a1.png")):
        (tmp_path / name).write_bytes(png(images[row]))
    (tmp_path / "elsewhere").symlink_to("/usr/share")
    (tmp_path / "passwd").symlink_to("/etc/passwd")
    for name in ("a[1].png", "a1.png"):
        (unit,) = find_feed(str(tmp_path / name), "image", 28).units
        assert unit.keys == (name,)
    assert find_feed(f"{tmp_path}/a?.png", "image", 28).units[0].keys == ("a1.png",)
    with pytest.raises(DataError, match="a link out of the source"):
        find_feed(str(tmp_path), "image", 28)


def test_the_digest_tells_one_state_of_a_source_from_another(tmp_path: Path, images: Pixels) -> None:
    source, other = str(tmp_path), tmp_path / "other.png"
    (tmp_path / "a.png").write_bytes(png(images[0]))
    first = find_feed(source, "image", 28).digest
    assert source_digest(source) == first
    other.write_bytes(png(images[1]))
    assert source_digest(source) != first
    other.unlink()
    assert source_digest(source) == first
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert source_digest(source) != first


def test_a_name_that_is_no_text_is_read_like_any_other(tmp_path: Path, images: Pixels) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/s")  # noqa: PTH103 - bytes
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/s/\xff.png")).write_bytes(png(images[0]))
    with pytest.raises(DataError, match=re.escape(r"s/\udcff.png: its name is not UTF-8; give it another")):
        find_feed(f"{tmp_path}/s", "image", 28)


@pytest.mark.parametrize(
    ("column", "complaint"),
    [
        (pa.array(["a", "b"]), "large.parquet, image: string is not images; they have to be encoded PNG or JPEG"),
        (pa.array([b"1" * 100] * 2, pa.binary(100)), "image: 100 pixels where 28x28 are 784; give encoded"),
        (pa.array([[1] * 9] * 2, pa.list_(pa.uint8(), 9)), "image: 9 pixels where 28x28 are 784;"),
        (tensors(np.zeros((2, 32, 32), np.uint8)), "image: tensors of shape [32, 32], not 28x28; give encoded"),
        (tensors(np.zeros((2, 4, 14, 14), np.uint8)), "image: tensors of shape [4, 14, 14], not 28x28;"),
        (
            tensors(np.zeros((28, 28, 2), np.uint8).T),
            "image: tensors with rows and columns exchanged; store them row by row",
        ),
    ],
)
def test_a_column_that_does_not_fit_is_refused(tmp_path: Path, column: pa.Array, complaint: str) -> None:
    if "exchanged" in complaint:
        kind = pa.fixed_shape_tensor(pa.uint8(), (28, 28), permutation=[1, 0])
        column = pa.ExtensionArray.from_storage(kind, column.storage)
    pq.write_table(pa.table({"image": column}), tmp_path / "large.parquet")
    with pytest.raises(DataError) as raised:
        find_feed(str(tmp_path), "image", 28)
    assert complaint in str(raised.value)


def test_a_file_that_the_disk_does_not_give_is_not_torn(tmp_path: Path, images: Pixels, pool: Executor) -> None:
    write(tmp_path / "x.parquet", images, 200)
    found = find_feed(str(tmp_path), "image", 28)
    (unit,) = found.units
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(StorageError, match=r"x.parquet: cannot be read \(.*\); check the disk or server$"):
        list(read_unit(found.store, unit, "image", 28, "auto", pool))


def test_what_cannot_be_a_source_is_refused(tmp_path: Path, images: Pixels) -> None:
    for name, complaint in (("none", "no such file or folder"), ("none.png", "no such file"), ("*.png", "nothing to")):
        with pytest.raises(ConfigError, match=rf"^source='{re.escape(f'{tmp_path}/{name}')}': .*{complaint}"):
            find_feed(f"{tmp_path}/{name}", "image", 28)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=rf"^{tmp_path}/torn.parquet: no readable Parquet file \(.*\); write it again$"):
        find_feed(str(tmp_path), "image", 28)
    (tmp_path / "a.png").write_bytes(png(images[0]))
    with pytest.raises(ConfigError, match="^source=.*it holds both pictures and Parquet; name a folder"):
        find_feed(str(tmp_path), "image", 28)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "passwd.png").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="passwd.png: a link out of the source; put the file there itself"):
        find_feed(f"{tmp_path}/pictures", "image", 28)
    write(tmp_path / "empty" / "x.parquet", images[:0], 10)
    with pytest.raises(ConfigError, match="^source=.*its Parquet files have no rows; name one that has images"):
        find_feed(f"{tmp_path}/empty", "image", 28)


@pytest.mark.usefixtures("s3_env")
def test_a_buckets_name_may_have_a_dot() -> None:
    store, whole, _ = _list("s3://my.photos")
    assert (store.url, whole) == ("s3://my.photos", True)
