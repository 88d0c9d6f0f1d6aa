"""Pruned pi0 and pi0.5 against the specification with the same tokens masked, and what stages see of the flow."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import tiny_episodes
from tests.helpers.naive_pi0 import Spec, naive
from tests.helpers.planting import pipeline
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
from tokenprune.model.flops import query_flops
from tokenprune.model.info import BackboneInfo
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Owner, Registered, Registry
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.registry.specs import StageSpec
from tokenprune.stages.config import CutConfig, StageConfig
from tokenprune.stages.feature_context import FeatureContext
from tokenprune.stages.memory import ExecutedAction
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.query_record import QueryRecord
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import LayerContext, SelectContext
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.proposal import Proposal
from tokenprune_adapters.backbones.pi0.backbone import PI0
from tokenprune_adapters.backbones.pi0.config import Variant
from tokenprune_plugins.fastv import FastVConfig
from tokenprune_plugins.shared.bases import HalfConfig

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


class Blind(Stage[StageConfig]):
    """Blanks what one view sees."""

    @hookimpl
    def transform_features(self, ctx: FeatureContext) -> torch.Tensor | None:
        return ctx.features * 0 if ctx.view == "wrist" else None


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
    found = tiny_episodes.registry()
    for stage in (Chosen, Blind, Watching):
        name = f"test.{stage.__name__.lower()}"
        spec = StageSpec(name, "selector", "for tests", f"{__name__}:{stage.__name__}")
        found.stages[name] = Registered(spec, Owner("tests", "0", __name__))
    return found


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
def test_keeping_everything_is_dense_to_the_bit(variant: Variant) -> None:
    made = backbone(variant)
    obs, noise = observation(made.config), noise_for(made.config)
    everything = [
        pipeline(FastVConfig(use="fastv", after=(1,), keep=1.0)),
        pipeline(HalfConfig(use="random", after=("embedding", 1), keep=1.0)),
        chosen({-1: set(range(32)), 1: set(range(32))}),
    ]
    dense = query(made, obs, noise)
    for config in everything:
        assert torch.equal(query(made, obs, noise, config, registry()), dense)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_are_pruned_independently(variant: Variant) -> None:
    made = backbone(variant)
    config = pipeline(
        HalfConfig(use="random", after=("embedding",), keep=20), FastVConfig(use="fastv", after=(1,), keep=6)
    )
    observations = {slot: observation(made.config, slot) for slot in (0, 1, 4)}
    for obs in observations.values():
        # The same prompt, so that they share a pass; what they see differs.
        obs["state"] = observations[0]["state"]
    together, alone = Policy(made, config, registry()), Policy(made, config, registry())
    for slot in observations:
        together.reset(INSTRUCTION, slot)
        alone.reset(INSTRUCTION, slot)
    chunks = together.act_batch(observations)
    assert len({id(chunk.trace) for chunk in chunks.values()}) == 1
    kept = chunks[0].trace.kept[1].tolist()
    assert kept[0] != kept[1]
    for slot, obs in observations.items():
        np.testing.assert_allclose(chunks[slot].normalised, alone.act(obs, slot).normalised, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_of_one_view_can_be_changed(variant: Variant) -> None:
    made = backbone(variant)
    config, noise = pipeline(StageConfig(use="test.blind")), noise_for(made.config)
    one, other = observation(made.config, 1), observation(made.config, 2)
    other["state"] = one["state"]
    seen = {view: {**one, "images": {**one["images"], view: other["images"][view]}} for view in VIEWS[:2]}
    actions = query(made, one, noise, config, registry())
    assert torch.equal(query(made, seen["wrist"], noise, config, registry()), actions)
    assert not torch.equal(query(made, seen["primary"], noise, config, registry()), actions)


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_are_computed(variant: Variant) -> None:
    made = backbone(variant)
    policy = Policy(made, chosen(CUTS), registry())
    policy.reset(INSTRUCTION)
    obs: dict[str, Any] = observation(made.config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trace = policy.act(obs).trace
    assert query_flops(made.info, trace.plan).total == counter.get_total_flops()
    text = len(made.prompt(INSTRUCTION, obs["state"]).ids)
    assert trace.held == trace.cached == tuple(visual + text for visual in (28, 20, 20, 4))
