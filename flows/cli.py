"""The command line: `lenet train` with the flow's parameters, `lenet layers`, and the commands of the files beside."""

import importlib.metadata
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from flows import server
from flows.data import data
from flows.display import Display, Lasting, to_nowhere
from flows.models import export, gc, index, models, promote, reproduce, retention, rollback, verify
from flows.options import option, whole
from flows.parameters import with_parameters
from flows.predict import predict
from flows.runs import runs
from flows.tune import tune
from lenet.model import LeNet, layer_table
from pipeline.config import config_of
from pipeline.errors import PipelineError, Terminated
from pipeline.run import RunConfig, check, ray_ahead
from pipeline.signals import ended_by_sigterm, undisturbed

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


@app.command
@with_parameters(RunConfig, option)
def train(**parameters: Any) -> None:
    """Run the whole pipeline: download, shard, train, evaluate, publish."""
    config = config_of(parameters, RunConfig)
    check(config)  # the flow does so too, but only once Prefect is up
    server.begin()
    # At the end of a flow that SIGTERM has ended, Prefect sends it once more, to whoever heard it before.
    with ended_by_sigterm(), ray_ahead(config), Display(Lasting()) as display:
        with undisturbed():  # after the server's settings, for it imports prefect
            from flows.train_lenet import train_lenet

        server.require()
        published = train_lenet(**parameters)
    display.console.print(
        f"test accuracy {published.accuracy:.4f} · report: {published.report}", soft_wrap=True, highlight=False
    )


@app.command
def layers(
    *,
    image_size: Literal[28, 32] = 28,
    classes: Annotated[int, Parameter(validator=Number(gte=2, lte=1000), converter=whole)] = 10,
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
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given)
        sys.stdout.flush()
    except CycloptsError as error:
        print(f"lenet: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except PipelineError as error:
        print(f"lenet: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read the output has seen enough
        to_nowhere(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt as interrupt:
        remedy = "; the same --run-id goes on from the last checkpoint" if given[:1] == ["train"] else ""
        print(f"lenet: interrupted{remedy}", file=sys.stderr)
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)
