"""Proves that a trained model can be listed, verified, exported, used and done again from the command line."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from flows.cli import main
from lenet.step import normalise
from pipeline.checkpoint import decode_model
from pipeline.idx import Pixels
from pipeline.publish import run_folder
from pipeline.storage import open_store
from pipeline.train import staging
from tests.flows.conftest import GoneOn

BIN = Path(sys.executable).parent
Lenet = Callable[..., str]


@pytest.fixture
def trained_store(gone_on: GoneOn) -> str:
    """A store with one run, `r`, brought there by the command."""
    return gone_on.storage


@pytest.fixture
def lenet(trained_store: str, capsys: pytest.CaptureFixture[str]) -> Lenet:
    """Function that runs a command in this process and gives what it prints."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert not left.value.code, said.err
        return said.out

    return run


def test_models_are_listed_with_the_champion(lenet: Lenet, trained_store: str) -> None:
    line = lenet("models", "--storage", trained_store).splitlines()[-1]
    assert re.fullmatch(r" *lenet +1 +champion +r +0\.[78]\d+ .* UTC +there was no champion before *", line), line


def test_a_fresh_run_is_verified_and_an_altered_one_is_not(
    lenet: Lenet, trained_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lenet("verify", trained_store).splitlines()
    assert lines[-1] == f"verified: {trained_store}"
    assert len([line for line in lines if line.startswith("ok  ")]) == 6
    assert lenet("verify", "--storage", trained_store).splitlines() == lines
    store = open_store(trained_store)
    key = f"{run_folder('r')}/model.onnx"
    whole = store.read(key)
    try:
        store.put(key, whole[:-1])
        with pytest.raises(SystemExit) as left:
            main(["verify", f"{trained_store}/runs/r"])
    finally:
        store.put(key, whole)
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"lenet: \S+/runs/r/model\.onnx: its sha256 is not the recorded [^\n]+\n", said), said


def test_the_exported_forms_agree_outside_of_this_package(
    lenet: Lenet, trained_store: str, tmp_path: Path, full_splits: dict[str, tuple[Pixels, Pixels]]
) -> None:
    out = lenet("export", trained_store, tmp_path / "out")
    assert len(out.splitlines()) == 4
    images = normalise(torch.from_numpy(np.array(full_splits["test"][0][:500])))
    with torch.inference_mode():
        expected = decode_model((tmp_path / "out/model.safetensors").read_bytes())(images).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-4)
    with torch.inference_mode():
        exported = torch.export.load(tmp_path / "out/model.pt2").module()(images).numpy()
    np.testing.assert_allclose(exported, expected, atol=1e-4)
    assert (tmp_path / "out/README.md").read_text().startswith("---\n")
    assert lenet("export", trained_store, tmp_path / "out") == out  # the same again


def test_an_export_leaves_alone_what_is_there(
    trained_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(SystemExit) as left:
        main(["export", trained_store, str(tmp_path)])
    assert left.value.code == 2
    rule = "has another README.md, which stays as it is; name an empty folder"
    assert capsys.readouterr().err == f"lenet: output={str(tmp_path)!r}: {rule}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_picture_is_predicted_by_the_champion(
    lenet: Lenet, trained_store: str, tmp_path: Path, full_splits: dict[str, tuple[Pixels, Pixels]]
) -> None:
    images, labels = full_splits["test"]
    boot = np.array(images[int(np.flatnonzero(labels == 1)[0])])  # trousers: known after three epochs
    Image.fromarray(255 - boot).resize((280, 280)).save(tmp_path / "photo.jpg")
    assert "photo.jpg" in (out := lenet("predict", tmp_path / "photo.jpg", "--model", trained_store))
    assert "Trouser" in out.splitlines()[-1]


def test_a_run_done_again_gives_the_same_bytes_and_leaves_nothing(lenet: Lenet, trained_store: str) -> None:
    before = open_store(trained_store).keys("")
    out = lenet("reproduce", "r", "--storage", trained_store)
    assert re.search(r"reproduced: r, model\.safetensors is the same byte for byte, sha256 [0-9a-f]{64}\n", out)
    assert open_store(trained_store).keys("") == before


def test_a_published_model_that_is_not_the_one_trained_is_not_done_again(
    trained_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "copy"))
    shutil.copytree(trained_store, store.root)
    found = json.loads(store.read("runs/r/manifest.json"))
    found["artifacts"]["model.safetensors"]["sha256"] = "0" * 64
    store.put("runs/r/manifest.json", json.dumps(found).encode())
    with pytest.raises(SystemExit) as left:
        main(["reproduce", "r", "--storage", store.url])
    assert left.value.code == 1
    assert re.search(
        r"^lenet: \S+/runs/r: its model is not the one that the run has trained; do", capsys.readouterr().err
    )


def test_a_run_that_is_not_the_same_again_is_told_with_all_that_was_other(
    trained_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "copy"))
    shutil.copytree(trained_store, store.root)

    def edit(name: str, change: Callable[[Any], object]) -> None:
        found = json.loads(store.read(f"{staging('r')}/{name}"))
        change(found)
        store.put(f"{staging('r')}/{name}", json.dumps(found).encode())

    edit("run.json", lambda record: record["parameters"].update(seed=1, epochs=1))
    edit("run.json", lambda record: record["lineage"].update(convolutions="by hand"))
    edit("training.json", lambda training: training.update(device="abacus"))
    edit("training.json", lambda training: training["history"][0].update(world_size=9))
    before = store.keys("")
    with pytest.raises(SystemExit) as left:
        main(["reproduce", "r", "--storage", store.url])
    assert left.value.code == 1
    said = capsys.readouterr()
    assert re.search(r"lenet: run r: not reproduced, weights differ by up to \S+ \(sha256 ", said.err), said.err
    for line in (
        "convolutions: by hand then, .+ now",
        r"device: abacus then, \w+ now",
        r"workers: \d and 9 then, \d now",
    ):
        assert re.search(f"^other than then: {line}$", said.out, re.MULTILINE), said.out
    assert store.keys("") == before


def test_strays_are_listed_and_removed(lenet: Lenet, trained_store: str) -> None:
    store = open_store(trained_store)
    lenet("gc", "--storage", trained_store, "--older-than-hours", 0, "--delete")  # Ctrl-C may have broken off a write
    assert lenet("gc", "--storage", trained_store, "--older-than-hours", 0) == "0 strays\n"
    store.put("runs/gone/model.onnx", b"x")
    assert lenet("gc", "--storage", trained_store) == "0 strays\n"  # too young
    out = lenet("gc", "--storage", trained_store, "--older-than-hours", 0)
    assert re.fullmatch(r"\S+/runs/gone/model\.onnx  .* UTC  run gone was not published\n1 stray\n", out)
    assert store.exists("runs/gone/model.onnx")
    assert lenet("gc", "--storage", trained_store, "--older-than-hours", 0, "--delete").endswith("1 stray removed\n")
    assert not store.exists("runs/gone/model.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["promote", "7"], r"\S+: has no version 7; lenet models lists them"),
        (["rollback"], r"\S+: no champion came before; .*"),
        (["reproduce", "nobody"], r"\S+: no finished training; lenet runs lists the runs"),
    ],
)
def test_a_mistake_is_one_line(
    trained_store: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--storage", trained_store])
    assert left.value.code == 1
    assert re.fullmatch(f"lenet: {message}\n", capsys.readouterr().err)


def test_promoting_by_hand_names_the_champion(lenet: Lenet, trained_store: str) -> None:
    assert lenet("promote", 1, "--storage", trained_store) == "champion of lenet: version 1 (r)\n"
