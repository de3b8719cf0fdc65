"""Proves that what is imported in the background is there later, and bothers nobody if it is not."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pipeline import imports


def done_ahead(then: Callable[[], Any]) -> None:
    imports.ahead(then)
    for thread in threading.enumerate():
        if thread.name == "imports":
            thread.join()


def test_what_is_wanted_later_is_imported_and_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "LATE_IMPORTS", ("this",))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    seen: list[bool] = []
    done_ahead(lambda: seen.append("this" in sys.modules))
    assert seen == [True]


@pytest.mark.parametrize("wanted", ["no_such_module", "threading"])
def test_what_fails_there_is_not_told_there(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "LATE_IMPORTS", (wanted,))
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    begun: list[bool] = []

    def fail() -> None:
        begun.append(True)
        raise AttributeError

    done_ahead(fail)
    assert begun == [True] * (wanted == "threading")
    assert told == []
