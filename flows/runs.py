"""`lenet runs`: the runs in a store, and how two of them differ."""

from cyclopts import App
from rich.table import Table

from flows.options import DEFAULT_STORAGE, Storage, plain_console
from pipeline.runs import compare_runs, list_runs
from pipeline.storage import open_store

runs = App(name="runs", help="Runs: what state each is in, and how two differ.")


@runs.default
def show_runs(*, storage: Storage = DEFAULT_STORAGE) -> None:
    """List the runs, with how far each has come and its accuracy on the test images."""
    store, console = open_store(storage), plain_console()
    table = Table("run", "state", "dataset", "recipe", "epochs", "held out", "test", "finished", box=None)
    for run in list_runs(store):
        table.add_row(
            run.run_id,
            run.state,
            run.dataset,
            run.recipe,
            f"{run.epochs_done}/{run.epochs}",
            "" if run.held_out_accuracy is None else f"{run.held_out_accuracy:.4f}",
            "" if run.accuracy is None else f"{run.accuracy:.4f}",
            "" if run.finished is None else f"{run.finished:%Y-%m-%d %H:%M} UTC",
        )
    console.print(table if table.row_count else f"no run yet: {store}", soft_wrap=True)


@runs.command
def compare(first: str, second: str, *, storage: Storage = DEFAULT_STORAGE) -> None:
    """Show all in which two published runs differ: parameters, versions, data and results.

    Args:
        first: A run's id.
        second: The other's.
    """
    table = Table("", first, second, box=None)
    for difference in compare_runs(open_store(storage), first, second):
        table.add_row(difference.what, str(difference.first), str(difference.second))
    plain_console().print(table if table.row_count else "the runs do not differ", soft_wrap=True)
