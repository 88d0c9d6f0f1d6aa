"""What is compared: a pipeline, under a condition that removes a part of the observation or changes the instruction."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.errors import ConfigError, nearest
from tokenprune.evaluation.environment import Suite
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.registry.discovery import Registry
from tokenprune.registry.plugin_checks import DENSE

BLIND = "blind"
OTHER_INSTRUCTION = "other-instruction"
_NO = "no-"
_CONDITION = re.compile(r"(?P<pipeline>.+)\+(?P<condition>[A-Za-z_][\w-]*)")


@dataclass(frozen=True)
class Variant:
    """A pipeline under a condition.

    Attributes:
        label: The text that the user wrote.
        pipeline: The pipeline as plain data, overrides included.
        condition: `blind`, `no-<view>`, `other-instruction`, or an empty string.
    """

    label: str
    pipeline: Mapping[str, Any]
    condition: str = ""


def parse_variant(text: str, registry: Registry, overrides: Sequence[str] = ()) -> Variant:
    """Read `fastv@keep=0.25+no-wrist`.

    Args:
        text: A pipeline as `load_pipeline` takes it, and a condition after a `+` if there is one.
        registry: Installed plugins.
        overrides: `path=value`, for every pipeline but `dense`.

    Raises:
        ConfigError: If the pipeline, an override or the condition is wrong.
        PluginError: If no pipeline has the name.
    """
    found = _CONDITION.fullmatch(text)
    source, condition = (found["pipeline"], found["condition"]) if found else (text, "")
    if found and (again := _CONDITION.fullmatch(source)):
        raise ConfigError(f"'{text}': one condition at a time, not '{again['condition']}' and '{condition}'")
    if condition and not (condition in (BLIND, OTHER_INSTRUCTION) or condition.startswith(_NO)):
        valid = nearest(condition, (BLIND, f"{_NO}<view>", OTHER_INSTRUCTION))
        raise ConfigError(f"'{text}': unknown condition '{condition}'{valid}")
    loaded = load_pipeline(source, registry, () if source == DENSE else overrides)
    return Variant(text, loaded.resolved, condition)


def black_views(variant: Variant, views: Sequence[str]) -> frozenset[str]:
    """Return the views of a policy that are black under the variant's condition.

    Raises:
        ConfigError: If the condition names a view the policy does not have.
    """
    if variant.condition == BLIND:
        return frozenset(views)
    if not variant.condition.startswith(_NO):
        return frozenset()
    view = variant.condition.removeprefix(_NO)
    if view not in views:
        raise ConfigError(f"'{variant.label}': the policy has no view '{view}'{nearest(view, views)}")
    return frozenset({view})


def instruction_of(variant: Variant, suite: Suite, tasks: Sequence[int], task: int) -> str:
    """Return the instruction of a task, or under `other-instruction` the next different one of the evaluated tasks.

    Args:
        variant: What is evaluated.
        suite: The environment.
        tasks: Indices of the tasks evaluated in it, in order.
        task: Index of the task that is run.

    Raises:
        ConfigError: If no evaluated task has another instruction.
    """
    own = suite.tasks[task].instruction
    if variant.condition != OTHER_INSTRUCTION:
        return own
    index = tasks.index(task)
    for other in (*tasks[index + 1 :], *tasks[:index]):
        if suite.tasks[other].instruction != own:
            return suite.tasks[other].instruction
    raise ConfigError(
        f"'{variant.label}': the evaluated tasks of '{suite.name}' all have the instruction '{own}'; "
        f"{OTHER_INSTRUCTION} needs a second task with another one"
    )
