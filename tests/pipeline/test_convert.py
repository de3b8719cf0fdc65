"""Proves that data of the user's own is recognised, converted once, and never seen half done."""

import gzip
import logging
import os
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import convert
from pipeline.download import SourceConfig, cache_folder, fetch
from pipeline.errors import DataError
from pipeline.idx import Pixels
from pipeline.own import Found
from pipeline.source import FACTS, IMAGES, LABELS, Source
from pipeline.storage import Store

if TYPE_CHECKING:
    from tests.conftest import Splits

Bring = Callable[..., Source]
Refused = Callable[..., str]
Contents = Callable[[Source, str], list[tuple[str, bytes]]]


def idx_bytes(array: Pixels) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def own(small_splits: "Splits", tmp_path: Path) -> Path:
    """Folder with the IDX files of the small splits."""
    folder = tmp_path / "own"
    folder.mkdir()
    for split, (images, labels) in small_splits.items():
        (folder / IMAGES[split]).write_bytes(idx_bytes(images))
        (folder / LABELS[split]).write_bytes(idx_bytes(labels))
    return folder


@pytest.fixture
def table(small_splits: "Splits", tmp_path: Path) -> Path:
    """Parquet file with the images of the train split and their labels."""
    images, labels = small_splits["train"]
    pixels = pa.array([image.tobytes() for image in images], pa.binary(784))
    pq.write_table(pa.table({"image": pixels, "label": labels}), tmp_path / "own.parquet")
    return tmp_path / "own.parquet"


def expected(images: Pixels, labels: Pixels) -> list[tuple[str, bytes]]:
    return sorted((str(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("style", ["plain", "gz", "test", "dots"])
def test_idx_files_come_back_pixel_by_pixel(
    small_splits: "Splits", own: Path, bring: Bring, contents: Contents, style: str
) -> None:
    for path in list(own.iterdir()):
        match style:
            case "gz":
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
            case "test":
                path.rename(own / path.name.replace("t10k", "test"))
            case "dots":
                path.rename(own / path.name.replace("-idx", ".idx"))
    source = bring(own)
    assert source.facts.classes == tuple("0123456789")
    assert source.facts.conversion == {"form": "IDX", "image_size": 28, "order": "train shuffled", "skipped": 0}
    assert contents(source, "train") == expected(*small_splits["train"])
    images, labels = small_splits["test"]
    assert np.array_equal(source.read("test", np.arange(len(images))), images)
    assert np.array_equal(source.labels("test"), labels)


def test_folders_by_the_names_of_idx_files_are_passed_over(own: Path, bring: Bring) -> None:
    """As Kaggle's MNIST unpacks: x.idx3-ubyte beside a folder x-idx3-ubyte that holds it again."""
    for path in list(own.iterdir()):
        path.rename(own / path.name.replace("-idx", ".idx"))
        path.mkdir()
        (path / path.name).write_bytes(b"not looked at")
    source = bring(own)
    assert (source.rows("train"), source.rows("test")) == (600, 200)


def test_idx_files_without_a_test_split_give_a_part(
    small_splits: "Splits", own: Path, bring: Bring, contents: Contents
) -> None:
    for path in own.glob("t10k-*"):
        path.unlink()
    source = bring(own)
    counts = np.bincount(small_splits["train"][1])
    assert np.bincount(source.labels("test")).tolist() == [round(count / 6) for count in counts]
    assert sorted(contents(source, "train") + contents(source, "test")) == expected(*small_splits["train"])


def test_idx_files_of_a_larger_size_are_taken_as_they_are(
    small_splits: "Splits", own: Path, bring: Bring, refused: Refused
) -> None:
    for split, (images, _) in small_splits.items():
        (own / IMAGES[split]).write_bytes(idx_bytes(np.pad(images, ((0, 0), (2, 2), (2, 2)))))
    assert "train-images-idx3-ubyte: images of 32x32, not 28x28; set image_size to 28 or 32" in refused(own)
    assert bring(own, image_size=32).facts.image_shape == (32, 32)


def test_idx_files_that_do_not_fit_are_refused(small_splits: "Splits", own: Path, refused: Refused) -> None:
    labels = small_splits["train"][1]
    (own / LABELS["train"]).write_bytes(idx_bytes(labels[:-1]))
    assert "holds 600 images but train-labels-idx1-ubyte 599 labels" in refused(own)
    (own / LABELS["train"]).write_bytes(idx_bytes(labels // 2))
    assert "t10k-labels-idx1-ubyte: label at row 0 is not in train, which has 0..4" in refused(own)
    (own / LABELS["train"]).write_bytes(idx_bytes(np.where(labels == 3, 4, labels).astype(np.uint8)))
    assert "class '3' has no image to train on" in refused(own)
    (own / LABELS["train"]).write_bytes(b"garbage")
    assert "train-labels-idx1-ubyte: its first bytes are" in refused(own)
    (own / LABELS["train"]).unlink()
    assert "train: images or labels are missing; both have to be there, as train-images-idx3-ubyte" in refused(own)
    (own / f"{LABELS['train']}.gz").write_bytes(gzip.compress(idx_bytes(labels))[:-9])
    assert "train-labels-idx1-ubyte.gz: torn gzip file" in refused(own)


def test_idx_files_that_are_links_out_of_the_source_are_refused(own: Path, tmp_path: Path, refused: Refused) -> None:
    (own / LABELS["train"]).rename(tmp_path / "outside")
    (own / LABELS["train"]).symlink_to(tmp_path / "outside")
    assert ": a link out of the source" in refused(own)


def test_unchanged_data_is_not_converted_again(own: Path, bring: Bring, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bring(own)
    monkeypatch.setattr(convert, "_write", None)
    assert bring(own) == first


def test_changed_data_is_another_dataset(own: Path, bring: Bring, contents: Contents) -> None:
    first = bring(own)
    data = bytearray((own / IMAGES["train"]).read_bytes())
    data[-1] ^= 1
    (own / IMAGES["train"]).write_bytes(data)
    second = bring(own)
    assert second.folder != first.folder
    assert second.facts.made_of != first.facts.made_of
    assert len(set(contents(second, "train")) ^ set(contents(first, "train"))) == 2
    assert sorted(path.name for path in cache_folder().iterdir()) == sorted([first.folder.name, second.folder.name])


def test_what_nobody_has_asked_for_in_days_makes_room(own: Path, bring: Bring) -> None:
    def change(value: int) -> None:
        data = bytearray((own / IMAGES["train"]).read_bytes())
        data[-1] = value
        (own / IMAGES["train"]).write_bytes(data)

    def age(folder: Path) -> None:
        os.utime(folder, (time.time() - convert.KEPT_S - 60,) * 2)

    converted = []
    for value in range(3):
        change(value)
        converted.append(bring(own).folder)
    other = fetch(SourceConfig(dataset="mine-0123456789ab", source=str(own)))
    taken = other.with_name("mine-0123456789ab")  # as one of ours would be called
    other.rename(taken)
    for folder in (converted[0], converted[1], taken):
        age(folder)
    change(0)
    assert bring(own).folder == converted[0]  # in use again
    change(3)
    converted.append(bring(own).folder)
    assert set(cache_folder().iterdir()) == {converted[0], converted[2], converted[3], taken}


@pytest.mark.parametrize("name", [IMAGES["train"], FACTS])
def test_a_damaged_cache_is_made_again(own: Path, bring: Bring, name: str) -> None:
    first = bring(own)
    (first.folder / name).write_bytes(b"garbage")
    assert bring(own) == first


def test_data_that_changes_while_it_is_read_is_refused(
    own: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = convert._write

    def meddle(*args: object) -> int:
        (own / LABELS["test"]).write_bytes((own / LABELS["test"]).read_bytes())
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "_write", meddle)
    assert "changed while it was read; let it rest and run again" in refused(own)


def test_a_file_that_grows_while_it_is_read_is_refused(
    table: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = convert._plan

    def grow_and_plan(*args: Any) -> dict[str, convert.Plan]:
        grown = pa.concat_tables([pq.read_table(table), pq.read_table(table)])
        pq.write_table(grown, table)
        return plan(*args)

    monkeypatch.setattr(convert, "_plan", grow_and_plan)
    assert refused(table) == f"{table}: changed while it was read; let it rest and run again"


def test_a_file_that_changes_after_its_labels_were_read_is_refused(
    table: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = convert.find_tables

    def find_and_change(*args: Any) -> Found:
        found = find(*args)
        whole = pq.read_table(table)
        pq.write_table(whole.take(np.arange(len(whole))[::-1]), table)
        return found

    monkeypatch.setattr(convert, "find_tables", find_and_change)
    assert refused(table) == f"{table}: changed while it was read; let it rest and run again"


def test_text_that_is_not_utf_8_is_refused(table: Path, refused: Refused) -> None:
    whole = pq.read_table(table)
    words = pa.array([b"a", b"\xff\xfe", *[b"b"] * (len(whole) - 2)])
    text = pa.StringArray.from_buffers(len(words), *words.buffers()[1:])
    for labels in (text, text.dictionary_encode()):
        pq.write_table(whole.set_column(1, "label", labels), table)
        message = refused(table)
        assert message.startswith("own.parquet, label: unreadable from row 0 on (")
        assert message.endswith("Invalid UTF8 sequence at string index 1); store text as UTF-8")


def test_metadata_nested_beyond_measure_name_no_classes(table: Path, bring: Bring) -> None:
    whole = pq.read_table(table).replace_schema_metadata({"huggingface": "[" * 100_000})
    pq.write_table(whole, table)
    assert bring(table).facts.classes == tuple("0123456789")


def test_parquet_of_another_split_is_told_of(table: Path, bring: Bring, caplog: pytest.LogCaptureFixture) -> None:
    folder = table.parent / "table"
    folder.mkdir()
    for name in ("train", "test", "validation"):
        (folder / f"{name}.parquet").write_bytes(table.read_bytes())
    with caplog.at_level(logging.INFO):
        bring(folder)
    assert "mine: passed over: *.parquet (1)" in caplog.messages


def test_a_folder_of_a_bucket_may_be_called_parquet(
    small_splits: "Splits", table: Path, s3_store: Store, bring: Bring, refused: Refused, contents: Contents
) -> None:
    """As Spark and Dask write it."""
    url = f"{s3_store.url}/photos.parquet"
    assert f"{url}: holds no *.parquet; a source is" in refused(url)
    s3_store.put("photos.parquet/_SUCCESS", b"")
    s3_store.put("photos.parquet/part-00000.snappy.parquet", table.read_bytes())
    source = bring(url)
    assert sorted(contents(source, "train") + contents(source, "test")) == expected(*small_splits["train"])
    assert bring(f"{url}/") == source


def test_a_process_killed_half_way_leaves_nothing_that_is_seen(own: Path, bring: Bring, tmp_path: Path) -> None:
    script = f"""
        import os
        from pipeline import convert
        from pipeline.download import SourceConfig, fetch
        convert.write_facts = lambda *_: os._exit(9)
        fetch(SourceConfig(dataset="mine", source={str(own)!r}))
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""},
        cwd=Path(convert.__file__).parents[1],
        check=False,
    )
    assert killed.returncode == 9
    assert [path.name for path in cache_folder().iterdir() if not path.name.startswith(".")] == []
    bring(own)


def test_a_full_disk_costs_a_line(own: Path, bring: Bring, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.IdxWriter, "put", full)
    with pytest.raises(DataError, match=r"^mine: .*: No space left on device; check the disk"):
        bring(own)
    assert list(cache_folder().iterdir()) == []


def test_nothing_that_is_known_says_what_a_source_may_be(own: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "data.csv").write_text("1,2")
    message = refused(tmp_path / "nothing")
    assert "nothing: holds no data that is known; a source is a folder with <class>/*.png" in message
    assert "*.parquet" in message
    assert "s3://" in message


def test_two_kinds_in_one_folder_are_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "both" / "a").mkdir(parents=True)
    for name in ("a/x.png", "train.parquet"):
        (tmp_path / "both" / name).write_bytes(b"")
    assert "both: holds both pictures and Parquet" in refused(tmp_path / "both")


def test_a_split_that_gets_no_image_is_refused(own: Path, refused: Refused) -> None:
    for path in own.glob("t10k-*"):
        path.unlink()
    (own / IMAGES["train"]).write_bytes(idx_bytes(np.zeros((2, 28, 28), np.uint8)))
    (own / LABELS["train"]).write_bytes(idx_bytes(np.array([0, 1], np.uint8)))
    assert "no image left for the test split; add images, or change test_fraction" in refused(own)


@pytest.mark.parametrize("form", ["IDX", "Parquet"])
def test_memory_stays_small_whatever_the_size(tmp_path: Path, form: str) -> None:
    """200,000 images are 157 MB; converting them takes less than 64 MB beyond what the imports take."""
    folder = tmp_path / "large"
    folder.mkdir()
    count = 200_000
    labels = (np.arange(count) % 10).astype(np.uint8)
    if form == "IDX":
        with (folder / IMAGES["train"]).open("wb") as file:
            file.write(struct.pack(">BBBB3I", 0, 0, 8, 3, count, 28, 28))
            file.truncate(16 + count * 784)
        (folder / LABELS["train"]).write_bytes(idx_bytes(labels))
    else:
        pixels = pa.FixedSizeBinaryArray.from_buffers(pa.binary(784), count, [None, pa.py_buffer(bytes(count * 784))])
        whole = pa.table({"image": pixels, "label": labels})
        pq.write_table(whole, folder / "x.parquet", row_group_size=count, compression="none", use_dictionary=False)
    script = f"""
        from pathlib import Path
        from pipeline.download import SourceConfig, fetch

        def private():
            lines = Path("/proc/self/status").read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

        import threading, time
        before, peak, over = private(), [0], threading.Event()

        def watch():
            while not over.wait(0.005):
                peak[0] = max(peak[0], private())

        threading.Thread(target=watch).start()
        fetch(SourceConfig(dataset="large", source={str(folder)!r}))
        over.set()
        print((peak[0] - before) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""},
        cwd=Path(convert.__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 64
    assert done.stderr == ""  # no progress where there is no terminal


def test_the_name_may_not_be_a_published_one_for_other_data(own: Path, bring: Bring) -> None:
    with pytest.raises(DataError, match="for data of your own, give it a name with dataset"):
        fetch(SourceConfig(source=str(own)))
