"""The JSON schema of pipeline files, made from the installed stages, for editors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from tokenprune.errors import PluginError
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.registry.discovery import Registry
from tokenprune.stages.config import EMBEDDING, _amount, _cut, _cuts, _keep, _layer, _layers
from tokenprune.tokens.budget import UNION

DIALECT = "https://json-schema.org/draft/2020-12/schema"


_RATIO = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


_COUNT = {"type": "integer", "minimum": 0}


_AMOUNT = {
    "anyOf": [
        _COUNT,
        _RATIO,
        {"const": UNION},
        {"type": "object", "properties": {"ratio": _RATIO}, "required": ["ratio"], "additionalProperties": False},
        {"type": "object", "properties": {"count": _COUNT}, "required": ["count"], "additionalProperties": False},
    ]
}


_AMOUNTS = {"anyOf": [*_AMOUNT["anyOf"], {"type": "array", "items": _AMOUNT, "minItems": 1}]}


_MODES = {
    "type": "object",
    "propertyNames": {"not": {"enum": ["ratio", "count"]}},
    "additionalProperties": _AMOUNTS,
    "minProperties": 1,
}


_LAYER = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"}]}


_CUT = {"anyOf": [{"const": EMBEDDING}, *_LAYER["anyOf"]]}


_WRITTEN: Mapping[Callable[..., object], JsonSchemaValue] = {
    _amount: _AMOUNT,
    _keep: {"anyOf": [*_AMOUNTS["anyOf"], _MODES]},
    _cut: _CUT,
    _cuts: {"anyOf": [*_CUT["anyOf"], {"type": "array", "items": _CUT, "minItems": 1}]},
    _layer: _LAYER,
    _layers: {"anyOf": [*_LAYER["anyOf"], {"type": "array", "items": _LAYER}]},
}
"""What a file may say where `config` accepts shorthand, by the function that reads it."""


class _Generator(GenerateJsonSchema):
    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        written = _WRITTEN.get(schema["discriminator"]) if callable(schema["discriminator"]) else None
        return super().tagged_union_schema(schema) if written is None else copy.deepcopy(written)

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        written = _WRITTEN.get(schema["function"]["function"])
        return super().function_before_schema(schema) if written is None else copy.deepcopy(written)


def pipeline_schema(registry: Registry) -> dict[str, Any]:
    """Make the JSON schema of a pipeline file.

    A stage that cannot be imported, such as one whose optional dependency is missing, may say anything; its description
    says why.

    Args:
        registry: Installed plugins; every stage is one alternative of `stages`, told apart by `use`.

    Returns:
        A schema of draft 2020-12.
    """
    schema = PipelineConfig.model_json_schema(schema_generator=_Generator)
    definitions: dict[str, Any] = {}
    for name in sorted(registry.stages):
        definitions |= _stage(name, registry)
    properties = schema["properties"]
    properties["extends"] = {
        "type": "string",
        "description": "File or shipped pipeline whose keys hold where this file has none.",
    }
    alternatives = [{"$ref": f"#/$defs/{name}"} for name in sorted(registry.stages)]
    properties["stages"]["items"] = {"oneOf": alternatives}
    return {
        "$schema": DIALECT,
        "title": "tokenprune pipeline",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "anyOf": [{"required": schema["required"]}, {"required": ["extends"]}],
        "$defs": {**schema.get("$defs", {}), **definitions},
    }


def _stage(name: str, registry: Registry) -> dict[str, Any]:
    """Definitions of one stage: its own under its name, those it refers to under names that begin with it."""
    use = {"const": name, "description": registry.stage(name).spec.summary}
    try:
        model = registry.stage_class(name).Config
    except PluginError as error:
        return {name: {"type": "object", "properties": {"use": use}, "required": ["use"], "description": str(error)}}
    schema = model.model_json_schema(schema_generator=_Generator, ref_template=f"#/$defs/{name}:{{model}}")
    nested = schema.pop("$defs", {})
    schema["properties"]["use"] = use
    return {name: schema, **{f"{name}:{key}": value for key, value in nested.items()}}
