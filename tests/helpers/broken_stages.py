"""Stages that each break one promise, and the check that must notice."""

from __future__ import annotations

import random as chance
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from tests.helpers.registries import with_stages
from tokenprune.registry.discovery import Registry
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.stages.config import CutConfig, Cuts, Keep
from tokenprune.stages.feature_context import FeatureContext
from tokenprune.stages.stage import Probe, Stage
from tokenprune.stages.token_context import LayerContext, SelectContext
from tokenprune.tokens.proposal import Proposal


class BrokenConfig(CutConfig):
    """Half of the tokens."""

    keep: Keep = 0.5


class Sound(Stage[Any]):
    """Breaks nothing; the others differ from it in one thing."""

    Config = BrokenConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        return Proposal(score=self.score(ctx))

    def score(self, ctx: SelectContext) -> Tensor:
        return ctx.patches.float().mean(-1)


class RaisesLater(Sound):
    """Works in an episode's first query only."""

    BREAKS = "runs", "failed in select_tokens"

    def score(self, ctx: SelectContext) -> Tensor:
        if ctx.slots[0].queries:
            raise RuntimeError("no more")
        return super().score(ctx)


class OneInstruction(Sound):
    """Takes a prompt's length for granted."""

    BREAKS = "runs", "failed in select_tokens"

    def score(self, ctx: SelectContext) -> Tensor:
        if ctx.layout.n_tokens % 2:
            raise RuntimeError("odd")
        return super().score(ctx)


class CountsQueries(Sound):
    """Does something else in every other query, by a number that it reads on the host."""

    BREAKS = "a_replay_is_the_query", "belongs in `host_state`"

    def score(self, ctx: SelectContext) -> Tensor:
        return super().score(ctx) * (-1) ** ctx.slots[0].queries


class GoesInCircles(Sound):
    """Puts what it saw into a list that is part of itself."""

    BREAKS = "nothing_waits_for_the_garbage_collector", "hang on cycles"

    def score(self, ctx: SelectContext) -> Tensor:
        circle: list[Any] = [ctx.hidden]
        circle.append(circle)
        return super().score(ctx)


class ScoresNaN(Sound):
    """Divides by what may be nothing."""

    BREAKS = "runs", "gave a NaN score"

    def score(self, ctx: SelectContext) -> Tensor:
        score = super().score(ctx)
        return score * 0 / (ctx.prunable != ctx.prunable[:, :1])


class Rescales(Sound):
    """Changes features although nothing is to be left out."""

    BREAKS = "keeping_everything_is_dense", "query 0 differs from dense"

    @hookimpl
    def transform_features(self, ctx: FeatureContext) -> Tensor:
        return ctx.features * 1.001


class Chances(Sound):
    """Draws from the process's own random numbers."""

    BREAKS = "same_seed_same_selection", "kept other tokens the second time"

    def score(self, ctx: SelectContext) -> Tensor:
        return super().score(ctx) + torch.stack([torch.full_like(ctx.prunable[0], 0.0, dtype=torch.float32).add_(
            torch.tensor([chance.random() for _ in row])) for row in ctx.prunable])  # fmt: skip


class LooksAside(Sound):
    """Ranks tokens against the mean of the batch."""

    BREAKS = "batch_rows_are_independent", "kept other tokens beside two other environments"

    def score(self, ctx: SelectContext) -> Tensor:
        score = super().score(ctx)
        return (score - score.mean(0)).abs() if len(score) > 1 else score


class Remembers(Sound):
    """Keeps what it saw in an attribute, which no reset clears."""

    BREAKS = "reset_forgets", "depends on the episode before it"
    last: Tensor | None = None

    def score(self, ctx: SelectContext) -> Tensor:
        score = super().score(ctx)
        if self.last is None or self.last.shape != score.shape:
            self.last = torch.zeros_like(score)
        self.last = 0.5 * self.last + score
        return self.last


class TurnsWeights(Sound):
    """Writes to the model."""

    BREAKS = "the_model_stays_as_it_was", "has changed"

    def score(self, ctx: SelectContext) -> Tensor:
        ctx.decoder.norm.weight.mul_(1.01)
        return super().score(ctx)


class LeavesAHook(Sound):
    """Leaves a hook on the model."""

    BREAKS = "the_model_stays_as_it_was", "a hook is left on"

    def score(self, ctx: SelectContext) -> Tensor:
        self.handle = ctx.decoder.layers[0].register_forward_hook(lambda *_: None)
        return super().score(ctx)


class WritesToWhatItSees(Sound):
    """Centres the embeddings in place."""

    BREAKS = "what_it_is_shown_stays_as_it_was", "select_tokens wrote to ctx.hidden"

    def score(self, ctx: SelectContext) -> Tensor:
        ctx.hidden.sub_(ctx.hidden.mean())
        return super().score(ctx)


class NeedsFloat64(Sound):
    """Uses what has no half-precision kernel."""

    BREAKS = "it_works_in_bfloat16", "failed in select_tokens"

    def score(self, ctx: SelectContext) -> Tensor:
        return torch.linalg.qr(ctx.patches)[0][..., 0].float()


class Waits(Sound):
    """Reads a number back."""

    BREAKS = "no_query_waits", "waits for the device"

    def score(self, ctx: SelectContext) -> Tensor:
        score = super().score(ctx)
        return score / max(float(score.abs().max()), 1e-9)


class LooksInSecret(Sound):
    """Computes attention that `probes` does not tell of."""

    BREAKS = "probes_are_declared", "computed and not declared: [(1, 'text', False)]"

    class Config(BrokenConfig):  # type: ignore[misc]
        """After layer 1."""

        after: Cuts = (1,)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        return Proposal(score=ctx.attention_rows("text").mean((1, 2)))


class Boasts(Sound):
    """Declares attention that it does not compute."""

    BREAKS = "probes_are_declared", "declared and not computed: [(0, 'text', False)]"

    def probes(self, *_: object) -> tuple[Probe, ...]:
        return (Probe(0, "text"),)


class DeepOnly(Sound):
    """Cuts where only a deep decoder has a layer."""

    BREAKS = "it_fits_every_depth", "with 6 layers"

    class Config(BrokenConfig):  # type: ignore[misc]
        """After layer 5, which an 8-layer decoder has."""

        after: Cuts = (1, 5)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        return Proposal(score=self.score(ctx))


class TakesAnything(Sound):
    """Swallows misspelt keys."""

    BREAKS = "unknown_keys_are_refused", "accepts the key"

    class Config(BrokenConfig):  # type: ignore[misc]
        """Allows extra keys."""

        model_config = ConfigDict(extra="allow")


class Silent(Sound):
    """Does not say what a key means."""

    BREAKS = "every_key_is_explained", "no description: sharpness"

    class Config(BrokenConfig):  # type: ignore[misc]
        """One key that is explained and one that is not."""

        alpha: float = Field(default=1.0, description="Explained.")
        sharpness: float = 1.0


def broken() -> list[type[Sound]]:
    """Every class above but the sound one."""
    return Sound.__subclasses__()


def registry() -> Registry:
    """Everything installed, the stages above, and the sound one."""
    return with_stages(Registry.discover(), (Sound, *broken()), "broken", "selector")
