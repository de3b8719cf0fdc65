"""The command line: `lenet train` with the flow's parameters, and `lenet tune`, `runs`, `data` and `layers`."""

import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from flows.data import data
from flows.display import Display
from flows.models import export, gc, index, models, promote, reproduce, retention, rollback, verify
from flows.options import option
from flows.parameters import with_parameters
from flows.predict import predict
from flows.runs import runs
from flows.tune import tune
from lenet.model import LeNet, layer_table
from pipeline.config import config_of
from pipeline.errors import ConfigError, PipelineError, Terminated
from pipeline.run import RunConfig, check, ray_ahead

app = App(
    name="lenet",
    version=importlib.metadata.version("lenet-pipeline"),
    help="Train LeNet on Ray, from dataset to published model, and use it.",
    suppress_keyboard_interrupt=False,
    print_error=False,
    exit_on_error=False,
)
app.command(data)
app.command(runs)
app.command(models)
app.command(promote)
app.command(rollback)
app.command(index)
app.command(verify)
app.command(predict)
app.command(export)
app.command(reproduce)
app.command(gc)
app.command(retention)
app.command(tune)

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
# Prefect's ephemeral server, for people without a server of their own. Read when prefect is imported.
QUIET_PREFECT = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal is ours; the server keeps all logs
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline,flows",
    **{f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "false" for service in UNUSED_SERVICES},
}


@app.command
@with_parameters(RunConfig, option)
def train(**parameters: Any) -> None:
    """Run the whole pipeline: download, shard, train, evaluate, publish."""
    config = config_of(parameters, RunConfig)
    check(config)  # the flow does so too, but only once Prefect is up
    for name, value in QUIET_PREFECT.items():
        os.environ.setdefault(name, value)
    with ray_ahead(config), Display(Console()) as display:
        from prefect.exceptions import TerminationSignal

        from flows.train_lenet import train_lenet  # after the settings above, for it imports prefect

        _start_prefect()
        try:
            published = train_lenet(**parameters)
        except TerminationSignal:
            raise Terminated from None
    display.console.print(
        f"test accuracy {published.accuracy:.4f} · report: {published.report}", soft_wrap=True, highlight=False
    )


def _start_prefect() -> None:
    """Start the ephemeral server, if there is to be one, deaf to Ctrl-C. ConfigError when another does not answer.

    A terminal sends Ctrl-C to every process in the foreground. Were the server to stop too, the flow would wait for
    it, for more than a minute, to report that it was interrupted. Children inherit the blocked signal.
    """
    from prefect import get_client
    from prefect.settings import get_current_settings

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            trouble = client.api_healthcheck()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if trouble is not None:
        raise ConfigError(
            "PREFECT_API_URL",
            get_current_settings().api.url,
            f"no Prefect server answers there ({trouble})",
            "start it, or unset the variable, and `prefect profile`, for a server that lives as long as this command",
        )


@app.command
def layers(
    *, image_size: Literal[28, 32] = 28, classes: Annotated[int, Parameter(validator=Number(gte=2, lte=1000))] = 10
) -> None:
    """Print LeNet's layers with their output shapes and parameter counts.

    Args:
        image_size: Height and width of the images.
        classes: Number of classes, 2 to 1000.
    """
    Console().print(layer_rows(image_size, classes))


def layer_rows(image_size: int, classes: int) -> Table:
    """The layer table, with the total."""
    table = Table("layer", "kind", "output shape", "parameters")
    rows = layer_table(LeNet(classes), image_size)
    for row in rows:
        table.add_row(row.name, row.kind, "x".join(map(str, row.output_shape)), f"{row.parameters:,}")
    table.add_section()
    table.add_row("total", "", "", f"{sum(row.parameters for row in rows):,}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: one line on stderr; exit code 1 or 2 for what the user can mend, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        app(sys.argv[1:] if arguments is None else arguments)
    except CycloptsError as error:
        print(f"lenet: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except PipelineError as error:
        print(f"lenet: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as interrupt:
        print("lenet: interrupted; the same --run-id goes on from the last checkpoint", file=sys.stderr)
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)


if __name__ == "__main__":
    main()
