"""Pruned pi0 and pi0.5 against the specification with the same tokens masked, and what stages see of the flow."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import tiny_episodes
from tests.helpers.naive_pi0 import Spec, naive
from tests.helpers.planting import pipeline
from tests.helpers.registries import with_stages
from tests.helpers.tiny_pi0 import (
    INSTRUCTION,
    VARIANTS,
    VIEWS,
    act,
    noise_for,
    observation,
    query,
    tiny_backbone,
    tiny_config,
)
from tokenprune.model.info import BackboneInfo
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.stages.config import CutConfig
from tokenprune.stages.memory import ExecutedAction
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.query_record import QueryRecord
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import LayerContext, SelectContext
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.proposal import Proposal
from tokenprune_adapters.backbones.pi0.backbone import PI0
from tokenprune_adapters.backbones.pi0.config import Variant

DEPTH = 4


class ChosenConfig(CutConfig):
    ids: tuple[int, ...]


class Chosen(Stage[ChosenConfig]):
    """Keeps the tokens it is told."""

    Config = ChosenConfig

    def _propose(self, ctx: SelectContext) -> Proposal:
        return Proposal(score=torch.isin(ctx.prunable, torch.tensor(self.config.ids)).double())

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        return self._propose(ctx)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        return self._propose(ctx)


class Watching(Chosen):
    """Looks at every layer's attention of the actions."""

    records: list[QueryRecord] = []  # noqa: RUF012 - read by a test

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        return replace(super().requirements(info), action_attention=tuple(range(info.decoder.depth)))

    @hookimpl
    def observe(self, record: QueryRecord | ExecutedAction) -> None:
        if isinstance(record, QueryRecord):
            self.records.append(record)


@cache
def registry() -> Registry:
    return with_stages(tiny_episodes.registry(), (Chosen, Watching), "test", "selector")


@cache
def backbone(variant: Variant, views: int = 2, steps: int = 1, seed: int = 0) -> PI0:
    return tiny_backbone(tiny_config(variant, VIEWS[:views], depth=DEPTH, steps=steps), seed)


def layer(after: int) -> int | str:
    return "embedding" if after < 0 else after


def chosen(cuts: dict[int, set[int]], use: str = "test.chosen") -> PipelineConfig:
    """Cuts that leave these prunable tokens, by the layer they follow."""
    return pipeline(
        *(
            ChosenConfig(use=use, after=(layer(after),), keep=len(ids), ids=tuple(sorted(ids)))
            for after, ids in sorted(cuts.items())
        )
    )


def staying(cuts: dict[int, set[int]], layout: TokenLayout) -> dict[int, set[int]]:
    return {after: ids | set(layout.fixed) for after, ids in cuts.items()}


@st.composite
def nested_cuts(draw: st.DrawFn, tokens: int) -> dict[int, set[int]]:
    """Up to three cuts at any layers, each among what the one before it left."""
    left, cuts = list(range(tokens)), {}
    for after in sorted(draw(st.sets(st.integers(-1, DEPTH - 2), min_size=1, max_size=3))):
        left = sorted(draw(st.permutations(left))[: draw(st.integers(1, len(left)))])
        cuts[after] = set(left)
    return cuts


@settings(max_examples=20)
@given(st.data(), st.sampled_from(VARIANTS), st.integers(1, 3), st.integers(0, 9))
def test_any_cuts_equal_the_masked_specification(data: st.DataObject, variant: Variant, views: int, seed: int) -> None:
    made = backbone(variant, views, seed=seed)
    cuts, obs = data.draw(nested_cuts(16 * views)), observation(made.config, seed)
    noise, layout = noise_for(made.config, seed), made.layout(INSTRUCTION, obs["state"])
    expected = naive(made, obs, INSTRUCTION, noise, kept=staying(cuts, layout)).actions[:, :7]
    found = query(made, obs, noise, chosen(cuts), registry())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


CUTS = {-1: set(range(4, 32)), 0: set(range(8, 28)), 2: {9, 10, 20, 26}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trap", [Spec(suffix_begins="kept"), Spec(suffix_begins="padded"), Spec(nested=False)])
def test_each_trap_is_caught(variant: Variant, trap: Spec) -> None:
    made = backbone(variant)
    obs, noise = observation(made.config), noise_for(made.config)
    kept = staying(CUTS, made.layout(INSTRUCTION, obs["state"]))
    found = query(made, obs, noise, chosen(CUTS), registry())
    sprung = naive(made, obs, INSTRUCTION, noise, trap, kept).actions[:, :7]
    assert (found - sprung).abs().max() > 1e-3, "the comparison would not notice this mistake"
    straight = naive(made, obs, INSTRUCTION, noise, kept=kept).actions[:, :7]
    torch.testing.assert_close(found, straight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_specprune_over_an_episode(variant: Variant) -> None:
    made = tiny_backbone(tiny_config(variant, depth=tiny_episodes.DEPTH, steps=1))
    policy = Policy(made, tiny_episodes.shrunk("specprune"), registry())
    policy.reset(INSTRUCTION)
    lengths, modes, remembered = set(), set(), 0
    for number, moves in enumerate(("slow", "slow", "fast", "middling")):
        obs = {**tiny_episodes.sight(VIEWS[:2], 0, 8 * number), "state": np.linspace(-1, 1, 8) * number / 3}
        noise, layout = noise_for(made.config, number), made.layout(INSTRUCTION, obs["state"])
        chunk = act(policy, {0: obs}, noise)[0]
        cuts = {after: set(ids) for after, ids in tiny_episodes.kept(chunk).items()}
        expected = naive(made, obs, INSTRUCTION, noise, kept=staying(cuts, layout)).actions[:, :7]
        torch.testing.assert_close(torch.from_numpy(chunk.normalised), expected, rtol=0, atol=1e-10)
        lengths.add(layout.n_tokens)
        modes.add(chunk.trace.mode)
        remembered += tiny_episodes.wanted(chunk, "previous") > 0
        for step in range(8):
            seen = tiny_episodes.sight(VIEWS[:2], 0, 8 * number + step + 1)
            policy.executed(tiny_episodes.MOVES[moves], observation=seen)
    assert modes == {"coarse", "fine"}
    assert remembered == 3
    assert (len(lengths) > 1) == (variant == "pi05")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [1, 4])
def test_watched_attention_is_that_of_the_actions_over_all_steps(variant: Variant, steps: int) -> None:
    made = backbone(variant, steps=steps)
    obs, noise = observation(made.config), noise_for(made.config)
    cuts = {0: set(range(3, 30)), 1: {5, 6, 7, 20, 21, 29}}
    Watching.records.clear()
    query(made, obs, noise, chosen(cuts, "test.watching"), registry())
    expected = naive(made, obs, INSTRUCTION, noise, kept=staying(cuts, made.layout(INSTRUCTION, obs["state"])))
    # Each of the two stages observes the query.
    for record in Watching.records:
        assert sorted(record.attention) == list(range(DEPTH))
        for index, seen in record.attention.items():
            held = sorted({0: set(range(32)), 1: cuts[0]}.get(index, cuts[1]))
            assert seen.prunable.tolist() == [held]
            torch.testing.assert_close(seen.weights[0], expected.attention[index][:, :, held], rtol=0, atol=1e-10)
