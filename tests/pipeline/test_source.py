"""Proves that a dataset on this machine is opened only as it was left, and that its parameters have bounds."""

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.errors import ConfigError, DataError
from pipeline.source import FACTS, FILES, Source, SourceConfig, leave, open_source, write_facts

if TYPE_CHECKING:
    from tests.conftest import Splits

MakeSource = Callable[[Path, "Splits"], Source]


@pytest.fixture
def tiny(small_splits: "Splits", make_source: MakeSource, tmp_path: Path) -> Source:
    few = {split: (images[:20], labels[:20]) for split, (images, labels) in small_splits.items()}
    return make_source(tmp_path / "tiny", few)


def test_rows_and_labels_are_those_of_the_files(small_source: Source, small_splits: "Splits") -> None:
    for split, (images, labels) in small_splits.items():
        assert small_source.rows(split) == len(labels)
        assert np.array_equal(small_source.labels(split), labels)
        rows = np.array([5, 0, 17, 5])
        assert np.array_equal(small_source.read(split, rows), images[rows])


def test_facts_come_back_as_they_were_written(tiny: Source) -> None:
    write_facts(tiny.folder, tiny.facts)
    assert open_source(tiny.folder) == tiny
    assert sorted(path.name for path in tiny.folder.iterdir()) == sorted([*FILES, FACTS])


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed(tiny: Source, name: str) -> None:
    data = bytearray((tiny.folder / name).read_bytes())
    data[-1] ^= 1
    (tiny.folder / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}: altered since it was fetched; delete it and fetch again$"):
        open_source(tiny.folder)


@pytest.mark.parametrize("name", [*FILES, FACTS])
def test_a_missing_file_is_named(tiny: Source, name: str) -> None:
    (tiny.folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}.*fetch the dataset again$"):
        open_source(tiny.folder)


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"classes": 3}'])
def test_facts_that_are_none_are_refused_in_one_line(tiny: Source, text: str) -> None:
    (tiny.folder / FACTS).write_text(text)
    with pytest.raises(DataError, match=rf"{FACTS}: .*; delete it and fetch again$") as raised:
        open_source(tiny.folder)
    assert "\n" not in str(raised.value)


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for number in range(2):
        whole = tmp_path / f"temporary-{number}" / "whole"
        whole.mkdir(parents=True)
        (whole / "file").write_text(str(number))
        leave(whole, tmp_path / "folder")
        assert not whole.exists()
        assert (tmp_path / "folder" / "file").read_text() == str(number)


def test_a_good_folder_of_the_same_facts_stays(tiny: Source, tmp_path: Path) -> None:
    other = tmp_path / "temporary" / "whole"
    shutil.copytree(tiny.folder, other)
    before = tiny.folder.stat().st_ino
    leave(other, tiny.folder)
    assert tiny.folder.stat().st_ino == before
    (tiny.folder / FILES[0]).write_bytes(b"torn")
    leave(other, tiny.folder)
    assert tiny.folder.stat().st_ino != before
    assert open_source(tiny.folder) == tiny


@pytest.mark.parametrize("before", ["nothing", "good", "torn"])
def test_of_many_that_finish_the_same_none_fails(tiny: Source, tmp_path: Path, before: str) -> None:
    together = threading.Barrier(8)

    def finish(number: int) -> None:
        whole = tmp_path / f"temporary-{number}" / "whole"
        shutil.copytree(tiny.folder, whole)
        for folder in range(10):
            another = shutil.copytree(whole, whole.with_name(str(folder)))
            together.wait(120)
            leave(another, tmp_path / f"left-{folder}")

    if before != "nothing":
        for folder in range(10):
            shutil.copytree(tiny.folder, tmp_path / f"left-{folder}")
            if before == "torn":
                (tmp_path / f"left-{folder}" / FILES[0]).write_bytes(b"torn")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(finish, range(8)))
    assert all(open_source(tmp_path / f"left-{folder}").facts == tiny.facts for folder in range(10))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a.b", "a b", "A", "-a", "_a", "é", "a\n", "a" * 65, "../x", "a\0"]
)
def test_a_name_is_small_letters_digits_and_dashes(name: str) -> None:
    with pytest.raises(ValidationError, match="dataset"):
        SourceConfig(dataset=name)


@pytest.mark.parametrize("name", ["a", "0", "my-data-2", "a" * 64])
def test_any_such_name_will_do(name: str) -> None:
    assert SourceConfig(dataset=name).dataset == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ""),
        ("image_size", 27),
        ("image_column", ""),
        ("label_column", ""),
        ("test_fraction", 0),
        ("test_fraction", 1),
        ("test_fraction", float("nan")),
        ("bad_images", "ignore"),
        ("unknown", 1),
    ],
)
def test_every_parameter_has_bounds(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        SourceConfig.model_validate({field: value})


def test_every_parameter_has_help() -> None:
    assert all(field.description for field in SourceConfig.model_fields.values())


def test_a_path_may_start_from_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert SourceConfig(source="~/data").path == tmp_path / "data"
    with pytest.raises(ConfigError, match="no such user"):
        _ = SourceConfig(source="~no-such-user-here/data").path
