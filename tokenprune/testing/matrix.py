"""Which stages and pipelines run on which backbones, determined by running them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenprune.engine.adapter import Backbone
from tokenprune.errors import CapabilityError, ConfigError, LayoutError, TokenPruneError
from tokenprune.loading import load_backbone
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.pipelines.loader import load_pipeline, parse_pipeline
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry

PRESET = "tiny"
INSTRUCTION = "put the bowl on the plate"
QUERIES = 2
SIDE = 96


@dataclass(frozen=True)
class Cell:
    """The result of one stage or pipeline on one backbone.

    Attributes:
        kind: `stage` or `pipeline`.
        name: Name of the stage or pipeline.
        backbone: Name of the backbone.
        verdict: `runs`; `refused` before the first query, because the backbone lacks something; or `fails`.
        why: The error message, if it does not run.
        notes: The stages' caveats on this backbone.
    """

    kind: str
    name: str
    backbone: str
    verdict: str
    why: str = ""
    notes: tuple[str, ...] = ()


def matrix(registry: Registry) -> list[Cell]:
    """Run every stage, in a pipeline of its own, and every shipped pipeline on every backbone.

    Each runs a few queries on random images with the backbone's untrained preset `tiny`.
    """
    shipped = {name: load_pipeline(name, registry).config for name in sorted(registry.pipelines)}
    subjects = [
        *(("stage", name, alone(name, shipped.values(), registry)) for name in sorted(registry.stages)),
        *(("pipeline", name, config) for name, config in shipped.items()),
    ]
    return [
        _cell(kind, subject, name, backbone, config, registry)
        for name, backbone in _backbones(registry)
        for kind, subject, config in subjects
    ]


def _backbones(registry: Registry) -> Iterator[tuple[str, Backbone]]:
    for name, registered in sorted(registry.backbones.items()):
        if PRESET in registered.spec.presets:
            yield name, load_backbone(name, registry, None, PRESET, "cpu", "float32", 0, {})


def alone(
    stage: str, shipped: Iterable[PipelineConfig], registry: Registry, settings: Mapping[str, Any] | None = None
) -> PipelineConfig:
    """A pipeline of one stage, configured as in the first shipped pipeline that has it, else by its defaults.

    Args:
        stage: Name of the stage.
        shipped: Pipelines to search for it.
        registry: Installed plugins.
        settings: Keys of its configuration to change.

    Raises:
        ConfigError: If the stage rejects this configuration.
    """
    modes: tuple[str, ...] = DENSE.modes
    base: dict[str, Any] = {"keep": 0.5} if "keep" in registry.stage_class(stage).Config.model_fields else {}
    found = ((pipeline, config) for pipeline in shipped for config in pipeline.stages if config.use == stage)
    for pipeline, config in found:
        if not settings:
            return PipelineConfig(version=1, name="alone", modes=pipeline.modes, stages=(config,))
        modes, base = pipeline.modes, config.model_dump(mode="json", exclude_unset=True)
        break
    entry = {**base, **(settings or {}), "use": stage}
    data = {"version": 1, "name": "alone", "modes": list(modes), "stages": [entry]}
    return parse_pipeline(data, registry, stage).config


def _cell(
    kind: str, name: str, backbone_name: str, backbone: Backbone, config: PipelineConfig, found: Registry
) -> Cell:
    try:
        policy = Policy(backbone, config, found)
        policy.reset(INSTRUCTION)
    except (CapabilityError, ConfigError, LayoutError) as error:
        return Cell(kind, name, backbone_name, "refused", str(error))
    rng = np.random.default_rng(0)
    try:
        for _ in range(QUERIES):
            chunk = policy.act(random_observation(backbone, rng))
            policy.executed(chunk.actions[0])
    except TokenPruneError as error:
        return Cell(kind, name, backbone_name, "fails", str(error))
    bound = policy.pipeline
    notes = tuple(note for stage in bound.stages if (note := stage.caveats(bound.info)))
    return Cell(kind, name, backbone_name, "runs", notes=notes)


def random_observation(backbone: Backbone, rng: np.random.Generator) -> dict[str, Any]:
    """An observation of noise in every view, and a robot state near the middle of its range."""
    images = {view: rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for view in backbone.info.views}
    size = backbone.info.state_size
    return {"images": images} if size is None else {"images": images, "state": 0.1 * rng.normal(size=size)}
