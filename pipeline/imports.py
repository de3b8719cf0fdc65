"""When modules are imported: what a process starts with, and what it wants later, while it waits for others."""

import atexit
import contextlib
import gc
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

# What is imported only once it is called for, after the training: 2 s.
LATE_IMPORTS = ("torch._dynamo", "onnxscript", "onnxruntime", "scipy.stats", "scipy.ndimage", "matplotlib.figure")

EXIT_S = 5
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def for_good() -> Iterator[None]:
    """What is imported in the block stays: to look through it for garbage takes 0.6 s of 3.8 while it is made, and once
    more, at the process's end, 1.4 s."""
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def training() -> None:
    """Import what a worker trains with: in a process of Ray's, 1 s less of a core than if Ray came upon it."""
    with for_good():
        import pipeline.worker  # noqa: F401


def ahead(then: Callable[[], Any] = lambda: None) -> None:
    """Import what the steps after the training want, in the background, and `then` do once what takes longer the first
    time. What fails, as it does when the process ends meanwhile, is for those steps to find out and tell."""

    def work() -> None:
        # Two threads that import the same may find modules half done.
        with contextlib.suppress(Exception), _one_at_a_time:
            for name in LATE_IMPORTS:
                importlib.import_module(name)
            then()

    thread = threading.Thread(target=work, name="imports", daemon=True)
    thread.start()
    atexit.register(thread.join, EXIT_S)  # torch may crash where Python ends under its import
