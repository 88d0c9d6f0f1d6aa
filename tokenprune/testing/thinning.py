"""A pipeline that drops tokens at two cuts by what they hold, so that every batch row drops others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune._version import __version__
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.registry.discovery import Registry
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.registry.plugin_checks import Owner
from tokenprune.registry.specs import StageSpec
from tokenprune.stages.config import CutConfig, Keep
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import LayerContext, SelectContext
from tokenprune.tokens.proposal import Proposal

NAME = "thinning"


class ThinningConfig(CutConfig):
    """Half of the tokens, unless the pipeline says otherwise."""

    keep: Keep = 0.5


class Thinning(Stage[Any]):
    """Keeps tokens by an arbitrary number that their embedding gives, the same whatever else is in the batch."""

    Config = ThinningConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Before layer 0."""
        return Proposal(score=_score(ctx.patches))

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Between layers."""
        return Proposal(score=_score(ctx.patches))


def thinning(depth: int, keep: tuple[float, float] = (0.75, 0.4)) -> PipelineConfig:
    """Shares of the tokens to keep before layer 0, and halfway through a decoder of `depth` layers."""
    stage = ThinningConfig(use=NAME, after=("embedding", max(depth // 2 - 1, 0)), keep=keep)
    return PipelineConfig(version=1, name=NAME, stages=(stage,))


def registry() -> Registry:
    """The stage above, and nothing else."""
    spec = StageSpec(NAME, "selector", "drops tokens for checks", f"{__name__}:{Thinning.__name__}")
    return Registry().with_specs(spec, owner=Owner("tokenprune", __version__, __name__))


def _score(patches: Tensor) -> Tensor:
    weights = torch.arange(1, patches.shape[2] + 1, device=patches.device, dtype=torch.float32).sin()
    return patches.float() @ weights
