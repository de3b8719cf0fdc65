"""Proves what a signal does while a block runs, and that nothing of it stays."""

import signal
import threading

import pytest

from pipeline.signals import on_signal, undisturbed

NUMBER = signal.SIGUSR1


def test_a_signal_acts_while_the_block_runs_and_what_was_before_comes_back() -> None:
    acted: list[int] = []
    before = signal.signal(NUMBER, lambda *_: acted.append(0))
    try:
        with on_signal(NUMBER, lambda: acted.append(1)):
            signal.raise_signal(NUMBER)
        signal.raise_signal(NUMBER)
    finally:
        signal.signal(NUMBER, before)
    assert acted == [1, 0]


def test_what_is_ignored_stays_ignored() -> None:
    acted: list[int] = []
    before = signal.signal(NUMBER, signal.SIG_IGN)
    try:
        with on_signal(NUMBER, lambda: acted.append(1)):
            signal.raise_signal(NUMBER)
    finally:
        signal.signal(NUMBER, before)
    assert acted == []


def test_in_another_thread_the_block_runs_without() -> None:
    ran: list[object] = []

    def run() -> None:
        with on_signal(NUMBER, lambda: None):
            ran.append(signal.getsignal(NUMBER))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran == [signal.getsignal(NUMBER)]


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.usefixtures("interruptible")
def test_a_first_interrupt_is_heard_at_the_end_and_a_second_at_once(times: int) -> None:
    done: list[int] = []

    def interrupted() -> None:
        with undisturbed():
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
