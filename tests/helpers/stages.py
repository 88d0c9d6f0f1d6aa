"""Stages that only tests use."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.helpers.registries import with_stages
from tokenprune.model.info import BackboneInfo
from tokenprune.registry.discovery import Registry
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.stages.config import CutConfig, Keep
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import LayerContext, SelectContext
from tokenprune.tokens.plan import Removal
from tokenprune.tokens.proposal import Proposal


class TestConfig(CutConfig):
    """Half of the tokens."""

    __test__ = False
    keep: Keep = 0.5


class Memory(Stage[TestConfig]):
    """Scores by everything a stage may remember, so that a leak between episodes or slots changes the selection."""

    Config = TestConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        values, seen = ctx.recall("memory")
        score = ctx.patches.float().mean(-1) + values + seen.float()
        for view in ctx.images:
            pixels, had = ctx.previous_images(view)
            score = score + (pixels.float().mean((1, 2, 3)) * had)[:, None] * torch.sin(ctx.prunable.float())
        ctx.remember("memory", torch.sin(37 * score))
        return Proposal(score=score)


class Protector(Stage[TestConfig]):
    """Protects every third original id and drops every fifth."""

    Config = TestConfig

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        return Proposal(protect=ctx.prunable % 3 == 0, drop=ctx.prunable % 5 == 0)


class Broken(Stage[TestConfig]):
    """Raises."""

    Config = TestConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        raise ZeroDivisionError("no scores today")


class NaN(Stage[TestConfig]):
    """Scores one token NaN."""

    Config = TestConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        score = torch.zeros(ctx.prunable.shape)
        score[:, 0] = torch.nan
        return Proposal(score=score)


class WrongShape(Stage[TestConfig]):
    """Returns one score too many."""

    Config = TestConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        return Proposal(score=torch.zeros(ctx.prunable.shape[0], ctx.prunable.shape[1] + 1))


class WrongType(Stage[TestConfig]):
    """Returns kept tokens instead of a proposal."""

    Config = TestConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> object:
        return ctx.patches


class Silent(Stage[TestConfig]):
    """Abstains although its cut must drop tokens."""

    Config = TestConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> None:
        return None


class Careless(Stage[TestConfig]):
    """Protects nothing, and asks for what leaves to be reused."""

    Config = TestConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        return replace(super().requirements(info), removal=Removal.REUSE)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        return Proposal(protect=torch.zeros_like(ctx.prunable, dtype=torch.bool))


def registry() -> Registry:
    """Everything installed, and the stages above under `test.` and their lower-case name."""
    own = (Memory, Protector, Broken, NaN, WrongShape, WrongType, Silent, Careless)
    return with_stages(Registry.discover(), own)
