"""Proves that what is imported in the background is there later, and bothers nobody if it is not."""

import signal
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


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.usefixtures("interruptible")
def test_a_first_interrupt_is_heard_at_the_end_and_a_second_at_once(times: int) -> None:
    done: list[int] = []

    def interrupted() -> None:
        with imports.undisturbed():
            for number in range(times):
                signal.raise_signal(signal.SIGINT)
                done.append(number)

    if not times:
        interrupted()
    else:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    assert done == [[], [0], [0]][times]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
