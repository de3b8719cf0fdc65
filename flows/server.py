"""Prefect's server for as long as one command lives, for people without a server of their own."""

import functools
import os
import signal
import threading
from concurrent.futures import Future

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
def begin() -> "Future[Exception | None]":
    """Start it in the background, unless there is another; what comes of it is what is wrong with either.

    A terminal sends Ctrl-C to every process in the foreground. Were the server to stop too, the flow would wait for
    it, for more than a minute, to report that it was interrupted. Children inherit the blocked signal.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from prefect import get_client
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        import prefect.server.api.server  # noqa: F401  # here, and not in the thread, beside other imports
    trouble: Future[Exception | None] = Future()

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with get_client(sync_client=True) as client:
                trouble.set_result(client.api_healthcheck())
        except BaseException as error:  # for whoever waits to hear
            trouble.set_exception(error)

    threading.Thread(target=start, name="prefect", daemon=True).start()
    return trouble


def require() -> None:
    """Return once a server answers. ConfigError when the user's own does not."""
    if (trouble := begin().result()) is None:
        return
    from prefect.settings import get_current_settings

    raise ConfigError(
        "PREFECT_API_URL",
        get_current_settings().api.url,
        f"no Prefect server answers there ({trouble})",
        "start it, or unset the variable, and `prefect profile`, for a server that lives as long as this command",
    )
