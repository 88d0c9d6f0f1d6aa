""""""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given

from tests.helpers.planted_stages import GOOD, REGISTRY, pipelines, write
from tokenprune.errors import ConfigError
from tokenprune.pipelines.loader import load_pipeline, pipeline_schema
from tokenprune.registry.discovery import Registry

KINDS = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool}
ABOUT = {"title", "description", "default", "$schema", "$defs"}


def valid(schema, data, root):
    """Whether data fits a JSON schema, for the keywords pipeline schemas use; another keyword is a KeyError."""
    return all(
        CHECKS[keyword](wanted, data, schema, root) for keyword, wanted in schema.items() if keyword not in ABOUT
    )


def of(kind, check):
    """A check that holds for everything that is not of the kind."""
    return lambda wanted, data, schema, root: not isinstance(data, kind) or check(wanted, data, schema, root)


CHECKS = {
    "$ref": lambda w, d, _, root: valid(root["$defs"][w.removeprefix("#/$defs/")], d, root),
    "type": lambda w, d, *_: isinstance(d, KINDS[w]) and (w == "boolean" or not isinstance(d, bool)),
    "const": lambda w, d, *_: d == w and type(d) is type(w),
    "enum": lambda w, d, *_: d in w,
    "not": lambda w, d, _, root: not valid(w, d, root),
    "anyOf": lambda w, d, _, root: any(valid(one, d, root) for one in w),
    "oneOf": lambda w, d, _, root: sum(valid(one, d, root) for one in w) == 1,
    "required": of(dict, lambda w, d, *_: set(w) <= set(d)),
    "properties": of(dict, lambda w, d, _, root: all(valid(w[key], d[key], root) for key in d if key in w)),
    "additionalProperties": of(
        dict,
        lambda w, d, schema, root: all(
            w is not False and valid(w, d[key], root) for key in d if key not in schema.get("properties", {})
        ),
    ),
    "propertyNames": of(dict, lambda w, d, _, root: all(valid(w, key, root) for key in d)),
    "minProperties": of(dict, lambda w, d, *_: len(d) >= w),
    "items": of(list, lambda w, d, _, root: all(valid(w, item, root) for item in d)),
    "minItems": of(list, lambda w, d, *_: len(d) >= w),
    "minLength": of(str, lambda w, d, *_: len(d) >= w),
    "pattern": of(str, lambda w, d, *_: re.search(w, d) is not None),
    "minimum": of(int | float, lambda w, d, *_: d >= w),
    "maximum": of(int | float, lambda w, d, *_: d <= w),
    "exclusiveMinimum": of(int | float, lambda w, d, *_: d > w),
    "exclusiveMaximum": of(int | float, lambda w, d, *_: d < w),
}


@given(data=pipelines())
def test_the_schema_accepts_what_the_loader_accepts(data):
    schema = pipeline_schema(REGISTRY)
    assert valid(schema, data, schema)


@pytest.mark.parametrize(
    "change",
    [
        {"stages.1.kep": 1},
        {"stages.1.keep": 1.5},
        {"stages.1.keep": {"ratio": 0.5, "count": 3}},
        {"stages.1.keep": {"fine": 2.5}},
        {"stages.1.keep": []},
        {"stages.1.keep": [0.5, 2.5]},
        {"stages.1.keep": [[1], 2]},
        {"stages.1.keep": [{"fine": 1}, 2]},
        {"stages.1.keep.fine": []},
        {"stages.1.keep.fine": [0.5, "most"]},
        {"stages.1.views.wrist.keep": [-1, 1]},
        {"stages.1.after": "31 %"},
        {"stages.1.after": []},
        {"stages.1.use": "stear"},
        {"stages.1.metric": "dott"},
        {"stages.1.views": {"wrist": 96}},
        {"stages.0.keep": 1},
        {"stages.0.patience": "3"},
        {"stages": {"use": "pick"}},
        {"version": 2},
        {"name": "Pick Two"},
        {"position": "preserve"},
        {"extends": 3},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_loader_refuses(tmp_path, change):
    schema = pipeline_schema(REGISTRY)
    data = load_pipeline(write(tmp_path, GOOD), REGISTRY).resolved
    assert valid(schema, data, schema)
    ((key, value),) = change.items()
    *steps, last = [int(step) if step.isdecimal() else step for step in key.split(".")]
    node = data
    for step in steps:
        node = node[step]
    node[last] = value
    assert not valid(schema, data, schema)
    with pytest.raises(ConfigError):
        load_pipeline(write(tmp_path, json.dumps(data)), REGISTRY)


@pytest.mark.parametrize("missing", ["version", "name"])
def test_the_schema_lets_a_child_leave_out_what_its_parent_says(tmp_path, missing):
    schema = pipeline_schema(REGISTRY)
    data = load_pipeline(write(tmp_path, GOOD), REGISTRY).resolved
    del data[missing]
    assert not valid(schema, data, schema)
    assert valid(schema, {**data, "extends": "parent.yaml"}, schema)


def test_the_schema_keeps_descriptions_and_says_why_a_stage_cannot_be_loaded():
    schema = pipeline_schema(REGISTRY)
    json.dumps(schema)
    definitions = schema["$defs"]
    assert [one["$ref"] for one in schema["properties"]["stages"]["items"]["oneOf"]] == [
        f"#/$defs/{name}" for name in ("broken", "pick", "steer")
    ]
    assert definitions["pick"]["properties"]["use"] == {"const": "pick", "description": "picks"}
    assert definitions["pick"]["properties"]["floor"]["description"] == "Tokens under `keep` never to fall below."
    assert definitions["pick"]["properties"]["windows"]["description"] == "Where to look."
    assert "ModuleNotFoundError" in definitions["broken"]["description"]
    assert valid(schema, {"version": 1, "name": "a", "stages": [{"use": "broken", "anything": 1}]}, schema)


def test_every_shipped_pipeline_loads_and_passes_the_schema():
    found = Registry.discover()
    schema = pipeline_schema(found)
    assert found.pipelines
    for name in [*found.pipelines, "dense"]:
        loaded = load_pipeline(name, found)
        assert loaded.config.name == name
        assert valid(schema, loaded.resolved, schema), name
