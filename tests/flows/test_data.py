"""Proves `lenet data` as a person uses it: the real command on real data, and a line for each mistake."""

import os
import subprocess
import sys
from collections.abc import Callable
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
Lenet = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def lenet(tmp_path: Path) -> Lenet:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(
            [LENET, "data", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )

    return run


def refused(done: subprocess.CompletedProcess[str], complaint: str) -> None:
    assert done.returncode in (1, 2)
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_published_dataset_from_source_to_page(lenet: Lenet, tmp_path: Path) -> None:
    assert "nothing in the store yet" in lenet("list").stdout
    prepared = lenet("prepare", "--validation-fraction", "0.1")
    assert prepared.returncode == 0, prepared.stderr
    (manifest,) = list_manifests(open_store(str(tmp_path / "store")))
    assert f"fashion-mnist version {manifest.version}: " in prepared.stdout
    assert {split: manifest.rows(split) for split in manifest.splits} == {
        "train": 54_000,
        "validation": 6_000,
        "test": 10_000,
    }
    listed = lenet("list").stdout
    assert "54,000 train, 6,000 validation, 10,000 test" in listed
    assert all(name in listed for name in ("mnist", "kmnist", "qmnist", "emnist-letters"))
    assert lenet("verify").returncode == 0
    assert lenet("show", "fashion-mnist").returncode == 0
    assert "<h1>fashion-mnist</h1>" in (tmp_path / "fashion-mnist.html").read_text()
    shown = lenet("show", "fashion-mnist", "--output", "sheet.png", "--samples", "5")
    assert shown.returncode == 0
    assert Image.open(tmp_path / "sheet.png").size == (180 + 5 * 30, 300)

    shard = next((tmp_path / "store").rglob("train-00002-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(lenet("show", "cifar"), "dataset='cifar': ")
    broken = lenet("verify", "fashion-mnist")
    assert broken.returncode == 1
    assert f"{shard}: shard is altered" in broken.stderr


def test_a_persons_own_folder_of_pictures(lenet: Lenet, tmp_path: Path, small_splits: "Splits") -> None:
    for split, (images, labels) in small_splits.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            if label < 3:
                folder = tmp_path / "pictures" / split / f"kind {label}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{number}.png")
    done = lenet("prepare", "--dataset", "my-own", "--source", "pictures")
    assert done.returncode == 0, done.stderr
    (manifest,) = list_manifests(open_store(str(tmp_path / "store")))
    assert manifest.classes == ("kind 0", "kind 1", "kind 2")
    assert manifest.rows("train") == int((small_splits["train"][1] < 3).sum())
    assert lenet("show", "my-own").returncode == 0


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
        (["show", "fashion-mnist", "--samples", "0"], "samples=0: "),
        (["lst"], "lst"),
    ],
)
def test_a_mistake_costs_a_line(
    arguments: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        main(["data", *arguments])
    output = capsys.readouterr()
    assert exited.value.code in (1, 2)
    assert complaint in output.err
    assert len(output.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
