"""The command line: `lenet train` with the flow's own parameters, `lenet layers` for the model."""

import os
import sys
from typing import Any

from cyclopts import App
from rich.console import Console
from rich.table import Table

from flows.parameters import with_run_parameters
from lenet.model import LeNet, layer_table
from pipeline.errors import PipelineError
from pipeline.run import config_of

app = App(name="lenet", help="Train LeNet on Ray, from dataset to published report.", version_flags=["--version"])

# Prefect's ephemeral server, for people without a server of their own. Read when prefect is imported.
QUIET_PREFECT = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal is ours; the server keeps all logs
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline,flows",
}


@app.command
@with_run_parameters
def train(**parameters: Any) -> None:
    """Run the whole pipeline: download, shard, train, evaluate, publish."""
    config_of(parameters)
    for name, value in QUIET_PREFECT.items():
        os.environ.setdefault(name, value)
    from flows.display import Display  # after the settings above: both import prefect
    from flows.train_lenet import train_lenet

    with Display(Console()) as display:
        published = train_lenet(**parameters)
    display.console.print(
        f"test accuracy {published.accuracy:.4f} · report: {published.report}", soft_wrap=True, highlight=False
    )


@app.command
def layers(*, image_size: int = 28, classes: int = 10) -> None:
    """Print LeNet's layers with their output shapes and parameter counts.

    Args:
        image_size: Height and width of the images: 28 or 32.
        classes: Number of classes.
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


def main() -> None:
    """Entry point: one line on stderr and exit code 1 or 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        app()
    except PipelineError as error:
        print(f"lenet: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("lenet: interrupted; the same --run-id goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
