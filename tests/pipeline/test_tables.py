"""Proves that Parquet of every layout becomes the images that are in it, and that what is wrong is named by its row."""

import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.download import cache_folder
from pipeline.errors import StorageError
from pipeline.idx import Pixels
from pipeline.source import Source
from pipeline.storage import open_store

if TYPE_CHECKING:
    from tests.conftest import S3Server, Splits

Bring = Callable[..., Source]
Refused = Callable[..., str]
Contents = Callable[[Source, str], list[tuple[str, bytes]]]
COUNT = {"train": 150, "test": 60}
NAMES = tuple("zyxwvutsrq")  # class 0 is "z": sorted by name the classes come in reverse


def png(image: Pixels) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def tensors(images: Pixels) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))


LAYOUTS: dict[str, Callable[[Pixels], pa.Array]] = {
    "binary": lambda images: pa.array([png(image) for image in images], pa.binary()),
    "large_binary": lambda images: pa.array([png(image) for image in images], pa.large_binary()),
    "hugging-face": lambda images: pa.array([{"bytes": png(image), "path": "x.png"} for image in images]),
    "fixed_size_binary": lambda images: pa.array([image.tobytes() for image in images], pa.binary(784)),
    "list": lambda images: pa.array([image.ravel() for image in images], pa.list_(pa.uint8())),
    "large_list": lambda images: pa.array([image.ravel() for image in images], pa.large_list(pa.uint8())),
    "fixed_size_list": lambda images: pa.array([image.ravel() for image in images], pa.list_(pa.uint8(), 784)),
    "tensor": tensors,
    "tensor-with-channel": lambda images: tensors(images[:, None]),
    "tensor-of-pixels": lambda images: tensors(images.reshape(-1, 784)),
}


def write(file: Path, images: pa.Array, labels: pa.Array, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}), file, row_group_size=40, **options)


@pytest.fixture
def splits(small_splits: "Splits") -> "Splits":
    return {split: (images[: COUNT[split]], labels[: COUNT[split]]) for split, (images, labels) in small_splits.items()}


@pytest.fixture
def table(splits: "Splits", tmp_path: Path) -> Path:
    """Folder with train.parquet and test.parquet of raw pixels and integer labels."""
    for split, (images, labels) in splits.items():
        write(tmp_path / "table" / f"{split}.parquet", LAYOUTS["fixed_size_binary"](images), pa.array(labels))
    return tmp_path / "table"


@pytest.fixture
def spoiled(splits: "Splits", table: Path) -> Callable[..., Path]:
    """Function that replaces columns of the train split by others, given as lists."""

    def replaced(images: pa.Array | None = None, labels: pa.Array | None = None) -> Path:
        kept = splits["train"]
        write(
            table / "train.parquet",
            LAYOUTS["fixed_size_binary"](kept[0]) if images is None else images,
            pa.array(kept[1]) if labels is None else labels,
        )
        return table

    return replaced


def expected(images: Pixels, labels: Pixels, names: tuple[str, ...] = tuple("0123456789")) -> list[tuple[str, bytes]]:
    return sorted((names[label], image.tobytes()) for image, label in zip(images, labels, strict=True))


def require_exactly(source: Source, splits: "Splits", contents: Contents) -> None:
    assert contents(source, "train") == expected(*splits["train"])
    images, labels = splits["test"]
    assert np.array_equal(source.read("test", np.arange(len(images))), images)
    assert np.array_equal(source.labels("test"), labels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_pixel_by_pixel(
    splits: "Splits", tmp_path: Path, bring: Bring, contents: Contents, layout: str
) -> None:
    for split, (images, labels) in splits.items():
        write(tmp_path / "table" / f"{split}.parquet", LAYOUTS[layout](images), pa.array(labels))
    source = bring(tmp_path / "table")
    require_exactly(source, splits, contents)
    assert source.facts.classes == tuple("0123456789")
    assert source.facts.conversion["form"] == "Parquet"
    assert source.facts.conversion["skipped"] == 0


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train/part-0.parquet", "test/part-0.parquet"),
        ("data/train-0.parquet", "data/test-0.parquet"),
        ("TRAIN.PARQUET", "Test.Parquet"),
    ],
)
def test_splits_are_told_by_the_names_of_files_or_folders(
    splits: "Splits", tmp_path: Path, bring: Bring, contents: Contents, names: tuple[str, str]
) -> None:
    for (images, labels), name in zip(splits.values(), names, strict=True):
        write(tmp_path / "table" / name, LAYOUTS["list"](images), pa.array(labels))
    write(tmp_path / "table" / "validation.parquet", pa.array(["no image"]), pa.array([1.5]))
    write(tmp_path / "table" / ".hidden" / "train.parquet", pa.array(["no image"]), pa.array([1.5]))
    require_exactly(bring(tmp_path / "table"), splits, contents)


def test_a_split_may_have_many_files(
    splits: "Splits", table: Path, bring: Bring, contents: Contents, refused: Refused
) -> None:
    images, labels = splits["train"]
    for number in range(3):
        part = slice(number * 50, number * 50 + 50)
        write(table / f"train-{number}.parquet", LAYOUTS["list"](images[part]), pa.array(labels[part]))
    (table / "train.parquet").unlink()
    require_exactly(bring(table), splits, contents)


def test_a_single_file_gives_a_part_of_each_class_to_the_test(
    splits: "Splits", table: Path, bring: Bring, contents: Contents
) -> None:
    source = bring(table / "train.parquet", test_fraction=0.2)
    counts = np.bincount(splits["train"][1])
    assert np.bincount(source.labels("test")).tolist() == [round(count * 0.2) for count in counts]
    assert sorted(contents(source, "train") + contents(source, "test")) == expected(*splits["train"])


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_text_labels_are_classes_in_the_order_of_their_names(
    splits: "Splits", tmp_path: Path, bring: Bring, contents: Contents, kind: str
) -> None:
    for split, (images, labels) in splits.items():
        words = pa.array([NAMES[label] for label in labels])
        column = words.dictionary_encode() if kind == "dictionary" else words.cast(getattr(pa, kind)())
        write(tmp_path / "table" / f"{split}.parquet", LAYOUTS["list"](images), column)
    source = bring(tmp_path / "table")
    assert source.facts.classes == tuple(sorted(NAMES))
    for split, pair in splits.items():
        assert contents(source, split) == expected(*pair, NAMES)


@pytest.mark.parametrize("kind", ["int8", "int64", "uint64", "dictionary"])
def test_integer_labels_of_any_width_are_classes(
    spoiled: Callable[..., Path], splits: "Splits", bring: Bring, contents: Contents, kind: str
) -> None:
    labels = pa.array(splits["train"][1])
    column = labels.dictionary_encode() if kind == "dictionary" else labels.cast(getattr(pa, kind)())
    require_exactly(bring(spoiled(labels=column)), splits, contents)


@pytest.mark.parametrize("names", [list(NAMES), ["a", "a"], "text", [1, 2], None])
def test_classes_are_named_as_hugging_face_says_if_it_does(
    splits: "Splits", table: Path, bring: Bring, names: object
) -> None:
    told = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    for split in splits:
        found = pq.read_table(table / f"{split}.parquet")
        pq.write_table(found.replace_schema_metadata({"huggingface": json.dumps(told)}), table / f"{split}.parquet")
    assert bring(table).facts.classes == (NAMES if names == list(NAMES) else tuple("0123456789"))


def test_columns_may_have_other_names(splits: "Splits", tmp_path: Path, bring: Bring, refused: Refused) -> None:
    (tmp_path / "table").mkdir()
    images, labels = splits["train"]
    columns = {"a.b": LAYOUTS["binary"](images), "the class": pa.array(labels), "more": pa.array(labels)}
    pq.write_table(pa.table(columns), tmp_path / "table" / "x.parquet")
    source = bring(tmp_path / "table", image_column="a.b", label_column="the class")
    assert source.rows("train") + source.rows("test") == len(labels)
    assert source.facts.conversion["image_column"] == "a.b"
    for folder in cache_folder().iterdir():
        folder.rename(tmp_path / folder.name)
    assert "x.parquet: has no column 'image' (but a.b, the class, more); name it with image_column" in refused(
        tmp_path / "table"
    )


def test_larger_pixels_need_a_larger_size(splits: "Splits", tmp_path: Path, bring: Bring, refused: Refused) -> None:
    images, labels = splits["train"]
    large = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    for name, column in {
        "fixed": pa.array([image.tobytes() for image in large], pa.binary(1024)),
        "lists": LAYOUTS["list"](large),
        "tensors": tensors(large),
    }.items():
        write(tmp_path / f"{name}.parquet", column, pa.array(labels))
    assert "image: 1024 pixels where 28x28 are 784; set image_size to 32" in refused(tmp_path / "fixed.parquet")
    assert "image: 1024 pixels at row 0 where 28x28 are 784; set" in refused(tmp_path / "lists.parquet")
    assert "image: tensors of shape [32, 32], not 28x28; set" in refused(tmp_path / "tensors.parquet")
    for name in ("fixed", "lists", "tensors"):
        assert bring(tmp_path / f"{name}.parquet", image_size=32).facts.image_shape == (32, 32)


def changed(column: pa.Array, row: int, value: object) -> pa.Array:
    values = column.to_pylist()
    values[row] = value
    return pa.array(values, column.type)


LIST = pa.list_(pa.uint8())


@pytest.mark.parametrize(
    ("layout", "row", "value", "complaint"),
    [
        ("binary", 101, None, "train.parquet, image: null at row 101; give every label an image"),
        ("fixed_size_binary", 101, None, "train.parquet, image: null at row 101"),
        ("tensor-as-list", 101, None, "train.parquet, image: null at row 101"),
        ("hugging-face", 101, None, "train.parquet, image: null at row 101"),
        ("hugging-face", 101, {"bytes": None, "path": "x.png"}, "train.parquet, image: null at row 101"),
        ("list", 101, [1] * 783, "train.parquet, image: 783 pixels at row 101 where 28x28 are 784; set image_size"),
        ("list", 101, [None] + [1] * 783, "train.parquet, image: a null pixel at row 101"),
        ("binary", 101, b"garbage", "cannot be read, the first is row 101 of the train split (neither PNG nor JPEG)"),
    ],
)
def test_a_wrong_image_is_named_by_its_row(
    splits: "Splits",
    spoiled: Callable[..., Path],
    refused: Refused,
    layout: str,
    row: int,
    value: object,
    complaint: str,
) -> None:
    layout = layout.replace("tensor-as-list", "fixed_size_list")
    column = changed(LAYOUTS[layout](splits["train"][0]), row, value)
    assert complaint in refused(spoiled(images=column))


@pytest.mark.parametrize(
    ("kind", "value", "complaint"),
    [
        ("int64", None, "train.parquet, label: null at row 101; give every image a label"),
        ("int64", -1, "train.parquet, label: label -1 at row 101 is outside 0..255; number classes from 0"),
        ("int64", 256, "train.parquet, label: label 256 at row 101 is outside 0..255"),
        ("int64", 2**40, f"train.parquet, label: label {2**40} at row 101 is outside 0..255"),
        ("int64", 11, "class '10' has no image to train on; add some, or leave the class out"),
        ("int8", -1, "train.parquet, label: label -1 at row 101 is outside 0..255"),
    ],
)
def test_a_wrong_label_is_named_by_its_row(
    splits: "Splits", spoiled: Callable[..., Path], refused: Refused, kind: str, value: object, complaint: str
) -> None:
    column = changed(pa.array(splits["train"][1]).cast(getattr(pa, kind)()), 101, value)
    assert complaint in refused(spoiled(labels=column))


def test_a_label_in_test_alone_is_refused(splits: "Splits", table: Path, refused: Refused) -> None:
    images, labels = splits["test"]
    write(table / "test.parquet", LAYOUTS["list"](images), changed(pa.array(labels), 55, 10))
    assert "test.parquet, label: label 10 at row 55 is outside 0..9" in refused(table)
    for split, pair in splits.items():
        words = [NAMES[label] for label in pair[1]]
        words[55] = "new" if split == "test" else words[55]
        write(table / f"{split}.parquet", LAYOUTS["list"](pair[0]), pa.array(words))
    assert "test.parquet, label: class 'new' at row 55 is not in train; add it there" in refused(table)


def test_a_null_in_a_dictionary_is_a_null(splits: "Splits", spoiled: Callable[..., Path], refused: Refused) -> None:
    words = changed(pa.array([NAMES[label] for label in splits["train"][1]]), 101, None)
    assert "label: null at row 101" in refused(spoiled(labels=words.dictionary_encode()))


def test_more_words_than_classes_can_be_are_refused(spoiled: Callable[..., Path], refused: Refused) -> None:
    words = pa.array([f"word {row}" for row in range(300)])
    images = LAYOUTS["list"](np.zeros((300, 28, 28), np.uint8))
    message = refused(spoiled(images, words))
    assert "label: more than 256 classes at row 256; is this the column of labels?" in message


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (pa.array([1, 2]), None, "train.parquet, image: int64 is not images; they have to be encoded PNG or JPEG"),
        (pa.array(["x", "y"]), None, "image: string is not images"),
        (pa.array([[1.5], [2.5]]), None, "image: list<element: double> is not images"),
        (None, pa.array([0.0, 1.0]), "label: double is no label; it has to be integers or text"),
        (None, pa.array([True, False]), "label: bool is no label"),
        (None, pa.array(["\n", "b"]), r"'\n' cannot be a class's name"),
        (None, pa.array([0, 0]), "classes found: 1; between 2 and 256"),
    ],
)
def test_a_wrong_schema_is_named(
    spoiled: Callable[..., Path], refused: Refused, images: pa.Array | None, labels: pa.Array | None, complaint: str
) -> None:
    two = LAYOUTS["list"](np.zeros((2, 28, 28), np.uint8))
    file = spoiled(two if images is None else images, pa.array([0, 1]) if labels is None else labels) / "train.parquet"
    assert complaint in refused(file).replace("list<item:", "list<element:")


def test_tensors_that_lie_column_by_column_are_refused(
    splits: "Splits", spoiled: Callable[..., Path], refused: Refused
) -> None:
    turned = pa.FixedShapeTensorArray.from_numpy_ndarray(splits["train"][0].transpose(0, 2, 1))
    assert turned.type.permutation == [1, 0]
    assert "image: tensors with rows and columns exchanged; store them row by row" in refused(spoiled(images=turned))


def test_files_that_disagree_about_labels_are_refused(splits: "Splits", table: Path, refused: Refused) -> None:
    images, labels = splits["train"]
    write(table / "train-2.parquet", LAYOUTS["list"](images), pa.array([NAMES[label] for label in labels]))
    assert "label: " in (message := refused(table))
    assert "; use one" in message


def test_no_rows_are_refused(table: Path, refused: Refused) -> None:
    for split in ("test", "train"):
        pq.write_table(pq.read_table(table / f"{split}.parquet")[:0], table / f"{split}.parquet")
        assert f"{split}.parquet: no rows in the {split} split; add images" in refused(table)


def test_a_test_split_alone_is_refused(table: Path, refused: Refused) -> None:
    (table / "train.parquet").rename(table / "test-2.parquet")
    assert ": a test split, but none to train on; add train*.parquet" in refused(table)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_torn_file_is_refused(table: Path, refused: Refused, keep: int) -> None:
    data = (table / "train.parquet").read_bytes()
    (table / "train.parquet").write_bytes(data[:keep])
    assert "train.parquet: no readable Parquet file (" in refused(table)


def test_a_file_with_a_torn_page_is_refused(table: Path, refused: Refused) -> None:
    data = bytearray((table / "train.parquet").read_bytes())
    data[1000:9000] = bytes(8000)
    (table / "train.parquet").write_bytes(data)
    assert "train.parquet: cannot be read after row " in refused(table)


def test_bad_pictures_are_skipped_if_wanted(
    splits: "Splits", spoiled: Callable[..., Path], bring: Bring, contents: Contents
) -> None:
    images, labels = splits["train"]
    column = changed(changed(LAYOUTS["binary"](images), 101, b"garbage"), 3, b"")
    source = bring(spoiled(images=column), bad_images="skip")
    assert source.facts.conversion["skipped"] == 2
    keep = ~np.isin(np.arange(len(labels)), [3, 101])
    assert contents(source, "train") == expected(images[keep], labels[keep])


def test_parquet_in_a_bucket_is_the_same_data(
    splits: "Splits",
    table: Path,
    s3_server: "S3Server",
    s3_env: dict[str, str],
    bring: Bring,
    refused: Refused,
    contents: Contents,
) -> None:
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
    store = open_store(url)
    assert f"{url}: holds no *.parquet; a source is" in refused(url)
    for split in splits:
        store.put(f"{split}.parquet", (table / f"{split}.parquet").read_bytes())
    store.put("readme.txt", b"no data")
    source = bring(url)
    require_exactly(source, splits, contents)
    assert bring(table) == source
    assert bring(f"{url}/").folder == source.folder
    assert bring(f"{url}/train.parquet").facts.made_of == bring(table / "train.parquet").facts.made_of
    assert [path.name for path in cache_folder().iterdir() if path.name.startswith(".")] == []


def test_a_bucket_out_of_reach_costs_a_line(
    s3_env: dict[str, str], s3_server: "S3Server", bring: Bring, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="not found"):
        bring("s3://no-such-bucket-here/prefix")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="access denied"):
        bring(f"s3://{s3_server.bucket}/prefix")
    assert list(cache_folder().iterdir()) == []
