"""Loads a pipeline by name or from a file, and applies `extends` and overrides."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.errors import PluginError, nearest
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.pipelines.overrides import SUFFIXES, Draft
from tokenprune.pipelines.schema import pipeline_schema as pipeline_schema
from tokenprune.pipelines.validation import parse
from tokenprune.pipelines.yaml_document import Location, Problem
from tokenprune.registry.discovery import Registry
from tokenprune.stages.config import StageConfig


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline ready to be bound.

    Attributes:
        config: The checked configuration.
        resolved: The same as JSON data with `extends` and overrides applied; as a pipeline file, it loads to the same
            configuration.
        origin: Path of the file, or `built in` for `dense`.
        label: The pipeline's name; with inline overrides, the source as the user wrote it.
    """

    config: PipelineConfig
    resolved: dict[str, Any]
    origin: str
    label: str


def load_pipeline(source: str | Path, registry: Registry, overrides: Sequence[str] = ()) -> LoadedPipeline:
    """Load a pipeline and check it against the installed stages.

    Args:
        source: Name of a shipped pipeline, `dense`, or path of a file that ends in `.yaml` or `.yml`. It may end in
            `@key=value,key=value`: a key with dots is a path as in `overrides`; one without is set in every stage that
            has this field, else in the pipeline.
        registry: Installed plugins.
        overrides: `path=value` with a dotted path, such as `stages.1.keep=0.5`; values are YAML. Applied last.

    Raises:
        ConfigError: If the pipeline is wrong; one line per problem, which begins with `file:line:col` or the option.
        PluginError: If no pipeline has the name.
    """
    name, inline = _split(source)
    draft = Draft.open(name, registry)
    for text in inline:
        _assign_inline(draft, name, text, registry)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            draft.problems.append(Problem(f"--set {text}", 0, 0, "write PATH=VALUE, such as stages.0.keep=0.5"))
        else:
            draft.assign(key.strip(), value, f"--set {key.strip()}")
    config = _check(draft, registry)
    return LoadedPipeline(config, draft.data, draft.origin, str(source) if inline else config.name)


def load_pipelines(
    sources: Iterable[str | Path], registry: Registry, overrides: Sequence[str] = ()
) -> list[LoadedPipeline]:
    """Load pipelines in order, without duplicates; overrides apply to all but `dense`, which has no stages.

    Args:
        sources: As in `load_pipeline`.
        registry: Installed plugins.
        overrides: As in `load_pipeline`.

    Raises:
        ConfigError: If one of them is wrong.
        PluginError: If no pipeline has a name.
    """
    distinct = dict.fromkeys(sources)
    return [load_pipeline(source, registry, () if source == DENSE.name else overrides) for source in distinct]


def parse_pipeline(data: Mapping[str, Any], registry: Registry, origin: str) -> LoadedPipeline:
    """Check a pipeline that is plain data, such as `LoadedPipeline.resolved` in a result.

    Args:
        data: Content of a file without `extends`.
        registry: Installed plugins.
        origin: Where the data comes from; error messages begin with it.

    Raises:
        ConfigError: If the pipeline is wrong; one line per problem, with its dotted path.
    """
    draft = Draft.of(data, origin)
    config = _check(draft, registry)
    return LoadedPipeline(config, draft.data, origin, config.name)


def _split(source: str | Path) -> tuple[str, list[str]]:
    """Split `NAME@key=value,key=value`; a comma that no `key=` follows belongs to the value."""
    text = str(source)
    name, at, assignments = text.rpartition("@")
    if (
        not at
        or isinstance(source, Path)
        or (text.endswith(SUFFIXES) and (Path(text).is_file() or "=" not in assignments))
    ):
        return text, []
    return name, re.split(r",(?=[^,=\[\]{}]+=)", assignments)


def _assign_inline(draft: Draft, name: str, text: str, registry: Registry) -> None:
    key, equals, value = text.partition("=")
    key = key.strip()
    option = f"{name}@{key}"
    if not equals:
        draft.problems.append(Problem(f"{name}@{text}", 0, 0, "write NAME@KEY=VALUE, such as fastv@keep=0.5"))
        return
    stages = draft.data.get("stages")
    fields = [_fields(stage, registry) for stage in (stages if isinstance(stages, list) else [])]
    having = [index for index, names in enumerate(fields) if key in names]
    if having:
        for index in having:
            draft.assign(f"stages.{index}.{key}", value, option)
    elif "." in key or key in PipelineConfig.model_fields:
        draft.assign(key, value, option)
    else:
        valid = {*PipelineConfig.model_fields, *(name for names in fields for name in names)}
        draft.problems.append(
            Problem(option, 0, 0, f"no stage of this pipeline has a field '{key}'{nearest(key, valid)}")
        )


def _fields(stage: object, registry: Registry) -> Mapping[str, object]:
    """Fields of a stage; empty if the stage is wrong, which `_check` reports."""
    try:
        return registry.stage_class(stage["use"]).Config.model_fields if isinstance(stage, dict) else {}
    except (KeyError, TypeError, PluginError):
        return {}


def _check(draft: Draft, registry: Registry) -> PipelineConfig:
    data = dict(draft.data)
    entries = data.pop("stages", [])
    if data.pop("extends", None) is not None:
        draft.report(("extends",), "only a file can extend another")
    config, complaints = parse(PipelineConfig, data, extra=("extends",))
    for complaint in complaints:
        draft.report(*complaint)
    modes = data.get("modes", DENSE.modes)
    modes_known = not any(complaint.location[:1] == ("modes",) for complaint in complaints)
    stages: list[StageConfig] = []
    if isinstance(entries, list):
        for index, entry in enumerate(entries):
            stage = _stage(draft, entry, ("stages", index), registry)
            if stage is None:
                continue
            stages.append(stage)
            if modes_known:
                _check_modes(draft, stage, modes, ("stages", index), entry)
    else:
        got = reprlib.repr(entries)
        draft.report(("stages",), f"stages: must be a list of mappings such as 'use: fastv', got {got}")
    draft.stop_on_problems()
    assert config is not None
    return PipelineConfig(**{name: getattr(config, name) for name in config.model_fields_set}, stages=tuple(stages))


def _stage(draft: Draft, entry: object, location: Location, registry: Registry) -> StageConfig | None:
    if not isinstance(entry, dict):
        draft.report(location, f"a stage is a mapping such as 'use: fastv', got {reprlib.repr(entry)}")
        return None
    if not isinstance(entry.get("use"), str):
        problem = f"use: must be the name of a stage, got {entry['use']!r}" if "use" in entry else "missing key 'use'"
        draft.report((*location, "use") if "use" in entry else location, problem)
        return None
    try:
        model = registry.stage_class(entry["use"]).Config
    except PluginError as error:
        draft.report((*location, "use"), str(error))
        return None
    stage, complaints = parse(model, entry)
    for complaint in complaints:
        draft.report((*location, *complaint.location), *complaint[1:])
    return stage


def _check_modes(draft: Draft, stage: StageConfig, modes: Sequence[str], location: Location, entry: object) -> None:
    for name, named in stage.modes().items():
        place = (*location, *_place_of(name, entry))
        for mode in sorted(named - set(modes)):
            draft.report((*place, mode), f"unknown mode '{mode}'{nearest(mode, modes)}", key=True)
        for mode in modes:
            if mode not in named:
                draft.report(place, f"{name} says nothing about mode '{mode}'")
    for mode in sorted(stage.chooses() - set(modes)):
        message = f"chooses mode '{mode}', which the pipeline does not declare{nearest(mode, modes)}"
        draft.report(location, message, field=".".join(map(str, location)))


def _place_of(key: str, data: object) -> Location:
    """Longest path in the data that a dotted key names; names in the path may contain dots."""
    steps = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    ways: list[Location] = [
        (step, *_place_of(key[len(str(step)) + 1 :], below))
        for step, below in steps
        if f"{key}.".startswith(f"{step}.")
    ]
    return max(ways, key=lambda way: len(".".join(map(str, way))), default=())
