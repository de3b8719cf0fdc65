"""Proves that pictures can be predicted from the command line, and a batch as a flow with its artifact in Prefect."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cyclopts import App, CycloptsError
from PIL import Image
from prefect.client.orchestration import get_client
from rich.console import Console

import flows.predict
from flows.predict import predict, table_of
from lenet.recipe import RECIPES
from pipeline.artifacts import artifact_of
from pipeline.batch import PredictConfig
from pipeline.checkpoint import encode_model
from pipeline.errors import ConfigError, DataError
from pipeline.predict import predict_pictures
from pipeline.publish import RunManifest
from pipeline.registry import promote_by_hand, register
from pipeline.served import open_model
from pipeline.storage import open_store

if TYPE_CHECKING:
    from tests.conftest import Splits


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """./store with the least that a champion consists of: a manifest, the weights, a version and the alias."""
    monkeypatch.chdir(tmp_path)
    store = open_store("store")
    weights = encode_model(RECIPES["seed"].build_model(10, 0))
    run = RunManifest(
        format_version=2, run_id="some-run", finished=datetime(2026, 1, 2, tzinfo=UTC), accuracy=0.1,
        dataset_folder="datasets/x", dataset_digest="d", test_digest="t", classes=tuple("abcdefghij"),
        image_shape=(28, 28), artifacts={"model.safetensors": artifact_of(weights)},
    )  # fmt: skip
    store.create("runs/some-run/model.safetensors", weights)
    store.create("runs/some-run/manifest.json", run.model_dump_json().encode())
    promote_by_hand(store, "lenet", register(store, "lenet", "some-run").version)
    return tmp_path / "store"


@pytest.fixture
def pictures(tmp_path: Path, small_splits: "Splits") -> list[Path]:
    """Two real images: as it is, and large on white."""
    paths = [tmp_path / "plain.png", tmp_path / "photo of [a] shoe.jpg"]
    image = small_splits["test"][0][0]
    Image.fromarray(image).save(paths[0])
    Image.fromarray(255 - image).resize((300, 200)).save(paths[1])
    return paths


def lenet(*arguments: object) -> None:
    app = App(print_error=False, exit_on_error=False, result_action="return_value")
    app.command(predict)
    app(["predict", *map(str, arguments)])


def test_a_line_for_each_picture(store: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    lenet(*pictures, "--top", "2")
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    expected = predict_pictures(open_model(str(store)), pictures)
    for line, prediction, path in zip(lines, expected, pictures, strict=True):
        likeliest, second = sorted(prediction.probabilities, reverse=True)[:2]
        first, next_ = (prediction.probabilities.index(value) for value in (likeliest, second))
        assert line[:3] == [str(path), "abcdefghij"[first], f"{likeliest:.4f}"]
        assert line[3:] == ["abcdefghij"[next_], f"{second:.4f}"]
    lenet(*pictures, "--top", "2", "--storage", "store")  # as other commands name it
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == lines
    lenet(pictures[0], "--invert", "yes", "--model", store / "runs" / "some-run", "--top", "99")
    (line,) = capsys.readouterr().out.splitlines()
    (inverted,) = predict_pictures(open_model(str(store)), pictures[:1], "yes")
    surest = max(inverted.probabilities)
    assert line.split("\t")[1:3] == ["abcdefghij"[inverted.probabilities.index(surest)], f"{surest:.4f}"]
    assert len(line.split("\t")) == 21


def test_a_table_on_a_terminal(
    store: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        flows.predict, "Console", lambda **options: Console(force_terminal=True, width=200, no_color=True, **options)
    )
    lenet(*pictures)
    text = capsys.readouterr().out
    assert "resized from 300x200, inverted" in text
    assert "photo of [a] shoe.jpg" in text
    assert "by lenet version 1 (some-run)" in text
    rows = table_of(predict_pictures(open_model(str(store)), pictures), tuple("abcdefghij"), 1).rows
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["none.png"], ConfigError, "images='none.png': no such file; name a PNG or JPEG"),
        (["store"], ConfigError, "images='store': a folder; name the pictures in it"),
        (["plain.png", "bad.png"], DataError, "bad.png: neither PNG nor JPEG; give a whole PNG or JPEG"),
        (["plain.png", "--top", "2.6"], CycloptsError, '"2.6" is no whole number'),
        (
            ["plain.png", "--model", "lenet"],
            ConfigError,
            "model='lenet': there is no store with a model; name the store, e.g. ./store, or ./store/models/NAME",
        ),
        (
            ["plain.png", "--model", "./store/models/mine"],
            ConfigError,
            "model='./store/models/mine': there is no champion of mine; name models/lenet in it",
        ),
    ],
)
def test_a_mistake_costs_a_line(
    store: Path, pictures: list[Path], arguments: list[str], kind: type[Exception], message: str
) -> None:
    (store.parent / "bad.png").write_bytes(b"no picture")
    with pytest.raises(kind) as raised:
        lenet(*arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_flow_predicts_and_shows_what_came_of_it(
    prefect: None, store: Path, tmp_path: Path, small_splits: "Splits", caplog: pytest.LogCaptureFixture
) -> None:
    from flows.predict_lenet import predict_lenet

    for row, image in enumerate(small_splits["test"][0][:20]):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / f"{row}.png")
    flow: Any = predict_lenet
    report = flow(source="in", output="out", workers=1)
    assert (report.images, report.run_id) == (20, "some-run")
    with get_client(sync_client=True) as client:
        response: Any = client.request("POST", "/artifacts/latest/filter")
    (shown,) = [artifact["data"] for artifact in response.json() if artifact["key"] == "predictions"]
    assert "# 20 images predicted by lenet version 1 (some-run)" in shown
    assert "images predicted by lenet version 1 (some-run)" in caplog.text


def test_the_flows_form_has_every_parameter_with_its_help() -> None:
    from flows.predict_lenet import predict_lenet

    properties = predict_lenet.parameters.properties
    assert set(properties) == set(PredictConfig.model_fields)
    for name, field in PredictConfig.model_fields.items():
        assert str(field.description) in properties[name]["description"]
    assert predict_lenet.parameters.required == ["source", "output"]
