"""Proves that whatever a library says becomes a part of one line, and that nothing said is no error of ours."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, DataError, PipelineError, StorageError, TrainingError, first_line, restored


@given(st.text())
def test_one_line_of_whatever_was_said(text: str) -> None:
    line = first_line(ValueError(text))
    assert line
    assert len(line.splitlines()) == 1
    assert line in text or line == "ValueError"


@pytest.mark.parametrize("silent", [ValueError(), OSError(""), RuntimeError("\n")])
def test_who_says_nothing_is_named(silent: Exception) -> None:
    assert first_line(silent) == type(silent).__name__


def test_a_wrong_parameter_is_named_with_its_value_the_rule_and_the_remedy() -> None:
    assert str(ConfigError("epochs", 0, "at least 1", "give more")) == "epochs=0: at least 1; give more"


@pytest.mark.parametrize(
    "error",
    [ConfigError("epochs", "0", "at least 1", "give more"), DataError("x"), StorageError("x", may_pass=False)],
)
def test_an_error_that_was_told_as_data_is_the_same_again(error: PipelineError) -> None:
    again = restored(type(error).__name__, [str(arg) for arg in error.args], error.may_pass)
    assert (type(again), str(again), again.may_pass) == (type(error), str(error), error.may_pass)


def test_of_an_error_told_by_another_version_what_is_known_is_kept() -> None:
    assert restored("StorageError", ["x"]).may_pass
    unknown = restored("LaterError", ["x"], may_pass=True)
    assert (type(unknown), str(unknown), unknown.may_pass) == (TrainingError, "x", True)
