"""Proves what a signal does while a block runs, and that nothing of it stays."""

import signal
import threading

from pipeline.trainer import on_signal

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
