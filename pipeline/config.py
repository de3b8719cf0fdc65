"""Parameters as people give them, checked against a configuration's schema: the rule and the remedy in words."""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)


def config_of(parameters: Mapping[str, Any], kind: type[Config]) -> Config:
    """The checked configuration. Raises ConfigError for the first parameter that breaks a rule."""
    try:
        return kind.model_validate(dict(parameters))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        rule = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        rule, _, remedy = rule.partition("; ")
        if not remedy:
            remedy = f"use {allowed(name, kind)}" if allowed(name, kind) else "see its help"
        raise ConfigError(name, first["input"], rule, remedy) from None


@cache
def _properties(kind: type[BaseModel]) -> dict[str, Any]:
    properties: dict[str, Any] = kind.model_json_schema()["properties"]
    return properties


def allowed(name: str, kind: type[BaseModel]) -> str:
    """What a parameter accepts, in words read from its schema; empty when any text will do."""
    schema = _properties(kind).get(name)
    if schema is None:
        return f"one of {', '.join(kind.model_fields)}"
    for option in [schema, *schema.get("anyOf", [])]:
        low, above = option.get("minimum"), option.get("exclusiveMinimum")
        high, below = option.get("maximum"), option.get("exclusiveMaximum")
        if low is not None or above is not None:
            bounds = [f"from {low}" if low is not None else f"above {above}"]
            if high is not None:
                bounds.append(f"to {high}" if low is not None else f"up to {high}")
            elif below is not None:
                bounds.append(f"below {below}")
            return f"a number {', '.join(bounds)}".replace(f"{low}, to", f"{low} to")
        if "enum" in option:
            return f"one of {', '.join(map(str, option['enum']))}"
        if option.get("pattern") == r"\.json$":
            return "a name that ends in .json"
        if "pattern" in option:
            return f"small letters, digits and {'dashes' if '_' not in option['pattern'] else 'any of . _ -'}"
    return ""
