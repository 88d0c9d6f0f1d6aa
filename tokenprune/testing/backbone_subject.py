"""A backbone in a small preset: what every check of a backbone is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from tokenprune.engine.adapter import Backbone, Observation
from tokenprune.errors import ConfigError
from tokenprune.loading import load_backbone
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry.discovery import Registry
from tokenprune.testing.comparison import normalised
from tokenprune.testing.matrix import PRESET, random_observation
from tokenprune.testing.query_spy import spied
from tokenprune.testing.thinning import registry, thinning

INSTRUCTIONS = ("put the bowl on the plate", "push it", "pick up the black bowl next to the ramekin")
SAME_LENGTH = ("put the bowl on the plate", "put the plate on the bowl")
"""Two instructions of the same words, which most tokenizers make as long."""


@dataclass(frozen=True)
class BackboneSubject:
    """A backbone, in one of its presets, on the CPU.

    Attributes:
        name: Its name.
        registry: Where it is found.
        preset: Of its presets, the one that is checked.
        options: The backbone's own.
    """

    name: str
    registry: Registry
    preset: str
    options: Mapping[str, Any]

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone in float64, where a comparison can be strict."""
        return self.built()

    @cached_property
    def thinned(self) -> PipelineConfig:
        """A pipeline that drops tokens before layer 0 and halfway."""
        return thinning(self.backbone.info.decoder.depth)

    @property
    def keeping_everything(self) -> PipelineConfig:
        """The same pipeline, told to keep every token."""
        return thinning(self.backbone.info.decoder.depth, (1.0, 1.0))

    @property
    def factory(self) -> Any:  # noqa: ANN401 - a BackboneFactory
        """What makes it."""
        return self.registry.backbone_factory(self.name)

    def built(self, dtype: str = "float64", seed: int = 0) -> Backbone:
        """Another one."""
        return load_backbone(self.name, self.registry, None, self.preset, "cpu", dtype, seed, self.options)

    def observation(self, seed: int) -> dict[str, Any]:
        """Noise that depends on the seed alone."""
        return random_observation(self.backbone, np.random.default_rng(seed))

    def alike(self, count: int) -> tuple[list[Observation], list[str]]:
        """Observations and instructions that differ and can share a pass: those of the same layout as the first."""
        observations = [self.observation(seed) for seed in range(count)]
        layout = self.backbone.encode(INSTRUCTIONS[0], observations[0].get("state")).layout
        instructions = []
        for row, observation in enumerate(observations):
            if self.backbone.encode(INSTRUCTIONS[0], observation.get("state")).layout != layout:
                observation["state"] = observations[0]["state"]
            words = SAME_LENGTH[row % 2]
            same = self.backbone.encode(words, observation.get("state")).layout == layout
            instructions.append(words if same else INSTRUCTIONS[0])
        return list(observations), instructions

    def policy(self, config: PipelineConfig = DENSE, backbone: Backbone | None = None) -> Policy:
        """A policy without an episode."""
        return Policy(self.backbone if backbone is None else backbone, config, registry())

    def ask(
        self,
        config: PipelineConfig = DENSE,
        observations: Sequence[Observation] | None = None,
        instructions: Sequence[str] = INSTRUCTIONS[:1],
        backbone: Backbone | None = None,
        first_slot: int = 0,
    ) -> list[ActionChunk]:
        """The chunks of the first query of a new policy, a slot for each observation, in one call."""
        observations = [self.observation(0)] if observations is None else observations
        policy = self.policy(config, backbone)
        for slot, instruction in enumerate(instructions, first_slot):
            policy.reset(instruction, slot)
        return list(policy.act_batch(dict(enumerate(observations, first_slot))).values())

    def read(
        self, observation: Observation | None = None, config: PipelineConfig = DENSE, backbone: Backbone | None = None
    ) -> list[Tensor]:
        """Every hidden state that the first query of an episode reads, and its normalised actions."""
        with spied() as seen:
            (chunk,) = self.ask(config, None if observation is None else [observation], backbone=backbone)
        return [*seen.hidden, normalised(chunk)]


def backbone_subject(
    name: str, registry: Registry, preset: str | None = None, options: Mapping[str, Any] | None = None
) -> BackboneSubject:
    """A backbone by name; nothing is built yet.

    Raises:
        PluginError: If there is no such backbone.
        ConfigError: If it has no preset to check.
    """
    spec = registry.backbone(name).spec
    chosen = preset or (PRESET if PRESET in spec.presets else spec.default_preset)
    if chosen is None:
        raise ConfigError(f"backbone '{name}' has no preset, and checks build one; name one in its BackboneSpec")
    return BackboneSubject(name, registry, chosen, dict(options or {}))
