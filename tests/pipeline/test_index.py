"""Proves that the index shows every run and champion, whoever else writes it, and that no text in it becomes markup."""

import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest
import s3fs

from lenet.model import LeNet
from pipeline.drawings import draw_accuracies
from pipeline.errors import StorageError
from pipeline.index import INDEX, read_entries, refresh_index, render_index, write_index
from pipeline.promotion import PromoteConfig
from pipeline.publish import Headline, RunManifest
from pipeline.registry import promote, promote_by_hand, register, roll_back
from pipeline.storage import Store, open_store
from pipeline.strays import find_strays
from tests.pipeline.conftest import Page

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

FINISHED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}'&$\\frac$"]  # fmt: skip
MANIFEST = RunManifest(format_version=2, run_id="r", finished=FINISHED, accuracy=0.8, dataset_digest="d",
                       artifacts={})  # fmt: skip
Trained = Callable[..., "Receipts"]


def announce(
    store: Store, run_id: str, hours: int = 0, accuracy: float = 0.8, dataset: str = "fashion-mnist", recipe: str = "r"
) -> str:
    """Publish a run with nothing in it but its manifest and a page."""
    headline = Headline(dataset=dataset, recipe=recipe, workers=2, accuracy_low=accuracy - 0.01,
                        accuracy_high=accuracy + 0.01)  # fmt: skip
    run = RunManifest(format_version=2, run_id=run_id, finished=FINISHED + timedelta(hours=hours), accuracy=accuracy,
                      dataset_digest="d", headline=headline, artifacts={})  # fmt: skip
    store.create(f"runs/{run_id}/report.html", b"<!doctype html><title>a report</title>")
    store.create(f"runs/{run_id}/manifest.json", run.model_dump_json().encode())
    return run_id


def index(store: Store) -> Page:
    return Page(store.read(INDEX).decode())


def test_every_run_is_listed_with_what_became_of_it(store: Store, trained: Trained, good_models: list[LeNet]) -> None:
    rule = PromoteConfig(max_f1_drop=1, max_ece_rise=1)
    for hour, number in enumerate((0, 3, 1)):
        trained(store, f"r{number}", FINISHED + timedelta(hours=hour), model=good_models[number]).publish(store)
        promote(store, rule, register(store, "lenet", f"r{number}"))
    announce(store, "not-registered", hours=9)
    register(store, "other", announce(store, "undecided"))
    store.put("runs/unpublished/report.html", b"x")
    write_index(store)
    page = index(store)
    assert "Published runs 5 Models 2 Last run finished 2026-01-02 12:04 UTC" in page.text
    found = read_entries(store)
    assert [model.name for model in found.models] == ["lenet", "other"]
    lenet, other = found.models
    assert [(entry.version, entry.run_id, entry.standing) for entry in lenet.entries] == [
        (3, "r1", "not promoted"),
        (2, "r3", "champion"),
        (1, "r0", "was champion"),
    ]
    assert [(entry.run_id, entry.standing) for entry in other.entries] == [("undecided", "undecided")]
    assert [entry.run_id for entry in found.others] == ["not-registered"]
    best = lenet.champion
    assert best is not None
    assert best.headline is not None
    low, high = best.headline.accuracy_low, best.headline.accuracy_high
    row = (
        f"2 r3 fashion-mnist · seed · 2 workers · 2026-01-02 04:04 UTC champion {best.why} fashion-mnist seed 2 "
        f"2026-01-02 04:04 {best.accuracy:.2%} {100 * low:.1f}–{100 * high:.1f} champion {best.why}"
    )
    assert row.replace("%", " %") in page.text.replace("\N{NO-BREAK SPACE}", " "), page.text
    assert re.fullmatch(r"it recognises \d+ images more, p [=<] \S+", best.why)
    assert "was champion there was no champion before" in page.text
    assert set(page.links) == {f"runs/{run_id}/report.html" for run_id in ("r0", "r1", "r3", "undecided",
                                                                           "not-registered")}  # fmt: skip
    assert all(store.exists(link) for link in page.links)
    assert [tag for tag, _ in page.tags].count("svg") == 2
    promote_by_hand(store, "lenet", 1)
    write_index(store)
    assert "champion by hand" in index(store).text
    roll_back(store, "lenet")
    write_index(store)
    assert "champion by rollback" in index(store).text


def test_an_empty_store_has_an_index_too(store: Store) -> None:
    write_index(store)
    assert "No run has been published yet." in index(store).text


def test_a_run_of_before_there_were_headlines_is_listed(local_store: Store) -> None:
    local_store.create("runs/r/manifest.json", MANIFEST.model_dump_json(exclude={"headline"}).encode())
    announce(local_store, "plain")
    register(local_store, "lenet", "r")
    write_index(local_store)
    page = index(local_store)
    assert "not recorded" in page.text
    assert page.links == ["runs/plain/report.html"]  # the old one has no page to link to


def test_the_same_store_gives_the_same_bytes_and_no_write(store: Store) -> None:
    register(store, "lenet", announce(store, "r"))
    promote_by_hand(store, "lenet", 1)
    write_index(store)
    before, written = store.read(INDEX), store.listing("")[INDEX].written
    write_index(store)
    assert (store.read(INDEX), store.listing("")[INDEX].written) == (before, written)


def test_ten_publishers_at_once_leave_an_index_of_all(store: Store) -> None:
    def one(number: int) -> None:
        mine = open_store(store.url)
        register(mine, "lenet", announce(mine, f"r{number}", hours=number))
        write_index(mine)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(one, range(10)))
    page = index(store)
    assert sorted(page.links) == [f"runs/r{number}/report.html" for number in range(10)]
    assert page.text.endswith("undecided")


def test_a_writer_that_listed_before_another_wrote_lists_again(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(local_store, "first")
    write_index(local_store)
    slow, real = open_store(local_store.url), Store.replace
    announce(slow, "mine")

    def overtaken(key: str, data: bytes, expected: bytes | None) -> bool:
        monkeypatch.undo()
        announce(local_store, "theirs")
        write_index(local_store)
        return real(slow, key, data, expected)

    monkeypatch.setattr(slow, "replace", overtaken)
    write_index(slow)
    assert sorted(index(local_store).links) == [f"runs/{name}/report.html" for name in ("first", "mine", "theirs")]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_becomes_markup(local_store: Store, hostile: str) -> None:
    def page_of(text: str) -> Page:
        found = read_entries(local_store)
        names = {"fashion-mnist": text, "r": text, "plain": text, "lenet": text}

        def swapped(value: object) -> object:
            match value:
                case str():
                    return names.get(value, value)
                case list():
                    return [swapped(one) for one in value]
                case Headline():
                    return value.model_copy(update={"dataset": text, "recipe": text})
            if hasattr(value, "__dataclass_fields__"):
                return type(value)(**{name: swapped(part) for name, part in vars(value).items()})
            return value

        return Page(render_index(swapped(found)))  # type: ignore[arg-type]

    register(local_store, "lenet", announce(local_store, "plain"))
    announce(local_store, "other")
    promote_by_hand(local_store, "lenet", 1)
    page, harmless = page_of(hostile), page_of("text")
    assert page.text.count(hostile) > 5
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]


def test_a_link_to_a_folder_with_any_name_stays_in_the_store(local_store: Store) -> None:
    name = "a b#c?d%e\"'<x>"
    announce(local_store, name)
    write_index(local_store)
    (link,) = index(local_store).links
    assert re.fullmatch(r"runs/[\w%.~-]+/report\.html", link), link
    assert unquote(link) == f"runs/{name}/report.html"


def test_what_is_damaged_or_gone_is_left_out(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good", "damaged", "going"):
        announce(store, name)
    store.put("runs/damaged/manifest.json", b"{")
    real = store.read

    def read(key: str) -> bytes:
        if key == "runs/going/manifest.json":
            store.delete("runs/going")  # by a retention that runs at the same time
        return real(key)

    monkeypatch.setattr(store, "read", read)
    write_index(store)
    assert index(store).links == ["runs/good/report.html"]
    assert [
        record.getMessage().partition(": damaged")[0] for record in caplog.records if record.levelname == "WARNING"
    ] == [store.locate("runs/damaged/manifest.json")]


def test_a_copy_of_a_run_is_no_other_run(store: Store) -> None:
    register(store, "lenet", announce(store, "registered"))
    announce(store, "plain")
    for run_id in ("registered", "plain"):
        store.put(f"runs/copy-of-{run_id}/manifest.json", store.read(f"runs/{run_id}/manifest.json"))
    found = read_entries(store)
    assert [entry.run_id for entry in found.models[0].entries] == ["registered"]
    assert [entry.run_id for entry in found.others] == ["plain"]


def test_an_index_that_cannot_be_written_is_only_warned_of(
    local_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    local_store.put(f"{INDEX}/in-the-way", b"x")
    with pytest.raises(StorageError):
        write_index(local_store)
    refresh_index(local_store)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith("the index of all runs is not up to date: ")


def test_one_object_is_read_for_each_run(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        run_id = announce(local_store, f"r{number}", hours=number)
        if number % 2:
            register(local_store, "lenet", run_id)
    promote_by_hand(local_store, "lenet", 7)
    read: list[str] = []
    real = local_store.read

    def counted(key: str) -> bytes:
        read.append(key)
        return real(key)

    monkeypatch.setattr(local_store, "read", counted)
    entries = read_entries(local_store)
    assert len(entries.models[0].entries) == len(entries.others) == 20
    assert len(read) == 40 + 1  # and the champion


def test_any_span_of_time_can_be_drawn() -> None:
    for seconds in (0, 1e-3, *(3.0**power for power in range(19))):  # up to twelve years
        points = [(FINISHED, 0.8), (FINISHED + timedelta(seconds=seconds), 0.9)]
        drawing = draw_accuracies([points], points[:1], "salt")
        assert 2 <= drawing.count("xtick") <= 9, seconds


def test_the_index_is_no_stray(store: Store) -> None:
    write_index(store)
    store.put("runs/r/manifest.json", MANIFEST.model_dump_json().encode())
    write_index(store)
    assert store.exists(INDEX)
    assert find_strays(store, timedelta(0)) == []


def test_s3_serves_it_as_a_page(s3_store: Store) -> None:
    announce(s3_store, "r")
    write_index(s3_store)
    announce(s3_store, "r2")
    write_index(s3_store)
    plain = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], skip_instance_cache=True)
    kinds = {key: plain.info(f"{s3_store.root}/{key}")["ContentType"] for key in s3_store.keys("")}
    assert {key.rpartition(".")[2]: kind for key, kind in kinds.items()} == {
        "html": "text/html",
        "json": "application/json",
    }
