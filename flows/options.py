"""What the commands have in common: how a field of a configuration becomes an option, and the option for the store."""

from typing import Annotated, Any

from cyclopts import Parameter
from pydantic.fields import FieldInfo

from pipeline.storage import StorageConfig

_STORAGE = StorageConfig.model_fields["storage"]
Storage = Annotated[str, Parameter(help=str(_STORAGE.description))]
DEFAULT_STORAGE: str = _STORAGE.default


def option(field: FieldInfo, text: str) -> Any:
    """The annotation of a field's option, with this help text."""
    return Annotated[field.annotation, Parameter(help=text)]
