"""Proves what a person sees: curves that grow in a terminal, and a line for each record where there is none."""

import io
import logging
import os
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.text import Text

from flows.display import Display, Lasting
from pipeline.checkpoint import EpochMetrics
from pipeline.progress import Now


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def console(request: pytest.FixtureRequest) -> Console:
    return Console(file=io.StringIO(), force_terminal=request.param, width=100)


def metrics(number: int) -> EpochMetrics:
    """What an epoch might come to."""
    return EpochMetrics(epoch=number, train_loss=2 / number, train_accuracy=0.4, held_out_loss=1.0,
                        held_out_accuracy=0.35, seconds=2.0, images_per_second=30_000.0, world_size=2)  # fmt: skip


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> Iterator[None]:
    """Loggers tell of warnings only."""
    loggers = {name: logging.getLogger(name) for name in ("pipeline", "flows", "flows.train", "now")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.NOTSET)
    yield
    for name, level in levels.items():
        loggers[name].setLevel(level)


def shown(console: Console) -> str:
    """All that was written while two of three epochs went by."""
    log = logging.getLogger("flows.train")
    with Display(console):
        logging.getLogger("pipeline.shards").warning("16 shards %s", "verified")
        now = Now(epoch=1, step=60, steps=240, loss=2.1, accuracy=0.25, images_per_second=1000.0)
        logging.getLogger("now").info("%s", now, extra={"now": now, "epochs": 3, "images": 60_000})
        for number in (1, 2):
            log.info("epoch %d of 3: %s", number, metrics(number), extra={"epoch": metrics(number), "epochs": 3})
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_epochs_are_drawn_in_a_terminal_and_listed_elsewhere(console: Console) -> None:
    text = shown(console)
    assert "shards  " in text
    assert "16 shards verified" in text
    if console.is_terminal:
        assert "2/3    1.0000      0.4000          0.3500         30,000" in text
        assert "test accuracy" in text
        assert "⠤" in text  # a curve
        assert "epoch 1/3, 25% · 1,000 images/s · loss 2.100 · accuracy 0.250 · 0:02:45 left" in text
    else:
        assert text.splitlines()[1:] == [
            "     train  epoch 1 of 3: train loss 2.0000, train accuracy 0.4000, test accuracy 0.3500, 30,000 images/s",
            "     train  epoch 2 of 3: train loss 1.0000, train accuracy 0.4000, test accuracy 0.3500, 30,000 images/s",
        ]


def test_an_epoch_that_is_told_again_is_drawn_once(console: Console) -> None:
    log = logging.getLogger("flows.train")
    with Display(console) as display:
        for number in (1, 2, 1, 2, 3):
            log.info("epoch %d of 3: %s", number, metrics(number), extra={"epoch": metrics(number), "epochs": 3})
    assert [epoch.epoch for epoch in display.history] == ([1, 2, 3] if console.is_terminal else [])


def test_all_that_moves_is_seen_in_a_small_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24)
    with Display(console):
        for number in range(1, 51):
            logging.getLogger("flows.train").info("", extra={"epoch": metrics(number), "epochs": 60})
        now = Now(epoch=51, step=460, steps=469, loss=0.1234, accuracy=0.9876, images_per_second=123_456.0)
        file.seek(0)
        file.truncate()
        logging.getLogger("now").info("%s", now, extra={"now": now, "epochs": 60, "images": 60_000})
        lines = Text.from_ansi(file.getvalue()).plain.splitlines()
    assert len(lines) < 24
    line, *_, last = (line.strip() for line in lines if line.strip())
    assert line == "epoch 51/60, 98% · 123,456 images/s · loss 0.123 · accuracy 0.988 · 0:00:04 left"
    assert last.startswith("50/60 ")


def test_what_is_left_of_an_interrupted_training_says_that_more_was_to_come() -> None:
    file = io.StringIO()
    log = logging.getLogger("flows.train")
    with Display(Console(file=file, force_terminal=True, width=100)):
        log.info("", extra={"epoch": metrics(1), "epochs": 3})
        file.seek(0)
        file.truncate()
    assert "1/3    2.0000" in file.getvalue()
    assert "1/1" not in file.getvalue()


def test_a_display_that_nobody_reads_any_more_ends_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    log = logging.getLogger("flows.train")
    with os.fdopen(writing, "w") as file, Display(Lasting(file=file)) as display:
        log.warning("one")
        log.warning("two")
    assert display.console.quiet


def test_no_handler_stays_behind(console: Console) -> None:
    shown(console)
    for name in ("pipeline", "flows", "now"):
        assert not [handler for handler in logging.getLogger(name).handlers if isinstance(handler, Display)]
        assert logging.getLogger(name).propagate
