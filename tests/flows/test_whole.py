"""Proves the whole by command line: interrupted and taken up again, on damaged data, and without a Prefect server."""

import re
import subprocess
import sys
from pathlib import Path

from pipeline import run
from pipeline.config import config_of
from pipeline.publish import read_latest, verify_run
from pipeline.storage import open_store
from pipeline.train import find_training
from tests.conftest import wait_for
from tests.flows.conftest import EPOCHS, Command, GoneOn

BIN = Path(sys.executable).parent


def test_ctrl_c_and_sigterm_leave_nothing_and_the_same_run_id_goes_on_to_a_published_report(gone_on: GoneOn) -> None:
    interrupted = "lenet: interrupted; the same --run-id goes on from the last checkpoint\n"
    first, second, third, store = gone_on.first, gone_on.second, gone_on.third, open_store(gone_on.storage)
    assert (first.returncode, first.err) == (130, interrupted), first.out
    assert (second.returncode, second.err) == (143, interrupted), second.out
    assert (third.returncode, third.err) == (0, "")
    begun = [re.findall(r"from epoch (\d+), step", ended.out) for ended in (first, second, third)]
    assert [len(set(ranks)) for ranks in begun] == [1, 1, 1]
    assert 1 == int(begun[0][0]) < int(begun[1][0]) < int(begun[2][0])

    manifest = verify_run(store, "r")
    lines = third.out.splitlines()
    assert lines[-1] == f"test accuracy {manifest.accuracy:.4f} · report: {gone_on.storage}/runs/r/report.html"
    step = r" *(run|download|shards|lease|train|worker|evaluate|publish|registry|index)  \S|test accuracy "
    assert all(re.match(step, line) for line in lines), third.out
    assert "lenet version 1 (r) is the new champion: there was no champion before" in third.out
    training = find_training(store, "r")
    assert training is not None
    assert [epoch.epoch for epoch in training.history] == list(range(1, EPOCHS + 1))
    assert gone_on.shards_written_again == []
    latest = read_latest(store)
    assert latest is not None
    assert latest.run_id == "r"
    listed = subprocess.run(
        [BIN / "lenet", "runs", "--storage", gone_on.storage], capture_output=True, text=True, check=True
    )
    run_id, state, dataset, recipe, epochs, _, accuracy, *_ = listed.stdout.splitlines()[-1].split()
    assert (run_id, state, dataset, recipe, epochs) == ("r", "published", "fashion-mnist", "seed", f"{EPOCHS}/{EPOCHS}")
    assert accuracy == f"{manifest.accuracy:.4f}"


def test_a_damaged_shard_stops_the_command_with_one_line(tmp_path: Path) -> None:
    command = Command(tmp_path)
    config = run.begin(config_of({"storage": str(tmp_path / "store")}, run.RunConfig), "sharded")
    run.shard(config, run.download(config))
    shard = next(tmp_path.rglob("train-00001-of-00006.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    process = command.start("--epochs", "1", "--run-id", "r")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert re.fullmatch(r"lenet: \S+/train-00001-of-00006\.parquet: shard is altered, [^\n]+\n", err)
    assert "Traceback" not in out
    assert find_training(open_store(str(tmp_path / "store")), "r") is None


def test_a_mistake_is_one_line_and_leaves_nothing_not_even_the_server_that_starts_ahead(tmp_path: Path) -> None:
    command = Command(tmp_path)
    process = command.start("--workers", "1000")
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(r"lenet: workers=1000: Ray has room for [^\n]+\n", err), err
    wait_for(lambda: not command.processes())


def test_a_prefect_server_that_is_not_there_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.env["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    process = command.start("--epochs", "1")
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (2, "")
    message = r"lenet: PREFECT_API_URL='http://127.0.0.1:9/api': no Prefect server answers there [^\n]+\n"
    assert re.fullmatch(message, err), err
    wait_for(lambda: not command.processes())
