"""Proves that what is listed in a narrow terminal can be given to the next command."""

from pathlib import Path

import pytest

from flows.cli import main
from pipeline.catalog import CATALOG
from pipeline.record import RunRecord, keep_record
from pipeline.storage import open_store

RUNS = [f"fashion-mnist-seed-20261123-14502{number}-1a2b3c4d" for number in range(3)]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [(["runs"], RUNS), (["data", "list"], [entry.homepage for entry in CATALOG.values()])],
    ids=["runs", "data list"],
)
def test_no_name_is_cut_off_in_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], names: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which Rich takes anything for a terminal
    for run_id in RUNS:
        parameters = {"dataset": "fashion-mnist", "recipe": "seed", "epochs": 10}
        keep_record(open_store(str(tmp_path)), run_id, RunRecord(parameters=parameters, versions={}))
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--storage", str(tmp_path)])
    assert not left.value.code
    out = capsys.readouterr().out
    assert "\x1b[" in out, "it was no terminal"
    assert "…" not in out
    assert all(name in out for name in names)
