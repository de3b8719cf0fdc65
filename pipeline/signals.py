"""What a signal does while a block runs."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from pipeline.errors import Terminated


@contextlib.contextmanager
def on_signal(number: signal.Signals, act: Callable[[], None]) -> Iterator[None]:
    """While the block runs, the signal does this.

    Nothing new outside the main thread, where Python hears none, and for a signal that this process ignores, as shells
    let what they run in the background ignore Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(number, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A first Ctrl-C in the block is heard at its end: in the midst of imports, it comes out as whatever the libraries
    make of it."""
    heard: list[bool] = []

    def note() -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(True)

    with on_signal(signal.SIGINT, note):
        yield
    if heard:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM in the block comes out of it as Terminated. Out of Ray's own code, where a signal's handler may run too,
    only a Ctrl-C comes."""
    asked: list[bool] = []

    def end() -> None:
        asked.append(True)
        raise KeyboardInterrupt

    with on_signal(signal.SIGTERM, end):
        try:
            yield
        except KeyboardInterrupt:
            if asked:
                raise Terminated from None
            raise
