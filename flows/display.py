"""What a person sees in the terminal: the steps as they finish, and the curves as they grow."""

import logging
import os
from datetime import timedelta
from types import TracebackType
from typing import IO, Self

import plotext
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.checkpoint import EpochMetrics, History
from pipeline.progress import Now

LOGGERS = ("pipeline", "flows", "now")
CHART_SIZE = (76, 16)  # columns and rows
TABLE_EPOCHS = 12


def to_nowhere(file: IO[str]) -> None:
    """What is written to it from now on is gone: nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class Lasting(Console):
    """Outlives whoever reads it: it goes quiet, where Rich would end the process, and the training with it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        to_nowhere(self.file)


class Display(logging.Handler):
    """Shows the pipeline's log records; those with an `epoch` update the chart instead.

    Without a terminal there is no chart, and every record is a line.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console
        self.history: History = []
        self.epochs = 0
        self.line = Text()
        self.live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.INFO)
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).propagate = False
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        if self.history and self.console.is_terminal:
            self.console.print(draw(self.history, self.epochs))
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self)
            logging.getLogger(name).propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        match record.__dict__:
            case {"now": Now() as now, "epochs": epochs, "images": images}:
                self.line = describe(now, epochs, images)
                self.epochs = epochs
                self._draw()
            case {"epoch": EpochMetrics() as epoch, "epochs": epochs} if self.console.is_terminal:
                # A training that is taken up again tells of all epochs again.
                self.history = [*(before for before in self.history if before.epoch < epoch.epoch), epoch]
                self.epochs = epochs
                self._draw()
            case _:
                step = record.name.rpartition(".")[2]
                self.console.print(Text.assemble((f"{step:>10}  ", "cyan"), record.getMessage()), soft_wrap=True)

    def _draw(self) -> None:
        if self.console.is_terminal:
            # What does not fit is cut off below: so what moves is above, and the table is no longer than there is room
            # for beside the line, the chart, an empty line, its own head and a row to spare.
            room = max(1, self.console.height - CHART_SIZE[1] - 4)
            parts = [draw(self.history, self.epochs, room)] if self.history else []
            self.live.update(Group(self.line, *parts), refresh=True)


def describe(now: Now, epochs: int, images: int) -> Text:
    """One line of 80 columns: where training is, how fast, how good so far, and how long it will take."""
    left = timedelta(seconds=round(now.seconds_left(epochs, images)))
    return Text(
        f"epoch {now.epoch}/{epochs}, {now.step / now.steps:.0%} · {now.images_per_second:,.0f} images/s · "
        f"loss {now.loss:.3f} · accuracy {now.accuracy:.3f} · {left} left",
        no_wrap=True,
    )


def draw(history: History, epochs: int, rows: int = TABLE_EPOCHS) -> Group:
    """The three curves by epoch, and the last epochs in numbers, in so many rows at most."""
    x = [epoch.epoch for epoch in history]
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(*CHART_SIZE)
    plotext.xlim(1, max(epochs, 2))
    plotext.ylim(0, max(1.0, *(epoch.train_loss for epoch in history)))
    plotext.xticks(range(1, epochs + 1, max(1, epochs // 10)))
    plotext.xlabel("epoch")
    for name, curve, colour in (
        ("train loss", [epoch.train_loss for epoch in history], "blue"),
        ("train accuracy", [epoch.train_accuracy for epoch in history], "magenta"),
        (f"{history[-1].held_out} accuracy", [epoch.held_out_accuracy for epoch in history], "green"),
    ):
        plotext.plot(x, curve, label=name, color=colour, marker="braille")
    table = Table("epoch", "train loss", "train accuracy", f"{history[-1].held_out} accuracy", "images/s", box=None)
    for epoch in history[-min(rows, TABLE_EPOCHS) :]:
        table.add_row(
            f"{epoch.epoch}/{epochs}",
            f"{epoch.train_loss:.4f}",
            f"{epoch.train_accuracy:.4f}",
            f"{epoch.held_out_accuracy:.4f}",
            f"{epoch.images_per_second:,.0f}",
        )
    return Group(Text.from_ansi(plotext.build()), table)
