"""Proves that who follows a training goes on when something it has left cannot be read."""

import pytest

from pipeline.checkpoint import EpochMetrics
from pipeline.errors import StorageError
from pipeline.progress import PROGRESS, followed, tell_epochs
from pipeline.storage import Store
from tests.conftest import wait_for

EPOCH = EpochMetrics(epoch=2, train_loss=2.3, train_accuracy=0.1, held_out_loss=2.3, held_out_accuracy=0.1,
                     seconds=1.0, images_per_second=600.0, world_size=2)  # fmt: skip


def test_an_epoch_that_the_store_would_not_give_is_shown_when_it_does(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[EpochMetrics] = []
    read, failed = local_store.read, []

    def failing_once(key: str) -> bytes:
        if key.endswith("00002.json") and not failed:
            failed.append(key)
            raise StorageError("it is away")
        return read(key)

    tell_epochs(local_store, "r", [EPOCH])
    monkeypatch.setattr(local_store, "read", failing_once)
    with followed(local_store, "r", shown.append, lambda now: None):
        wait_for(lambda: shown == [EPOCH])
    assert failed


def test_after_something_torn_the_next_epochs_are_shown(local_store: Store) -> None:
    shown: list[EpochMetrics] = []
    with followed(local_store, "r", shown.append, lambda now: None):
        local_store.put(f"r/{PROGRESS}/00001.json", b"torn")
        tell_epochs(local_store, "r", [EPOCH])
        wait_for(lambda: shown == [EPOCH])
