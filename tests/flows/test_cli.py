"""Proves that a mistake on the command line costs one line and an exit code, and that help and layers are right."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from pipeline.run import RunConfig


def lenet(*arguments: str) -> int:
    """Run the command line in this process; its exit code."""
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    """That is all there was to read, on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"lenet: {message}")


@pytest.mark.parametrize(
    ("arguments", "message", "exit_code"),
    [
        ("--dataset cifar", "dataset='cifar': not one of fashion-mnist, mnist", 2),
        ("--epochs 0", "epochs=0: it should be greater than or equal to 1; use a number from 1 to 10000", 2),
        ("--epochs ten", 'Invalid value for --epochs: "ten" is no whole number', 2),
        ("--epochs 2.5", 'Invalid value for --epochs: "2.5" is no whole number', 2),
        ("--workers 2.5", "workers='2.5': it should be auto, a number from 1 to 10000 or a range of them;", 2),
        ("--epoch 3", "Unknown option: --epoch. Did you mean --epochs?", 2),
        ("--global-batch-size 0", "global_batch_size=0: it should be greater than or equal to 1;", 2),
        (
            "--workers 0",
            "workers=0: it should be auto, a number from 1 to 10000 or a range of them; use one like 2 or 2-8",
            2,
        ),
        ("--workers 3-2", "workers='3-2': it should be auto, a number from 1 to 10000 or a range of them; use", 2),
        (
            "--recipe best",
            "recipe='best': no such recipe; use one of seed, classic, modern, or a recipe's .json file",
            2,
        ),
        ("--recipe no.json", "recipe='no.json': the file cannot be read (No such file or directory); use one that", 2),
        ("--workers 1000", "workers=1000: Ray has room for ", 2),
        ("--workers 1 --gpu yes", "gpu='yes': 1 workers need a GPU each and Ray has 0; use gpu=no, or see that", 2),
        ("--source /nowhere", "source='/nowhere': no such folder; use auto, a folder with IDX files, or a URL", 2),
        ("--storage ftp://x/y", "storage='ftp://x/y': the store is a folder, file:///path or s3://bucket/prefix;", 2),
        ("--storage s3://key:secret@bucket", "storage='s3://…@bucket': credentials do not belong in a URL;", 2),
        ("--storage /etc/passwd", "storage='/etc/passwd': is a file; name a folder, or s3://bucket/prefix", 2),
        (
            "--storage /dev/null/store",
            "storage='/dev/null/store': not found (Not a directory); check that the store's folder is there, or can",
            1,
        ),
        (
            "--storage /proc/store",
            "storage='/proc/store': not found (No such file or directory); check that the store's folder is there, or",
            1,
        ),
        ("--ray-address 127.0.0.1:9", "ray_address='127.0.0.1:9': no Ray cluster answers there (", 1),
        ("--ray-address nonsense", "ray_address='nonsense': no Ray cluster answers there (", 1),
    ],
)
def test_a_mistake_gives_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str, exit_code: int
) -> None:
    assert lenet("train", *arguments.split()) == exit_code
    assert_one_line(capsys, message)


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The command's help on one line, without its frame."""
    assert lenet(command, "--help") == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_shows_every_parameter_with_its_bounds_and_what_it_is_if_not_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of("train", capsys)
    assert "--epochs Passes over the training set. Takes a number from 1 to 10000. The recipe's own if" in text
    assert "--shift Pixels by which to shift training images at most. Takes a number from 0 to 16. The recipe's" in text
    assert text.count("The recipe's own if not given.") == len(RunConfig.of_recipe & RunConfig.model_fields.keys())
    assert "--gpu Give each worker a GPU: yes, no, or auto (" in text
    assert "choices:" not in text, "it says so twice"
    assert "[default: ./store]" in text
    assert "[default: 0.1667]" in text
    assert "None" not in text


def test_tunes_help_offers_what_a_search_does(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("tune", capsys)
    assert "--vary What to vary: lr, global_batch_size, " in text
    assert "Give it several times to vary several. [default: lr]" in text
    for absent in ("empty-vary", "--checkpoint", "http://host", "Ray job"):
        assert absent not in text, absent
    assert "--ray-address Ray cluster to search on: auto or host:port" in text


def test_layers_prints_the_table_with_its_total(capsys: pytest.CaptureFixture[str]) -> None:
    assert lenet("layers") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["│", "conv1", "│", "Conv2d", "│", "6x28x28", "│", "156", "│"] in lines
    assert ["│", "total", "│", "│", "│", "61,706", "│"] in lines


def test_a_mistake_leaves_no_store_behind(tmp_path: Path) -> None:
    assert lenet("train", "--workers", "1000", "--storage", str(tmp_path / "store")) == 2
    assert not (tmp_path / "store").exists()


def test_a_store_without_runs_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert lenet("runs", "--storage", str(tmp_path)) == 0
    assert capsys.readouterr().out == f"no run yet: {tmp_path}\n"


@pytest.mark.parametrize(
    ("arguments", "message", "exit_code"),
    [
        ("tune --workers 1000", "workers=1000: Ray has room for ", 2),
        ("tune --trials 0", "trials=0: it should be greater than or equal to 1; use a number from 1 to 10000", 2),
        ("tune --vary lr --checkpoint-steps 5", "Unknown option: --checkpoint-steps.", 2),
        ("tune --vary colour", 'Invalid value "colour" for --vary', 2),
        (
            "tune --output tuned.yaml",
            "output='tuned.yaml': String should match pattern '\\.json$'; use a name that ends in .json",
            2,
        ),
        (
            "tune --output /nowhere/t.json",
            "output='/nowhere/t.json': No such file or directory; name a file that can",
            2,
        ),
        ("tune --validation-fraction 0", "validation_fraction=0.0: it should be greater than 0; use a number", 2),
        ("runs compare one other", "", 1),
        ("index", "no run yet: ", 1),
        ("promote 1.5", '"1.5" is no whole number', 2),
        ("promote", 'Command "promote" parameter VERSION requires an argument.', 2),
        ("retention --keep-days 0.7", 'Invalid value for --keep-days: "0.7" is no whole number', 2),
    ],
)
def test_a_mistake_in_another_command_costs_a_line_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: str, message: str, exit_code: int
) -> None:
    assert lenet(*arguments.split(), "--storage", str(tmp_path)) == exit_code
    assert_one_line(capsys, message)


def test_an_age_that_no_calendar_holds_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert lenet("gc", "--older-than-hours", "1e12") == 2
    assert_one_line(capsys, 'Invalid value "1000000000000.0" for --older-than-hours. Must be <= 876000.')


def test_whoever_reads_the_output_may_stop_reading(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "flows", "gc", "--storage", str(tmp_path)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
