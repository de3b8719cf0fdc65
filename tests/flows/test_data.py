"""Proves `lenet data` as a person uses it: the real command on real data, and a line for each mistake."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from flows.cli import main
from pipeline.shards import list_manifests
from pipeline.storage import open_store

if TYPE_CHECKING:
    from tests.conftest import Splits

LENET = str(Path(sys.executable).with_name("lenet"))


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Lenet = Callable[..., Done]


@pytest.fixture
def lenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lenet:
    """`lenet data …` in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as exited:
            main(["data", *arguments])
        said = capsys.readouterr()
        return Done(int(exited.value.code or 0), said.out, said.err)

    return run


def refused(done: Done, complaint: str) -> None:
    assert done.code in (1, 2)
    assert complaint in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_the_published_dataset_from_source_to_page(lenet: Lenet, tmp_path: Path) -> None:
    assert "nothing in the store yet" in lenet("list").out
    command = [LENET, "data", "prepare", "--validation-fraction", "0.1"]  # as a person's own process
    prepared = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert prepared.returncode == 0, prepared.stderr
    (manifest,) = list_manifests(open_store(str(tmp_path / "store")))
    assert f"fashion-mnist version {manifest.version}: " in prepared.stdout
    assert {split: manifest.rows(split) for split in manifest.splits} == {
        "train": 54_000,
        "validation": 6_000,
        "test": 10_000,
    }
    listed = lenet("list").out
    assert "54,000 train, 6,000 validation, 10,000 test" in listed
    assert all(name in listed for name in ("mnist", "kmnist", "qmnist", "emnist-letters"))
    assert lenet("verify").code == 0
    assert lenet("show", "fashion-mnist").code == 0
    assert "<h1>fashion-mnist</h1>" in (tmp_path / "fashion-mnist.html").read_text()
    shown = lenet("show", "fashion-mnist", "--output", "sheet.png", "--samples", "5")
    assert shown.code == 0
    assert Image.open(tmp_path / "sheet.png").size == (180 + 5 * 30 + 2, 302)

    shard = next((tmp_path / "store").rglob("train-00002-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(lenet("show", "cifar"), "dataset='cifar': ")
    broken = lenet("verify", "fashion-mnist")
    assert broken.code == 1
    assert f"{shard}: shard is altered" in broken.err


def test_a_persons_own_folder_of_pictures(lenet: Lenet, tmp_path: Path, small_splits: "Splits") -> None:
    for split, (images, labels) in small_splits.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            if label < 3:
                folder = tmp_path / "pictures" / split / f"kind {label}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{number}.png")
    done = lenet("prepare", "--dataset", "my-own", "--source", "pictures")
    assert done.code == 0, done.err
    (manifest,) = list_manifests(open_store(str(tmp_path / "store")))
    assert manifest.classes == ("kind 0", "kind 1", "kind 2")
    assert manifest.rows("train") == int((small_splits["train"][1] < 3).sum())
    assert lenet("show", "my-own").code == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["prepare", "--dataset", "cifar"], "dataset='cifar': not one of fashion-mnist, mnist"),
        (["prepare", "--dataset", "../evil"], "dataset='../evil': "),
        (["prepare", "--source", "/nowhere"], "source='/nowhere': no such folder"),
        (["prepare", "--shard-mib", "0"], "shard_mib=0"),
        (["prepare", "--storage", "ftp://x"], "storage='ftp://x': "),
        (["verify"], "no dataset is there; make one with: lenet data prepare"),
        (["show", "fashion-mnist"], "dataset='fashion-mnist': "),
        (["show", "fashion-mnist", "--output", "x.gif"], "output='x.gif': "),
        (["show", "fashion-mnist", "--samples", "0"], 'Invalid value "0" for --samples. Must be >= 1.'),
        (["show", "fashion-mnist", "--samples", "101"], 'Invalid value "101" for --samples. Must be <= 100.'),
        (["show", "fashion-mnist", "--samples", "9.6"], '"9.6" is no whole number'),
        (["lst"], "lst"),
    ],
)
def test_a_mistake_costs_a_line(lenet: Lenet, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    refused(lenet(*arguments), complaint)
    assert not list(tmp_path.iterdir())
