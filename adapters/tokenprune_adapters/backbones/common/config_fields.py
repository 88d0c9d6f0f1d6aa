"""Fields of a checkpoint's `config.json`: strict types, and errors that name file and field."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenprune.engine.observations import MAX_SIDE
from tokenprune.errors import CheckpointError, nearest

# The limits lie beyond any such model, so that a wrong number is an error and not a model too large to describe.
Size = Annotated[int, Field(ge=1, le=2**20)]
"""A width, a count of heads, or rows of a vocabulary."""

Depth = Annotated[int, Field(ge=1, le=1024)]
"""A number of layers."""

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
"""The side of an image or a patch in pixels."""


class Fields(BaseModel):
    """JSON fields of exactly the declared types; undeclared fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


FieldsT = TypeVar("FieldsT", bound=Fields)


def parse_fields(
    kind: type[FieldsT], raw: Mapping[str, Any], where: str, closed: Mapping[str, Iterable[str]] | None = None
) -> FieldsT:
    """Check the fields of `config.json`, or of a loaded model's `config`.

    Args:
        kind: The fields.
        raw: The content of the file.
        where: The file, or what to call the model, for errors.
        closed: For each top-level field with an object in which undeclared fields are refused, that object's fields.

    Raises:
        CheckpointError: If a field is missing, malformed or not supported.
    """
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise CheckpointError(f"{where}: '{field}' is missing") from error
        if first["type"] == "extra_forbidden":
            known = (closed or {}).get(str(first["loc"][0]), ())
            hint = nearest(str(first["loc"][-1]), known)
            raise CheckpointError(f"{where}: '{field}' is not supported{hint}") from error
        raise CheckpointError(f"{where}: '{field}' is {reprlib.repr(first['input'])}; {first['msg']}") from error
