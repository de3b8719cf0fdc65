"""The parameters of RunConfig as a function's signature, so that Prefect's form, `-p` and the command line all show
the same names, defaults, bounds and help, written once."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

from pipeline.run import RunConfig

Function = TypeVar("Function", bound=Callable[..., Any])


def with_run_parameters(function: Function) -> Function:
    """Give a function of **parameters the fields of RunConfig as keyword-only parameters, documented one by one."""
    parameters, help_lines = [], []
    for name, field in RunConfig.model_fields.items():
        annotation = Annotated[field.annotation, field, Parameter(help=field.description)]  # type: ignore[name-defined]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
        )
        help_lines.append(f"    {name}: {field.description}")
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # Prefect takes the form's help texts from the docstring.
    function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Args:", *help_lines])
    return function
