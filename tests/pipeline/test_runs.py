"""Proves that every run is listed in the state it is in, and that of two runs only differences are shown."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from pipeline.errors import DataError, StorageError
from pipeline.progress import ENDED, PROGRESS
from pipeline.publish import EVENTS
from pipeline.record import RunRecord
from pipeline.runs import compare_runs, list_runs
from pipeline.storage import LocalStore, Store
from pipeline.train import staging

if TYPE_CHECKING:
    from tests.pipeline.conftest import Receipts

PARAMETERS = {"dataset": "fashion-mnist", "recipe": "seed", "epochs": 3}


def begin(store: Store, run_id: str) -> str:
    record = RunRecord(parameters=PARAMETERS, versions={})
    store.put(f"{staging(run_id)}/run.json", record.model_dump_json().encode())
    return staging(run_id)


def test_every_run_is_listed_in_its_state(store: Store, trained: Callable[..., "Receipts"]) -> None:
    assert list_runs(store) == []
    begin(store, "a-begun")
    epoch = trained(store, "f-published").training.history[0].model_dump_json().encode()
    for run_id in ("b-training", "c-ended"):
        begin(store, run_id)
        store.put(f"{staging(run_id)}/{PROGRESS}/00001.json", epoch)
    store.put(f"{staging('c-ended')}/{ENDED}", b'{"stopped": true}')
    store.put(f"{begin(store, 'd-trained')}/training.json", b"{}")
    begin(store, "e-evaluated")
    trained(store, "e-evaluated")
    begin(store, "f-published")
    published = trained(store, "f-published").publish(store)
    found = list_runs(store)
    assert [run.run_id.split("-")[1] for run in found] == [run.state for run in found]
    assert [run.state for run in found] == ["begun", "training", "ended", "trained", "evaluated", "published"]
    assert [(run.epochs_done, run.epochs, run.held_out_accuracy) for run in found[:2]] == [(0, 3, None), (1, 3, 0.1)]
    assert (found[-1].accuracy, found[-1].finished) == (published.accuracy, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert {(run.dataset, run.recipe) for run in found} == {("fashion-mnist", "seed")}


def test_what_lies_beside_the_runs_is_no_run(store: Store) -> None:
    begin(store, "a-begun")
    store.put("staging/.DS_Store", b"of a Mac")
    if not isinstance(store, LocalStore):
        store.put("staging/", b"")  # what AWS's console makes for a folder
    assert [run.run_id for run in list_runs(store)] == ["a-begun"]


def test_a_run_that_is_removed_meanwhile_is_passed_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id in ("a", "b", "c"):
        begin(store, run_id)
    real = store.read

    def read(key: str) -> bytes:
        if key == f"{staging('b')}/run.json":
            store.delete(staging("b"))  # by a retention that runs at the same time
        if key == f"{staging('c')}/run.json" and failing:
            raise StorageError(f"{key}: store failed")
        return real(key)

    monkeypatch.setattr(store, "read", read)
    failing = False
    assert [run.run_id for run in list_runs(store)] == ["a", "c"]
    failing = True
    with pytest.raises(StorageError, match="c/run.json: store failed"):
        list_runs(store)


def test_two_runs_are_compared_by_what_differs(store: Store, trained: Callable[..., "Receipts"]) -> None:
    trained(store, "one").publish(store)
    trained(store, "same").publish(store)
    assert compare_runs(store, "one", "same") == []
    trained(store, "other", seed=1).publish(store, lr=0.5, shift=2)
    found = {
        difference.what: (difference.first, difference.second) for difference in compare_runs(store, "one", "other")
    }
    assert found["lr"] == (0.9, 0.5)
    assert found["shift"] == (None, 2)
    assert found["test loss"][0] != found["test loss"][1]
    assert "seed" not in found
    assert any(what.startswith("F1 of ") for what in found)
    assert not found.keys() & {"images/s, last epoch", "version of torch"}


def test_a_run_that_is_not_published_is_not_compared(store: Store, trained: Callable[..., "Receipts"]) -> None:
    trained(store, "one").publish(store)
    with pytest.raises(DataError, match=r"runs/other: no published run; lenet runs lists them$"):
        compare_runs(store, "one", "other")


def test_a_published_run_has_its_curves_for_tensorboard(local_store: Store, trained: Callable[..., "Receipts"]) -> None:
    trained(local_store, "one").publish(local_store)
    data = local_store.read(f"runs/one/{EVENTS}")
    scalars, start = {}, 0
    while start < len(data):  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[start : start + 8], "little")
        event = data[start + 12 : start + 12 + size]
        assert int.from_bytes(data[start + 12 + size : start + 16 + size], "little") == masked_crc32c(event)
        decoded = Event.FromString(event)
        scalars |= {(value.tag, decoded.step): value.simple_value for value in decoded.summary.value}
        start += 16 + size
    assert scalars["train_loss", 1] == pytest.approx(2.3)
    assert scalars["held_out_accuracy", 1] == pytest.approx(0.1)
    assert len(scalars) == 5
