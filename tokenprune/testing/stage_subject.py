"""A stage on a tiny backbone: what every check is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tokenprune.engine.adapter import Backbone
from tokenprune.loading import load_backbone
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry.discovery import Registry
from tokenprune.stages.config import CutConfig
from tokenprune.testing.matrix import PRESET, alone, random_observation

INSTRUCTIONS = ("put the bowl on the plate", "push it", "pick up the black bowl next to the ramekin")
STEPS = 4
"""Control steps that are executed between two queries."""


@dataclass(frozen=True)
class StageSubject:
    """A stage, alone in a pipeline, on a backbone with untrained weights.

    Attributes:
        stage: Its name.
        registry: Where it is found.
        backbone_name: The backbone's name.
        config: The pipeline: the stage as the first shipped pipeline that has it says, else by its defaults,
            but for what was set.
    """

    stage: str
    registry: Registry
    backbone_name: str
    config: PipelineConfig

    @property
    def backbone(self) -> Backbone:
        """The backbone in float64, where a comparison can be strict."""
        return self.backbone_in("float64")

    def backbone_in(self, dtype: str) -> Backbone:
        """The backbone in another type."""
        return _backbone(self.registry, self.stage, self.backbone_name, dtype)

    @property
    def cuts(self) -> bool:
        """Whether the stage cuts at all."""
        return isinstance(self.config.stages[0], CutConfig)

    def keeping_everything(self) -> PipelineConfig:
        """The same pipeline, told to keep every token."""
        stage = self.config.stages[0]
        keep = dict.fromkeys(self.config.modes, 1.0) if isinstance(stage.keep, dict) else 1.0
        return self.config.model_copy(update={"stages": (stage.model_copy(update={"keep": keep, "views": {}}),)})

    def policy(
        self, config: PipelineConfig | None = None, slots: Sequence[int] = (0,), backbone: Backbone | None = None
    ) -> Policy:
        """A policy with an episode begun in every slot."""
        policy = Policy(backbone or self.backbone, config or self.config, self.registry)
        for slot in slots:
            policy.reset(INSTRUCTIONS[0], slot)
        return policy

    def queries(self, policy: Policy, count: int, slots: Sequence[int] = (0,), first: int = 0) -> list[ActionChunk]:
        """The chunks of the last slot in some queries in which the arm moves."""
        chunks = []
        for query in range(first, first + count):
            seen = {slot: self.observation(slot, query) for slot in slots}
            chunks.append(policy.act_batch(seen)[slots[-1]])
            for slot in slots:
                for step in range(STEPS):
                    # Slow and downwards, then fast, in turn, so that controllers have something to choose.
                    action = np.full(policy.backbone.info.action.dims, (-0.01, 0.6)[query % 2])
                    pose = np.full(7, float(query * query + step * query), dtype=np.float64)
                    policy.executed(action, pose, observation=self.observation(slot, query, step), slot=slot)
        return chunks

    def observation(self, slot: int, query: int, step: int = -1) -> dict[str, Any]:
        """Noise that depends on these numbers alone; the left half changes only from query to query."""
        still = random_observation(self.backbone, np.random.default_rng((slot, 999)))
        fresh = random_observation(self.backbone, np.random.default_rng((slot, query, step + 1)))
        for view, image in fresh["images"].items():
            image[:, : image.shape[1] // 2] = still["images"][view][:, : image.shape[1] // 2]
        return fresh


def subjects(stage: str, registry: Registry, settings: Mapping[str, Any] | None = None) -> Iterator[StageSubject]:
    """The stage, with some keys of its configuration set, on every backbone that has a preset `tiny`."""
    shipped = [load_pipeline(name, registry).config for name in sorted(registry.pipelines)]
    config = alone(stage, shipped, registry, settings)
    for name, registered in sorted(registry.backbones.items()):
        if PRESET in registered.spec.presets:
            yield StageSubject(stage, registry, name, config)


@cache
def _backbone(registry: Registry, stage: str, name: str, dtype: str) -> Backbone:
    # One for each stage, so that what a broken one does to it is not blamed on the next.
    return load_backbone(name, registry, None, PRESET, "cpu", dtype, 0, {})
