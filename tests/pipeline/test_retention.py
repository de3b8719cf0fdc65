"""Proves that retention removes what is old and not needed, never anything else, and is completed wherever it dies."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenet.model import LeNet
from pipeline.errors import DataError, StorageError
from pipeline.index import INDEX, read_entries, write_index
from pipeline.predictions import read_predictions
from pipeline.promotion import PromoteConfig
from pipeline.publish import find_run, read_latest, verify_run
from pipeline.record import RunRecord, read_record
from pipeline.registry import promote, promote_by_hand, register
from pipeline.retention import Plan, RetentionConfig, RunFacts, gather, plan, remove, retain
from pipeline.run import RunConfig
from pipeline.run import promote as register_and_promote
from pipeline.run import publish as publish_again
from pipeline.runs import list_runs
from pipeline.served import open_model
from pipeline.storage import Store, open_store
from pipeline.strays import find_strays
from pipeline.train import find_training, staging

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

NOW = datetime(2026, 6, 1, tzinfo=UTC)
LATER = timedelta(days=100)
# Whatever is written now is old a hundred days from now, and nothing stays for being new.
ALL = RetentionConfig(keep_days=30, keep_last=0)
RECORD = RunRecord(parameters={"dataset": "fashion-mnist", "recipe": "seed", "epochs": 1}, versions={})
Trained = Callable[..., "Receipts"]


def facts(run_id: str, days: float, **rest: object) -> RunFacts:
    return RunFacts(run_id, NOW - timedelta(days=days), **{"published": True, "size": 10, **rest})  # type: ignore[arg-type]


some_facts = st.lists(
    st.builds(
        RunFacts,
        run_id=st.text("abc", min_size=1, max_size=3),
        active=st.integers(0, 100).map(lambda days: NOW - timedelta(days=days)),
        published=st.booleans(),
        held=st.lists(st.sampled_from(["lenet version 1", "the latest run"]), max_size=2).map(tuple),
        size=st.just(10),
        working=st.dictionaries(st.sampled_from(["ray", "export", "predictions"]), st.just(1)),
    ),
    unique_by=lambda run: run.run_id,
    max_size=12,
)  # fmt: skip
configs = st.builds(RetentionConfig, keep_days=st.integers(1, 60), keep_last=st.integers(0, 8))


@given(some_facts, configs)
def test_nothing_goes_that_is_needed_young_or_new(runs: list[RunFacts], config: RetentionConfig) -> None:
    found = plan(runs, config, NOW)
    removed = {removal.run_id: removal for removal in found.removals}
    assert len(removed) == len(found.removals)
    assert removed.keys() | found.kept.keys() == {run.run_id for run in runs}
    assert not removed.keys() & found.kept.keys()
    newest = sorted(runs, key=lambda run: (run.active, run.run_id))[len(runs) - min(config.keep_last, len(runs)) :]
    for run in runs:
        removal = removed.get(run.run_id)
        if run in newest or run.active > NOW - timedelta(days=config.keep_days):
            assert removal is None
        elif run.held:
            # Of what is needed, nothing but copies, and those only once there is what they are copies of.
            wanted = {f"staging/{run.run_id}/{name}" for name in run.working} if run.published else set()
            assert (set(removal.steps) if removal else set()) == wanted
            assert not (removal and removal.whole)
        else:
            assert removal is not None
            assert removal.whole
            assert {key.split("/")[1] for key in removal.steps} == {run.run_id}
    for removal in found.removals:
        assert all(key.startswith((f"staging/{removal.run_id}", f"runs/{removal.run_id}")) for key in removal.steps)


@given(some_facts, configs, st.data())
def test_a_plan_made_after_a_part_was_done_has_the_rest(
    runs: list[RunFacts], config: RetentionConfig, data: st.DataObject
) -> None:
    whole = plan(runs, config, NOW)
    done = data.draw(st.integers(0, len(whole.removals)))
    gone = {removal.run_id for removal in whole.removals[:done] if removal.whole}
    stripped = {removal.run_id for removal in whole.removals[:done] if not removal.whole}
    left = [
        replace(run, working={}) if run.run_id in stripped else run
        for run in runs
        if run.run_id not in gone
    ]  # fmt: skip
    assert plan(left, config, NOW).removals == whole.removals[done:]


def test_the_reasons_are_said() -> None:
    config = RetentionConfig(keep_days=10, keep_last=2)
    found = plan(
        [
            facts("a-young", 1, published=False),
            facts("b-new", 11),
            facts("c-version", 40, held=("lenet version 1", "the latest run"), working={"ray": 2**20}),
            facts("d-bare", 41, held=("lenet version 2",)),
            facts("e-old", 42),
            facts("f-begun", 43, published=False),
        ],
        config,
        NOW,
    )
    assert found.kept == {
        "a-young": "of the last 10 days",
        "b-new": "one of the 2 newest",
        "d-bare": "lenet version 2",
    }
    assert [(removal.run_id, removal.what, removal.why) for removal in found.removals] == [
        ("f-begun", "all of it", "it never finished, and is 43 days old"),
        ("e-old", "all of it", "it is no version of a model, and is 42 days old"),
        ("c-version", "ray", "it is published, and 40 days old"),
    ]
    assert str(found) == "to remove: 2 runs and the working copies of 1 more, 1.0 MiB; runs left alone: 3"


def use(store: Store, trained: Trained, good_models: list[LeNet]) -> Store:
    """A store with a version that was champion, one that is, an unregistered run, the latest run, and one begun."""
    for number, name in enumerate(("was", "champion", "r1", "last")):
        left = trained(store, name, datetime(2026, 1, 1 + number, tzinfo=UTC), model=good_models[min(number, 3)])
        store.put(f"{staging(name)}/ray/checkpoint_0/state.bin", b"x" * 1000)
        store.put(f"{staging(name)}/run.json", RECORD.model_dump_json().encode())
        store.put(f"{staging(name)}/training.json", left.training.model_dump_json().encode())
        left.publish(store)
        if number < 2:
            promote(store, PromoteConfig(max_f1_drop=1, max_ece_rise=1), register(store, "lenet", name))
    promote_by_hand(store, "lenet", 2)
    # Its name begins as that of another does.
    store.put(f"{staging('r10')}/run.json", RECORD.model_dump_json().encode())
    store.put(f"{staging('r10')}/ray/checkpoint_0/state.bin", b"x" * 1000)
    store.put(f"{staging('young')}/run.json", RECORD.model_dump_json().encode())
    write_index(store)
    return store


@pytest.fixture
def used(store: Store, prepared: Callable[..., Store], trained: Trained, good_models: list[LeNet]) -> Store:
    return prepared("runs old and new", store, lambda first: use(first, trained, good_models))


def cleaned(store: Store, *, but: str = "young") -> Plan:
    """Retention of the store in a hundred days, with one run that is at work then."""
    found = [run if run.run_id != but else RunFacts(but, run.active + LATER, run.published) for run in gather(store)]
    return remove(store, plan(found, ALL, datetime.now(UTC) + LATER))


def require_whole(store: Store) -> None:
    """What is needed is there, verified, and nobody sees a run that is not."""
    for run_id in ("was", "champion", "last"):
        verify_run(store, run_id)
        training = find_training(store, run_id)
        assert training is not None
        assert store.exists(training.candidate)
        assert read_record(store, run_id) == RECORD
    assert open_model(store.url).run_id == "champion"
    latest = read_latest(store)
    assert latest is not None
    assert latest.run_id == "last"
    if find_run(store, "r1") is not None:
        verify_run(store, "r1")
    assert {run.run_id for run in list_runs(store)} >= {"was", "champion", "last", "young"}
    assert store.keys("datasets")


def test_old_runs_go_and_what_is_needed_stays(used: Store) -> None:
    before = used.keys("")
    listed = retain(RetentionConfig(storage=used.url, keep_days=30, keep_last=0), datetime.now(UTC) + LATER)
    assert used.keys("") == before
    assert not listed.done
    assert {removal.run_id: removal.whole for removal in listed.removals} == {
        "was": False, "champion": False, "r1": True, "last": False, "r10": True, "young": True,
    }  # fmt: skip
    done = cleaned(used)
    require_whole(used)
    left = used.keys("")
    assert not [key for key in left if key.split("/")[1:2] in (["r1"], ["r10"])]
    assert not [key for key in left if any(f"/{name}/" in key for name in ("ray", "export")) and "staging/" in key]
    gone = set(before) - set(left)
    assert {key.split("/")[2] for key in gone if key.split("/")[1] in ("was", "champion", "last")} == {
        "ray", "export", "predictions",
    }  # fmt: skip
    assert all(key.startswith("staging/") or key.split("/")[1] == "r1" for key in gone)
    assert done.done
    assert str(done).startswith("removed: 2 runs and the working copies of 3 more, ")
    # The index says so, nothing is a stray, and there is nothing left to do.
    assert [entry.run_id for entry in read_entries(used).others] == ["last"]
    assert b"r1/report.html" not in used.read(INDEX)
    assert find_strays(used, timedelta(0)) == []
    assert cleaned(used).removals == []


def test_nothing_goes_that_is_young(used: Store) -> None:
    before = used.keys("")
    found = retain(RetentionConfig(storage=used.url, keep_days=1, keep_last=0, delete=True))
    assert found.removals == []
    assert used.keys("") == before


class Crash(Exception):
    """The process ends here."""


def dying_at(store: Store, step: int, *, halfway: bool) -> Store:
    """The store, opened by a process that dies at its deletion of that number: before it, or with half of it done."""
    dying = open_store(store.url)
    deleted, real = 0, dying.delete

    def delete(prefix: str) -> None:
        nonlocal deleted
        if deleted == step:
            if halfway:
                for key in store.keys(prefix)[::2]:
                    real(key)
            raise Crash
        real(prefix)
        deleted += 1

    dying.delete = delete  # type: ignore[method-assign]
    return dying


# Four for each of two runs that go, and three for each of three that are stripped.
STEPS = 4 * 2 + 3 * 3


def test_whoever_dies_at_any_step_leaves_whole_runs_and_the_next_one_completes_it(
    local_store: Store, trained: Trained, good_models: list[LeNet]
) -> None:
    template = Path(use(local_store, trained, good_models).root)
    for step in range(STEPS):
        for halfway in (False, True):
            copy = open_store(str(template.with_name(f"{step}-{halfway}")))
            shutil.copytree(template, copy.root)
            with pytest.raises(Crash):
                cleaned(dying_at(copy, step, halfway=halfway))
            require_whole(copy)
            cleaned(copy)
            require_whole(copy)
            assert {key.split("/")[1] for key in [*copy.keys("runs"), *copy.keys("staging")]} == {
                "was", "champion", "last", "latest.json", "young",
            }  # fmt: skip
            assert cleaned(copy).removals == []
            assert find_strays(copy, timedelta(0)) == []
            shutil.rmtree(copy.root)
    cleaned(dying_at(local_store, STEPS, halfway=False))  # there are no more steps than that


def test_a_run_that_became_a_version_meanwhile_stays(used: Store) -> None:
    found = plan(gather(used), ALL, datetime.now(UTC) + LATER)
    assert "r1" in {removal.run_id for removal in found.removals}
    register(used, "other", "r1")
    done = remove(used, found)
    assert "r1" not in {removal.run_id for removal in done.removals}
    assert done.kept["r1"] == "other version 1"
    verify_run(used, "r1")


@pytest.mark.parametrize("written", ["staging/r10/lease.json", "runs/r10/model.onnx"])
def test_a_run_that_went_on_meanwhile_stays(used: Store, written: str) -> None:
    found = plan(gather(used), ALL, datetime.now(UTC) + LATER)
    assert {"r1", "r10"} <= {removal.run_id for removal in found.removals}
    sleep(1.1)  # S3 tells seconds
    used.put(written, b"{}")
    before = used.keys("staging/r10") + used.keys("runs/r10")
    done = remove(used, found)
    assert done.kept["r10"] == "written of since this was planned"
    assert used.keys("staging/r10") + used.keys("runs/r10") == before
    assert used.keys("staging/r1") == used.keys("runs/r1") == []


def test_a_run_that_is_published_again_meanwhile_stays(local_store: Store, trained: Trained) -> None:
    """All is there, so nothing of it is written; and it is a version only after that."""
    left = trained(local_store, "r")
    left.publish(local_store)
    trained(local_store, "other", NOW).publish(local_store)
    found = plan(gather(local_store), ALL, datetime.now(UTC) + LATER)
    assert [removal.run_id for removal in found.removals if removal.whole] == ["r"]
    left.publish(local_store)
    assert remove(local_store, found).kept["r"] == "written of since this was planned"
    verify_run(local_store, "r")


def test_a_store_that_fails_says_so(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    local_store.put("staging/old/run.json", b"{}")
    os.utime(local_store.path("staging/old/run.json"), (0, 0))

    def refused(prefix: str) -> None:
        raise StorageError(f"{prefix}: access denied")

    monkeypatch.setattr(local_store, "delete", refused)
    with pytest.raises(StorageError, match="access denied"):
        remove(local_store, plan(gather(local_store), ALL, NOW))


def test_a_run_can_be_published_again_without_its_copies(local_store: Store, trained: Trained) -> None:
    """As when an old run is given again by name: it finds everything done."""
    left = trained(local_store, "r")
    config = RunConfig(storage=local_store.url, run_id="r")
    record = RunRecord(parameters=config.model_dump(mode="json"), versions={})
    local_store.put(f"{staging('r')}/run.json", record.model_dump_json().encode())
    first = publish_again(config, left.manifest, left.training, left.evaluation)
    register_and_promote(config)
    remove(local_store, plan(gather(local_store), ALL, datetime.now(UTC) + LATER))
    with pytest.raises(DataError, match="missing"):
        list(read_predictions(local_store, staging("r"), left.evaluation.predictions))
    assert publish_again(config, left.manifest, left.training, left.evaluation) == first
    assert register_and_promote(config).promoted


@pytest.mark.parametrize("field", ["keep_days", "keep_last"])
def test_bounds(field: str) -> None:
    with pytest.raises(ValueError, match="greater than or equal"):
        RetentionConfig.model_validate({field: -1})
