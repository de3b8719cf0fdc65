"""Proves that of any number of publishers none loses or doubles a version, and that the best is the champion."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from flows.models import models
from lenet.model import LeNet
from pipeline.errors import DataError
from pipeline.predictions import read_predictions
from pipeline.promotion import Comparison, PromoteConfig
from pipeline.publish import run_folder
from pipeline.registry import (
    Version,
    champion_key,
    find_champion,
    find_decision,
    held_against_champion,
    list_models,
    list_versions,
    promote,
    promote_by_hand,
    register,
    roll_back,
    version_folder,
)
from pipeline.served import open_model
from pipeline.storage import Store, open_store
from pipeline.train import staging

if TYPE_CHECKING:
    from tests.conftest import Splits
    from tests.pipeline.conftest import Receipts

RULE = PromoteConfig(max_f1_drop=1, max_ece_rise=1)
Trained = Callable[..., "Receipts"]


def test_versions_count_from_one_and_a_run_is_one_version(store: Store, published: list[str]) -> None:
    found = [register(store, "lenet", run_id) for run_id in published]
    assert [version.version for version in found] == [1, 2, 3, 4]
    assert [register(store, "lenet", run_id) for run_id in published] == found
    assert list_versions(store, "lenet") == found
    assert list_models(store) == ["lenet"]
    assert register(store, "other", "r2").version == 1
    assert list_models(store) == ["lenet", "other"]


def test_ten_publishers_lose_and_double_no_version_and_the_best_is_champion(store: Store, published: list[str]) -> None:
    wanted = [published[number] for number in (3, 0, 1, 2, 3, 0, 1, 2, 3, 0)]  # some runs by several at once

    def one(run_id: str) -> bool:
        mine = open_store(store.url)
        return promote(mine, RULE, register(mine, "lenet", run_id)).promoted

    with ThreadPoolExecutor(10) as pool:
        outcomes = list(pool.map(one, wanted))
    versions = list_versions(store, "lenet")
    assert [version.version for version in versions] == [1, 2, 3, 4]
    assert sorted(version.run_id for version in versions) == sorted(published)
    champion = find_champion(store, "lenet")
    assert champion is not None
    assert champion.run_id == "r3"
    won = {run_id for run_id, promoted in zip(wanted, outcomes, strict=True) if promoted}
    assert won == {change.run_id for change in champion.changes}
    accuracies = {version.run_id: version.accuracy for version in versions}
    assert accuracies[champion.run_id] == max(accuracies[run_id] for run_id in won)
    assert len({outcome for outcome, run_id in zip(outcomes, wanted, strict=True) if run_id == "r3"}) == 1


def test_a_better_model_is_promoted_and_a_worse_one_refused_with_reasons(store: Store, published: list[str]) -> None:
    versions = [register(store, "lenet", run_id) for run_id in published]
    assert promote(store, RULE, versions[1]).reasons == ["there was no champion before"]
    better = promote(store, RULE, versions[3])
    assert better.promoted
    assert better.champion == "lenet version 2 (r1)"
    assert better.p is not None
    assert better.p < 0.05
    worse = promote(store, RULE, versions[2])
    assert not worse.promoted
    assert worse.gain is not None
    assert worse.gain < 0
    assert worse.only_champion - worse.only_candidate == round(-worse.gain * 200)
    assert "fewer than the champion" in worse.reasons[0]
    champion = find_champion(store, "lenet")
    assert champion is not None
    assert (champion.version, champion.run_id) == (4, "r3")
    assert find_decision(store, versions[2]) == worse
    # Asked again, even when the champion is another by now, it says the same.
    promote_by_hand(store, "lenet", 1)
    assert promote(store, RULE, versions[2]) == worse
    assert promote(store, RULE, versions[3]) == better
    assert find_champion(store, "lenet").run_id == "r0"  # type: ignore[union-attr]


def test_a_damaged_version_or_champion_is_named(store: Store, published: list[str]) -> None:
    promote(store, RULE, register(store, "lenet", published[0]))
    store.put("models/lenet/champion.json", b'{"model": "lenet"')
    with pytest.raises(DataError, match=r"models/lenet/champion\.json: damaged"):
        promote(store, RULE, register(store, "lenet", published[1]))
    store.put("models/lenet/versions/1/version.json", b"{}")
    with pytest.raises(DataError, match=r"models/lenet/versions/1/version\.json: damaged"):
        register(store, "lenet", published[2])


@pytest.fixture
def challenger(
    local_store: Store, prepared: Callable[..., Store], trained: Trained, good_models: list[LeNet]
) -> Version:
    """r3, which the rule was not asked about yet, in a store where r0 is the champion."""

    def make(first: Store) -> None:
        for number in (0, 3):
            trained(first, f"r{number}", model=good_models[number]).publish(first)

    prepared("two runs", local_store, make)
    promote(local_store, RULE, register(local_store, "lenet", "r0"))
    return register(local_store, "lenet", "r3")


@pytest.mark.parametrize("name", ["manifest.json", "report.json", "predictions/00001.parquet"])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_champion_that_cannot_be_read_stays_and_stops_nobody(
    local_store: Store, challenger: Version, name: str, deleted: bool
) -> None:
    store, key = local_store, f"{run_folder('r0')}/{name}"
    if deleted:
        store.delete(key)
    else:
        store.put(key, store.read(key)[:-9])
    found = promote(store, RULE, challenger)
    assert (found.promoted, found.champion) == (False, "lenet version 1 (r0)")
    assert re.match(r"the champion cannot be read \(.*runs/r0.*\), so promote it by hand", found.reasons[0])
    assert find_champion(store, "lenet").run_id == "r0"  # type: ignore[union-attr]
    assert promote_by_hand(store, "lenet", 2).run_id == "r3"


def test_a_candidate_whose_own_predictions_cannot_be_read_is_told_so(local_store: Store, challenger: Version) -> None:
    local_store.delete(f"{run_folder('r3')}/predictions/00001.parquet")
    with pytest.raises(DataError, match=r"runs/r3/predictions/00001\.parquet: missing"):
        promote(local_store, RULE, challenger)


def test_counts_are_those_of_the_models_own_predictions(
    store: Store, published: list[str], small_splits: "Splits", good_models: list[LeNet], trained: Trained
) -> None:
    promote(store, RULE, register(store, "lenet", published[1]))
    left = trained(store, published[3], model=good_models[3])
    found = held_against_champion(
        store, RULE, left.evaluation, lambda: read_predictions(store, staging("r3"), left.evaluation.predictions)
    )
    images, labels = small_splits["test"]
    right = {n: open_model(f"{store.url}/runs/r{n}").predict(images).argmax(axis=1) == labels for n in (1, 3)}
    assert found.only_candidate == int((right[3] & ~right[1]).sum())
    assert found.only_champion == int((right[1] & ~right[3]).sum())


def test_a_champion_that_died_before_its_decision_was_written_is_decided_the_same(
    store: Store, published: list[str]
) -> None:
    version = register(store, "lenet", published[0])
    before = promote(store, RULE, version)
    store.delete(f"{version_folder('lenet', 1)}/decision.json")
    assert promote(store, RULE, version) == before
    assert len(find_champion(store, "lenet").changes) == 1  # type: ignore[union-attr]


def test_rollback_goes_back_one_champion_at_a_time(store: Store, published: list[str]) -> None:
    for run_id in published:
        register(store, "lenet", run_id)
    for number in (1, 3, 4):
        promote_by_hand(store, "lenet", number)
    assert promote_by_hand(store, "lenet", 4).version == 4  # no change, nothing to take back
    assert [roll_back(store, "lenet").version for _ in range(2)] == [3, 1]
    with pytest.raises(DataError, match="no champion came before"):
        roll_back(store, "lenet")
    assert promote_by_hand(store, "lenet", 2).version == 2
    assert roll_back(store, "lenet").version == 1
    by = [change.by for change in find_champion(store, "lenet").changes]  # type: ignore[union-attr]
    assert by == ["hand"] * 3 + ["rollback"] * 2 + ["hand", "rollback"]


def test_a_model_that_was_taken_back_does_not_come_back_with_the_next_night(
    store: Store, published: list[str], trained: Trained, good_models: list[LeNet]
) -> None:
    for run_id in (published[1], published[3]):
        assert promote(store, RULE, register(store, "lenet", run_id)).promoted
    roll_back(store, "lenet")
    for night in ("again", "and-again"):
        trained(store, night, model=good_models[3]).publish(store)  # the same seed
        found = promote(store, RULE, register(store, "lenet", night))
        assert not found.promoted
        assert found.reasons[0].startswith("it is, byte for byte, version 2, which is champion no more; promote it by")
    assert find_champion(store, "lenet").run_id == "r1"  # type: ignore[union-attr]
    store.delete(f"{run_folder('r3')}/manifest.json")  # then nothing says that it is the same
    trained(store, "once-more", model=good_models[3]).publish(store)
    assert promote(store, RULE, register(store, "lenet", "once-more")).promoted
    assert promote_by_hand(store, "lenet", 3).run_id == "again"


def test_a_champion_with_fewer_predictions_than_there_are_images_stops_nobody(
    local_store: Store, challenger: Version
) -> None:
    key = f"{run_folder('r0')}/manifest.json"
    manifest = json.loads(local_store.read(key))
    del manifest["artifacts"]["predictions/00001.parquet"]
    local_store.put(key, json.dumps(manifest).encode())
    found = promote(local_store, RULE, challenger)
    assert not found.promoted
    assert re.match(r"the champion cannot be read \(.*/runs/r0: has predictions of 100 images\), so", found.reasons[0])


def test_a_champion_by_hand_is_not_held_against_itself(store: Store, published: list[str]) -> None:
    promote(store, RULE, register(store, "lenet", published[3]))
    version = register(store, "lenet", published[0])
    before = promote_by_hand(store, "lenet", version.version)
    found = promote(store, RULE, version)
    assert found == Comparison(promoted=True, reasons=["it was made the champion by hand"])
    assert promote(store, RULE, version) == find_decision(store, version) == found
    assert find_champion(store, "lenet") == before


def test_a_champion_judged_by_other_images_is_not_replaced_by_itself(
    store: Store, published: list[str], trained: Trained, good_models: list[LeNet]
) -> None:
    promote(store, RULE, register(store, "lenet", published[0]))
    left = trained(store, "r3", model=good_models[3])
    other = left.evaluation.model_copy(update={"test_digest": "0" * 64})
    found = held_against_champion(store, RULE, other, lambda: iter(()))
    assert not found.promoted
    assert "other test images" in found.reasons[0]


def test_names_in_the_registry_are_those_of_the_contract(store: Store, published: list[str]) -> None:
    promote(store, RULE, register(store, "lenet", published[0]))
    assert store.keys("models") == [
        champion_key("lenet"),
        "models/lenet/versions/1/decision.json",
        "models/lenet/versions/1/version.json",
    ]


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_names_of_classes_are_no_markup_in_the_list(
    store: Store, published: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "F1 of [background] falls, F1 of [/x] falls, F1 of :boot: falls"
    decision = Comparison(promoted=False, reasons=[reason])
    register(store, "lenet", published[0])
    store.put("models/lenet/versions/1/decision.json", decision.model_dump_json().encode())
    models(storage=store.url)
    assert reason in capsys.readouterr().out
