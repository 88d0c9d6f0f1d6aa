"""The JSON schema of pipeline files, for editors, built from the installed stages."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import PluginError
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.registry.discovery import Registry

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def pipeline_schema(registry: Registry) -> dict[str, Any]:
    """Make the JSON schema of a pipeline file.

    A stage that cannot be imported, such as one with a missing dependency, accepts any keys; its description has the
    error.

    Args:
        registry: Installed plugins; every stage is one alternative of `stages`, discriminated by `use`.

    Returns:
        A schema of draft 2020-12.
    """
    schema = PipelineConfig.model_json_schema()
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
    """Definitions of one stage, under its name; nested ones under `name:…`."""
    use = {"const": name, "description": registry.stage(name).spec.summary}
    try:
        model = registry.stage_class(name).Config
    except PluginError as error:
        return {name: {"type": "object", "properties": {"use": use}, "required": ["use"], "description": str(error)}}
    schema = model.model_json_schema(ref_template=f"#/$defs/{name}:{{model}}")
    nested = schema.pop("$defs", {})
    schema["properties"]["use"] = use
    return {name: schema, **{f"{name}:{key}": value for key, value in nested.items()}}
