"""Checks plain data against a configuration class, with error messages for the author of the file."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tokenprune.errors import nearest
from tokenprune.pipelines.yaml_document import Location

ModelT = TypeVar("ModelT", bound=BaseModel)
_KINDS = {"model_type": "a mapping", "dict_type": "a mapping", "tuple_type": "a list", "list_type": "a list"}


class Complaint(NamedTuple):
    """An error in the data: where, what, whether the key is wrong instead of its value, and the field's name."""

    location: Location
    text: str
    key: bool = False
    field: str = ""


def parse(
    model: type[ModelT], data: Mapping[str, Any], extra: tuple[str, ...] = ()
) -> tuple[ModelT | None, list[Complaint]]:
    """Make a configuration from plain data, without type coercion.

    Args:
        model: Configuration class.
        data: Content of a file.
        extra: Further keys that the file may have, for suggestions.

    Returns:
        The configuration and no complaints, or None and at least one.
    """
    try:
        # Strict JSON mode accepts lists for tuples and integers for floats, and coerces nothing else.
        return model.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        return None, _complaints(error.errors(include_url=False), model, data, extra)
    except Exception as error:  # a plugin's own validator may raise anything
        return None, [Complaint((), f"{model.__name__} cannot read this: {type(error).__name__}: {error}")]


def _complaints(
    errors: list[ErrorDetails], model: type[BaseModel], data: Mapping[str, Any], extra: tuple[str, ...]
) -> list[Complaint]:
    found: list[Complaint] = []
    values: dict[Location, list[tuple[str, str]]] = {}
    for error in errors:
        location = _within(error["loc"], data)
        if error["type"] == "missing":
            found.append(Complaint(location, f"missing key '{error['loc'][-1]}'"))
        elif error["type"] == "extra_forbidden":
            name = str(error["loc"][-1])
            valid = [*_keys_at(model, error["loc"][:-1]), *(extra if len(error["loc"]) == 1 else ())]
            found.append(Complaint(location, f"unknown key '{name}'{nearest(name, valid)}", key=True))
        else:
            values.setdefault(location, []).append(_wording(error))
    for location, wordings in values.items():
        # Several errors at one place come from the branches of a union, any of which would be valid.
        expected = " or ".join(dict.fromkeys(expected for expected, _ in wordings))
        found.append(Complaint(location, expected + wordings[-1][1], field=".".join(map(str, location))))
    return found


def _within(location: tuple[Any, ...], data: Any) -> Location:  # noqa: ANN401
    """Reduce pydantic's location, which also names union branches and missing keys, to a path in the data."""
    found: Location = ()
    for step in location:
        if (isinstance(data, dict) and step in data) or (isinstance(data, list) and step in range(len(data))):
            data = data[step]
            found = (*found, step)
    return found


def _wording(error: ErrorDetails) -> tuple[str, str]:
    """What would be valid, and what was found instead."""
    kind, context, found = error["type"], error.get("ctx", {}), error["input"]
    got = f", got {reprlib.repr(found)}"
    if kind in ("value_error", "assertion_error"):
        return str(context["error"]), ""
    if kind in ("literal_error", "enum"):
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"must be {context['expected']}", got + (nearest(found, choices) if isinstance(found, str) else "")
    if kind == "too_short":
        return f"must have at least {context['min_length']} entries", got
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}", got
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}", got
    return error["msg"].replace("Input should", "must"), got


def _keys_at(annotation: Any, location: Location) -> list[str]:  # noqa: ANN401
    """Valid keys of the mapping at a location below a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not location:
            return list(annotation.model_fields)
        below = annotation.model_fields.get(str(location[0]))
        return _keys_at(below.annotation, location[1:]) if below else []
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _keys_at(arguments[0], location)
    if get_origin(annotation) in (Union, UnionType):
        return [key for argument in arguments for key in _keys_at(argument, location)]
    return [key for argument in arguments for key in _keys_at(argument, location[1:])] if location else []
