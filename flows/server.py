"""Prefect's server for as long as one command lives, for people without a server of their own."""

import contextlib
import functools
import os
import signal
import threading

from pipeline.errors import ConfigError

# Nothing is scheduled on a server that lives as long as one command: 15 s to start without these, not 18.
UNUSED_SERVICES = (
    "SCHEDULER",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "CANCELLATION_CLEANUP",
    "FOREMAN",
    "REPOSSESSOR",
    "TRIGGERS",
    "EVENT_LOGGER",
    "CLEANUP_RECONCILER",
)
# Read when prefect is imported.
SETTINGS = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal is ours; the server keeps all logs
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline,flows",
    **{f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "false" for service in UNUSED_SERVICES},
}


@functools.cache
def begin() -> threading.Thread | None:
    """Start it in the background, unless the user has one: the thread that does."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is not None:
        return None
    import prefect.server.api.server  # noqa: F401  # here, and not in the thread, beside other imports

    thread = threading.Thread(target=_start, name="prefect", daemon=True)
    thread.start()
    return thread


def require() -> None:
    """Return once a server answers. ConfigError when the user's own does not."""
    if (thread := begin()) is not None:
        thread.join()
    trouble = _ask()
    if trouble is None:
        return
    from prefect.settings import get_current_settings

    raise ConfigError(
        "PREFECT_API_URL",
        get_current_settings().api.url,
        f"no Prefect server answers there ({trouble})",
        "start it, or unset the variable, and `prefect profile`, for a server that lives as long as this command",
    )


def _start() -> None:
    # What goes wrong beside the imports is tried again, and told, when they are over.
    with contextlib.suppress(Exception):
        _ask()


def _ask() -> Exception | None:
    """What is wrong with the server, which Prefect starts if there is none.

    A terminal sends Ctrl-C to every process in the foreground. Were the server to stop too, the flow would wait for
    it, for more than a minute, to report that it was interrupted. Children inherit the blocked signal.
    """
    from prefect import get_client

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            return client.api_healthcheck()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
