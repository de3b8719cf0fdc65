"""Proves that a run's parameters are checked before any work, and that a run is continued only as it was begun."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from lenet.recipe import RECIPES
from pipeline import run
from pipeline.config import config_of as checked
from pipeline.errors import ConfigError, DataError
from pipeline.publish import code_of_pages, read_report
from pipeline.recipe import encode_recipe, varied
from pipeline.record import RunRecord, keep_record, lineage, read_record, versions
from pipeline.run import RunConfig
from pipeline.shards import Manifest
from pipeline.source import Source
from pipeline.storage import Store, open_store
from tests.pipeline.conftest import Page

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts


def config_of(parameters: dict[str, Any]) -> RunConfig:
    return checked(parameters, RunConfig)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"recipe": "x"}, "recipe='x': no such recipe; use one of seed, classic, modern, or a recipe's .json file"),
        ({"epochs": 0}, "epochs=0: it should be greater than or equal to 1; use a number from 1 to 10000"),
        ({"epochs": 10_001}, "epochs=10001: it should be less than or equal to 10000; use a number from 1 to 10000"),
        ({"global_batch_size": 0}, "global_batch_size=0: it should be greater than or equal to 1; "
                                   "use a number from 1 to 1000000"),
        ({"lr": 0}, "lr=0: it should be greater than 0; use a number above 0, up to 100"),
        ({"workers": 0}, "workers=0: it should be auto, a number from 1 to 10000 or a range of them; "
                         "use one like 2 or 2-8"),
        ({"shard_mib": 5000}, "shard_mib=5000: it should be less than or equal to 1024; "
                              "use a number above 0, up to 1024"),
        ({"scale": 1}, "scale=1: it should be less than 1; use a number from 0, below 1"),
        ({"validation_fraction": 0.6}, "validation_fraction=0.6: it should be less than or equal to 0.5; "
                                       "use a number from 0 to 0.5"),
        ({"checkpoint_steps": 0}, "checkpoint_steps=0: it should be greater than or equal to 1; use a number from 1"),
        ({"gpu": "maybe"}, "gpu='maybe': it should be 'auto', 'yes' or 'no'; use one of auto, yes, no"),
    ],
)  # fmt: skip
def test_a_bad_parameter_gives_one_line(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(parameters)
    assert str(caught.value) == message


def test_an_unknown_parameter_and_a_bad_run_id_are_refused() -> None:
    with pytest.raises(ConfigError, match="^epoch=3: .*; use one of dataset, source, "):
        config_of({"epoch": 3})
    with pytest.raises(ConfigError, match=r"^run_id='\.\./x': .*small letters"):
        config_of({"run_id": "../x"})


def test_what_is_not_given_is_the_recipes_own() -> None:
    recipe = config_of({"lr": 0.1}).resolved()
    assert (recipe.epochs, recipe.global_batch_size, recipe.lr) == (10, 256, 0.1)


def test_every_parameter_has_a_help_text() -> None:
    assert all(field.description for field in RunConfig.model_fields.values())


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"workers": 1000}, "workers"),
        ({"gpu": "yes", "workers": 1}, "gpu"),
        ({"source": "/nowhere"}, "source"),
        ({"dataset": "cifar"}, "dataset"),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_any_work(
    tmp_path: Path, parameters: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run.begin(config_of({"storage": str(tmp_path / "store"), **parameters}), "r")
    assert caught.value.args[0] == field
    assert not (tmp_path / "store").exists()


def test_a_run_goes_on_with_other_workers_but_not_with_another_seed(tmp_path: Path) -> None:
    begun = run.begin(config_of({"storage": str(tmp_path), "seed": 1, "workers": 2}), "r")
    assert begun.run_id == "r"
    run.begin(config_of({"storage": str(tmp_path), "seed": 1, "workers": 1}), "r")
    with pytest.raises(ConfigError, match="^seed=2: run r was begun with 1; keep that, or use another run_id$"):
        run.begin(config_of({"storage": str(tmp_path), "seed": 2}), "r")


def test_a_search_whose_recipe_cannot_be_written_does_not_begin(tmp_path: Path) -> None:
    folder, kept = tmp_path / "folder.json", tmp_path / "kept.json"
    folder.mkdir()
    kept.write_text("as it was")
    for output in (folder, kept):
        search = {"storage": str(tmp_path / "store"), "output": str(output), "workers": 1000}
        with pytest.raises(ConfigError) as raised:
            run.tune(checked(search, run.TuneRunConfig))
        assert raised.value.args[0] == ("output" if output is folder else "workers")
    assert kept.read_text() == "as it was"


def test_a_job_has_the_store_and_all_of_a_recipe_whose_file_is_not_where_it_runs(
    tmp_path: Path, small_manifest: Callable[[Store], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.json"
    file.write_bytes(encode_recipe(varied(RECIPES["modern"], {"lr": 0.03, "shift": 1})))
    given = {"storage": "./store", "run_id": "r", "recipe": str(file), "epochs": 5}
    config = config_of({**given, "ray_address": "http://127.0.0.1:8265"})
    here = config.resolved()
    submitted: list[dict[str, Any]] = []
    monkeypatch.setattr("pipeline.jobs.run_job", lambda address, work: submitted.append(work.asked["parameters"]))
    run.train(config, small_manifest(open_store(config.storage)))
    file.unlink()
    there = config_of(submitted[0])
    assert varied(there.resolved(), {"name": here.name}) == here
    assert (there.run_id, there.storage) == ("r", (tmp_path / "store").as_uri())


def test_the_record_has_all_of_a_recipe_whose_file_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(encode_recipe(varied(RECIPES["modern"], {"lr": 0.03, "shift": 1})))
    config = run.begin(config_of({"storage": str(tmp_path), "recipe": str(file), "epochs": 5}), "r")
    before = config.resolved()
    file.unlink()
    given = run.parameters_of(read_record(open_store(str(tmp_path)), "r"))
    assert varied(config_of(given).resolved(), {"name": before.name}) == before
    run.begin(config_of({"storage": str(tmp_path), "recipe": "modern"}), "other")
    assert run.parameters_of(read_record(open_store(str(tmp_path)), "other"))["recipe"] == "modern"


def test_a_run_goes_on_with_its_recipes_file_by_another_path_but_not_with_other_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"storage": "store", "workers": 1, "recipe": "mine.json"}
    for name in ("mine.json", "moved.json"):
        Path(name).write_bytes(encode_recipe(varied(RECIPES["seed"], {"lr": 0.5})))
    Path("other.json").write_bytes(encode_recipe(RECIPES["seed"]))
    run.begin(config_of(given), "r")
    for same in ("./mine.json", str(tmp_path / "mine.json"), "moved.json"):
        run.begin(config_of(given | {"recipe": same}), "r")
    with pytest.raises(ConfigError, match=r"^lr=0\.9: run r was begun with 0\.5; keep that, or use another run_id$"):
        run.begin(config_of(given | {"recipe": "other.json"}), "r")
    with pytest.raises(ConfigError, match=r"^recipe='seed': run r was begun with 'mine\.json'; keep that"):
        run.begin(config_of(given | {"recipe": "seed", "lr": 0.5}), "r")


def test_the_record_names_the_code_and_the_packages(tmp_path: Path) -> None:
    run.begin(config_of({"storage": str(tmp_path)}), "r")
    record = read_record(open_store(str(tmp_path)), "r")
    assert {"code", "python", "torch", "ray", "prefect"} <= record.versions.keys()
    assert record.parameters["run_id"] == "r"
    assert (record.parameters["epochs"], record.parameters["lr"]) == (10, 0.9)  # not "the recipe's own"


def test_the_record_names_what_convolves(monkeypatch: pytest.MonkeyPatch) -> None:
    for lanes, expected in ((16, "compiled, 16 images at a time"), (8, "compiled, 8 images at a time"), (0, "torch's")):
        monkeypatch.setattr("lenet.compiled.library_for", lambda of, lanes=lanes: of == lanes)
        assert lineage()["convolutions"] == expected


def test_the_report_names_other_versions_that_published_the_run(
    local_store: Store, trained: Callable[..., "Receipts"]
) -> None:
    left = trained(local_store, "r")
    config = config_of({"storage": local_store.url, "run_id": "r"})
    record = RunRecord(parameters=config.model_dump(mode="json"), versions=versions() | {"code": "of before"})
    keep_record(local_store, "r", record)
    run.publish(config, left.manifest, left.training, left.evaluation)
    found = read_report(local_store, "r").versions
    assert found == record.versions | {"code, when published": versions()["code"]}
    page = Page(local_store.read("runs/r/report.html").decode())
    assert f"code of before python {found['python']} " in page.text
    assert f"code, when published {found['code, when published']}" in page.text


def test_the_code_of_the_pages_is_that_which_began_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code_of_pages.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.publish.code_on_disk", lambda: "as it was loaded")
            run.begin(config_of({"storage": str(tmp_path)}), "r")
        assert code_of_pages() == "as it was loaded"
    finally:
        code_of_pages.cache_clear()


def test_the_code_is_what_the_image_says_where_there_is_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENET_REVISION", "0123456789ab")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions()["code"] == "0123456789ab"
    monkeypatch.delenv("LENET_REVISION")
    assert versions()["code"] == "unknown"


def test_a_dataset_in_the_store_is_neither_fetched_nor_written_again(tmp_path: Path, fashion_mnist: Source) -> None:
    config = run.begin(config_of({"storage": str(tmp_path), "source": str(fashion_mnist.folder)}), "r")
    first = run.shard(config, run.download(config))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert run.download(config) is None
    assert run.shard(config, None) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == times


def test_a_run_keeps_to_its_dataset_whatever_becomes_of_the_source(tmp_path: Path) -> None:
    store, photos = open_store(str(tmp_path / "store")), tmp_path / "photos"

    def add_photos(number: int) -> None:
        for name, grey in (("dark", 20), ("light", 200)):
            (photos / name).mkdir(parents=True, exist_ok=True)
            for count in range(20):
                Image.new("L", (28, 28), grey + count).save(photos / name / f"{number}-{count}.png")

    def shard(run_id: str) -> Manifest:
        given = {"storage": store.url, "dataset": "mine", "source": str(photos), "test_fraction": 0.2}
        config = run.begin(config_of(given), run_id)
        return run.shard(config, run.download(config))

    add_photos(1)
    first = shard("r")
    add_photos(2)
    assert shard("r") == first
    assert shard("other").digest != first.digest
    store.delete(first.folder)
    with pytest.raises(
        ConfigError, match=f"^source=.*: version .{{12}} comes of it, and run r was begun with {first.version}"
    ):
        shard("r")
    for photo in photos.rglob("2-*.png"):
        photo.unlink()
    assert shard("r") == first
    shutil.rmtree(photos)
    assert shard("r") == first


def test_a_flipped_byte_in_a_shard_stops_the_run_before_training(tmp_path: Path) -> None:
    config = run.begin(config_of({"storage": str(tmp_path)}), "r")
    run.shard(config, run.download(config))
    shard = next(tmp_path.rglob("train-00003-of-00006.parquet"))
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="train-00003-of-00006.parquet: shard is altered"):
        run.shard(config, run.download(config))
