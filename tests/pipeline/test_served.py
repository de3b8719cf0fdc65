"""Proves that every URL of a model means what it should, and that no model is served that was altered."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lenet.model import LeNet
from pipeline.artifacts import SAFETENSORS, predictor
from pipeline.errors import ConfigError, DataError
from pipeline.publish import run_folder
from pipeline.registry import promote_by_hand, register
from pipeline.served import find_place, open_model
from pipeline.storage import Store, open_store

if TYPE_CHECKING:
    from tests.conftest import Splits
    from tests.pipeline.conftest import Receipts

Trained = Callable[..., "Receipts"]


def test_every_url_finds_its_model(
    store: Store, published: list[str], small_splits: "Splits", good_models: list[LeNet]
) -> None:
    for run_id in published:
        register(store, "lenet", run_id)
    promote_by_hand(store, "lenet", 3)
    images = small_splits["test"][0]
    for tail, run_id in {
        "": "r2",
        "/": "r2",
        "/models/lenet": "r2",
        "/models/lenet/champion.json": "r2",
        "/models/lenet/versions/2": "r1",
        "/models/lenet/versions/2/version.json": "r1",
        "/runs/r3": "r3",
        "/runs/r3/report.html": "r3",
    }.items():
        served = open_model(store.url + tail)
        assert served.run_id == run_id, tail
        assert served.classes[0] == "T-shirt/top"
        assert served.image_shape == (28, 28)
        assert (served.version is None) == ("/runs/" in tail)
        assert open_model(served.url).place == served.place
        assert np.array_equal(served.predict(images), predictor(good_models[int(run_id[1])])(images))


def test_a_store_may_have_any_name_and_be_where_we_are(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "models" / "store"))
    trained(store, "r", seed=0).publish(store)
    register(store, "lenet", "r")
    promote_by_hand(store, "lenet", 1)
    monkeypatch.chdir(store.root)
    for url in (store.root, f"{store.root}/models/lenet", ".", "models/lenet", "models/lenet/versions/1", "runs/r"):
        found = find_place(url)
        assert (found.run_id, found.store.root) == ("r", store.root), url


def test_a_bucket_may_be_named_models(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("pipeline.served.open_store", lambda url: asked.append(url) or open_store("nowhere"))
    with pytest.raises(ConfigError, match="^model='s3://models/prefix': there is no store with a model; name"):
        find_place("s3://models/prefix")
    assert asked == ["s3://models/prefix"]


def test_a_url_with_nothing_there_says_so(store: Store, published: list[str]) -> None:
    with pytest.raises(ConfigError, match="there is no champion of lenet; train one"):
        open_model(store.url)
    with pytest.raises(ConfigError, match=f"^model='{store.url}/models/mine': there is no champion of mine; train one"):
        open_model(f"{store.url}/models/mine")
    with pytest.raises(ConfigError, match=f"^model='{store.url}/no': there is no store with a model; name the store, "):
        open_model(f"{store.url}/no")
    with pytest.raises(DataError, match="/runs/nobody: no published run; lenet runs lists them"):
        find_place(f"{store.url}/runs/nobody")
    assert find_place(f"{store.url}/runs/{published[0]}/model.safetensors").run_id == published[0]
    register(store, "mine", published[0])
    with pytest.raises(ConfigError, match="there is no champion of lenet; name models/mine in it"):
        open_model(store.url)
    register(store, "lenet", published[0])
    with pytest.raises(DataError, match="has no version 7; lenet models lists them"):
        find_place(f"{store.url}/models/lenet/versions/7")
    with pytest.raises(DataError, match="has no version 7"):
        promote_by_hand(store, "lenet", 7)
    with pytest.raises(DataError, match="no published run"):
        register(store, "lenet", "r9")


@pytest.mark.parametrize("what", ["model", "manifest"])
def test_an_altered_model_is_not_served(store: Store, published: list[str], what: str) -> None:
    register(store, "lenet", published[0])
    promote_by_hand(store, "lenet", 1)
    name = SAFETENSORS if what == "model" else "manifest.json"
    key = f"{run_folder('r0')}/{name}"
    data = store.read(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]) if what == "model" else data.replace(b"  ", b" "))
    with pytest.raises(DataError, match=f"{name}: its sha256 is not"):
        open_model(store.url)


@pytest.mark.parametrize(
    ("name", "this", "that"),
    [
        ("champion.json", '"run_id": "r0"', '"run_id": "r1"'),
        ("versions/1/version.json", '"run_id": "r0"', '"run_id": "r1"'),
        ("versions/1/version.json", '"accuracy": 0', '"accuracy": 1'),
    ],
)
def test_a_version_that_is_not_what_its_run_gives_is_not_served(
    store: Store, published: list[str], name: str, this: str, that: str
) -> None:
    register(store, "lenet", published[0])
    promote_by_hand(store, "lenet", 1)
    key = f"models/lenet/{name}"
    before = store.read(key)
    assert this.encode() in before
    store.put(key, before.replace(this.encode(), that.encode(), 1))
    with pytest.raises(DataError, match=r"version.json: is not what run r[01] gives; .* was altered, do not use it$"):
        open_model(store.url)
