"""The fields of a configuration as a function's signature, so that Prefect's form, `-p` and the command line all show
the same names, defaults, bounds and help, written once."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config import allowed

Function = TypeVar("Function", bound=Callable[..., Any])


def with_parameters(
    config: type[BaseModel],
    annotate: Callable[[FieldInfo, str], Any] = lambda field, text: Annotated[field.annotation, field],
) -> Callable[[Function], Function]:
    """Give a function of **parameters the fields of `config` as keyword-only parameters.

    `annotate` makes each one's annotation from the field and its help text; Prefect's form takes the field itself.
    """

    def decorate(function: Function) -> Function:
        parameters, lines = [], [inspect.cleandoc(function.__doc__ or ""), "", "Args:"]
        of_recipe = getattr(config, "of_recipe", ())  # with pipeline.recipe comes torch, which `make up` does without
        for name, field in config.model_fields.items():
            text = str(field.description)
            if allowed(name, config):
                text += f" Takes {allowed(name, config)}."
            if name in of_recipe and field.default is None:
                text += " The recipe's own if not given."
            annotation = annotate(field, text)
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
            )
            lines.append(f"    {name}: {text}")
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__doc__ = "\n".join(lines)  # where Prefect finds the help texts of its form
        return function

    return decorate
