"""A host whose frames are numbered, and a stage that notes which it is shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.helpers import stages
from tests.helpers.planting import pipeline
from tests.helpers.registries import with_stages
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.model.info import BackboneInfo
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.stages.config import CutConfig, Keep
from tokenprune.stages.control_context import ControlContext
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import SelectContext
from tokenprune.tokens.proposal import Proposal

BACKBONE = tiny_policy_parts(tiny_config())
VIEWS = BACKBONE.config.views


class LookConfig(CutConfig):
    keep: Keep = 0.5
    back: int | None = 1
    far: int = 11


class Look(Stage[LookConfig]):
    """Looks back as far as it is told, and notes the images of each query by view: current, past, which are there."""

    Config = LookConfig

    def __init__(self, config: LookConfig) -> None:
        super().__init__(config)
        self.noted: list[dict[str, tuple[torch.Tensor, ...]]] = []

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        return replace(super().requirements(info), look_back_frames=self.config.far)

    @hookimpl
    def look_back(self, ctx: ControlContext) -> int | None:
        return self.config.back

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        self.noted.append({view: (ctx.images[view], *ctx.past_images(view)) for view in ctx.layout.views})
        return Proposal(score=torch.zeros(ctx.prunable.shape))


class Forward(Look):
    """The same without a `look_back` of its own."""

    look_back = None


class Stumbling(Look):
    """Fails to say how far back."""

    @hookimpl
    def look_back(self, ctx: ControlContext) -> int | None:
        raise ZeroDivisionError("no motion today")


def _registry() -> Registry:
    return with_stages(stages.registry(), (Look, Forward, Stumbling), "test", "selector")


REGISTRY = _registry()


def started(*backs: int | None, slots: int = 1, **settings: Any) -> Policy:
    """A policy with a stage for each look-back."""
    looks = [LookConfig(use="test.look", back=back, **settings) for back in backs]
    policy = Policy(BACKBONE, pipeline(*looks), REGISTRY)
    for slot in range(slots):
        policy.reset(INSTRUCTION, slot)
    return policy


def sight(number: int) -> dict[str, Any]:
    return observation(BACKBONE.config, number)


def live(policy: Policy, last: int, told: set[int], asked: set[int], slot: int = 0) -> list[int | None]:
    """Control steps 0 to `last`; how far back each query looked."""
    backs = []
    for step in range(last + 1):
        if step:
            policy.executed(np.zeros(7), observation=sight(step) if step in told else None, slot=slot)
        if step in asked:
            (looked,) = policy.act(sight(step), slot).trace.looked_back.values()
            backs += looked
    return backs


def noted(policy: Policy, view: str, stage: int = 0) -> tuple[torch.Tensor, ...]:
    """What a stage saw in the last query."""
    found: tuple[torch.Tensor, ...] = policy.pipeline.stages[stage].noted[-1][view]
    return found


def cropped(number: int, view: str) -> torch.Tensor:
    return BACKBONE.config.transform.cropped(sight(number)["images"][view])
