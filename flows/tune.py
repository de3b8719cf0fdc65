"""`lenet tune`: search a recipe's hyperparameters; what comes of it is a recipe file that `lenet train` takes."""

from typing import Any

from rich.table import Table

import pipeline.run
from flows.display import Display, Lasting
from flows.options import option
from flows.parameters import with_parameters
from pipeline.config import config_of
from pipeline.run import TuneRunConfig

SHOWN = 10


@with_parameters(TuneRunConfig, option)
def tune(**parameters: Any) -> None:
    """Search a recipe's hyperparameters with Ray Tune, judging them on validation images; never on the test images."""
    config = config_of(parameters, TuneRunConfig)
    console = Lasting(highlight=False)
    with Display(console):
        tuned = pipeline.run.tune(config)
    table = Table("accuracy", "epochs", *config.vary, box=None)
    for trial in tuned.trials[:SHOWN]:
        table.add_row(
            f"{trial.accuracy:.4f}", str(trial.epochs), *(f"{trial.parameters[name]:.4g}" for name in config.vary)
        )
    console.print(table)
    use = f"recipe: {config.output} · use it with: lenet train --recipe {config.output}"
    console.print(use, soft_wrap=True, markup=False)
