"""What the commands have in common: how a field of a configuration becomes an option, the option for the store, and how
lists are printed."""

from typing import Annotated, Any

from cyclopts import Parameter
from pydantic.fields import FieldInfo
from rich.console import Console

from pipeline.storage import StorageConfig

_STORAGE = StorageConfig.model_fields["storage"]
Storage = Annotated[str, Parameter(help=str(_STORAGE.description))]
DEFAULT_STORAGE: str = _STORAGE.default
PIPE_WIDTH = 240


def option(field: FieldInfo, text: str) -> Any:
    """The annotation of a field's option, with this help text."""
    return Annotated[field.annotation, Parameter(help=text)]


def plain_console() -> Console:
    """As wide as the terminal; where there is none, wide enough that a run stays on its line. Names of classes are
    anybody's text, and no markup."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console
