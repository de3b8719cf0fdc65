"""Proves that whatever a library says becomes a part of one line, and that nothing said is no error of ours."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, first_line


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
