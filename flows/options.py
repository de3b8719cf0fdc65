"""What the commands have in common: how a field of a configuration becomes an option, the option for the store, and how
lists are printed."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, get_args

from cyclopts import Parameter, Token
from pydantic.fields import FieldInfo
from rich.console import Console

from pipeline.storage import StorageConfig

_STORAGE = StorageConfig.model_fields["storage"]
Storage = Annotated[str, Parameter(help=str(_STORAGE.description))]
DEFAULT_STORAGE: str = _STORAGE.default
LIST_WIDTH = 240


def option(field: FieldInfo, text: str) -> Any:
    """The annotation of a field's option, with this help text."""
    kinds = {field.annotation, *get_args(field.annotation)}
    read = (_whole_or_text if str in kinds else whole) if int in kinds else None
    # What it takes is in its text; and a list of none is never meant.
    shown = Parameter(help=text, converter=read, show_choices=False, show_default=_shown, negative_iterable=())
    return Annotated[field.annotation, shown]


def whole(_: Any, tokens: Sequence[Token]) -> int:
    """The whole number that was given: cyclopts rounds others, 0.4 to 0. ValueError for them."""
    number = _whole_or_text(_, tokens)
    if isinstance(number, str):
        raise ValueError(f'"{number}" is no whole number')
    return number


def _shown(default: Any) -> str | None:
    """A default as one would type it; None for none."""
    match default:
        case None:
            return None
        case tuple():
            return ", ".join(map(str, default))
        case float():
            return f"{default:.4g}"
    return str(default)


def _whole_or_text(_: Any, tokens: Sequence[Token]) -> int | str:
    text = tokens[0].value
    return int(text) if re.fullmatch(r"[+-]?\d+", text, re.ASCII) else text


def plain_console() -> Console:
    """Wide enough that a run stays on its line: a narrow terminal wraps that by itself, where Rich would cut off names,
    which the next command needs whole. Names of classes are anybody's text, and no markup."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, LIST_WIDTH)
    return console
