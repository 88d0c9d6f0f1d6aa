"""VLA-Pruner against its rule written out with NumPy, over the queries of an episode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.attention_map import full_map
from tests.helpers.drawing import random
from tests.helpers.naive_divprune import chosen_by_the_paper as diverse
from tests.helpers.naive_oft import attention_map, entering
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.model.attention import received
from tokenprune.policy import Policy
from tokenprune.tokens.selection import CurrentIds
from tokenprune_plugins.divprune import farthest_first
from tokenprune_plugins.vla_pruner import VLAPrunerConfig


def best(score: np.ndarray, count: int) -> list[int]:
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:count]


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([1, 2]), st.booleans(), st.integers(1, 9))
def test_received_attention_is_the_maps_mean(seed: int, n: int, share: int, causal: bool, block: int) -> None:
    q, k = random(seed, 2, 2 * share, n, 4), random(seed + 1, 2, 2, n, 4)
    expected = full_map(q, k, causal).mean((1, 2))
    rows = CurrentIds(torch.arange(n).expand(2, n)) if causal else None
    torch.testing.assert_close(received(q, k, rows, block), expected, rtol=0, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 30), st.data())
def test_diversity_is_sought_among_members_only(seed: int, n: int, data: st.DataObject) -> None:
    draw = np.random.default_rng(seed)
    embeddings = draw.normal(size=(n, 8))
    member = draw.random(n) < 0.6
    member[draw.integers(n)] = True
    count = data.draw(st.integers(1, int(member.sum())))
    score = farthest_first(torch.from_numpy(embeddings)[None], count, torch.from_numpy(member)[None])[0]
    inside = np.flatnonzero(member)
    expected = [int(inside[i]) for i in diverse(embeddings[inside], count)]
    assert score.topk(count).indices.tolist() == expected
    assert score[~torch.from_numpy(member)].lt(score[torch.from_numpy(member)].min()).all()


@pytest.mark.parametrize("newest_first", [True, False])
def test_it_prunes_from_the_fourth_query_by_prefix_and_past_actions(newest_first: bool) -> None:
    backbone = tiny_policy_parts(tiny_config(depth=4))
    layout, layers = backbone.layout(INSTRUCTION), backbone.decoder.layers
    config = VLAPrunerConfig(
        use="vla_pruner", after=(1,), keep={"full": 1.0, "pruned": 10}, action_layers=(2, 3), newest_first=newest_first
    )
    policy = Policy(backbone, pipeline(config, modes=("full", "pruned")), REGISTRY)
    policy.reset(INSTRUCTION)
    seen = [observation(backbone.config, query) for query in range(4)]
    patches, rows = list(layout.prunable), list(layout.span("action"))
    acted = []
    for query in range(3):
        with entering(layers[2]) as second, entering(layers[3]) as third:
            trace = policy.act(seen[query]).trace
        assert trace.plan.mode == "full"
        maps = [attention_map(backbone, layer, inputs[0]) for layer, inputs in ((2, second), (3, third))]
        acted.append(sum(m[:, rows].mean((0, 1)) for m in maps)[patches].numpy())
    with entering(layers[0]) as embeddings, entering(layers[1]) as inputs:
        trace = policy.act(seen[3]).trace
    assert trace.plan.mode == "pruned"
    given_ = attention_map(backbone, 1, inputs[0]).mean((0, 1))[patches].numpy()
    weights = [0.8**age for age in ((2, 1, 0) if newest_first else (0, 1, 2))]
    past = sum(weight * one for weight, one in zip(weights, acted, strict=True))
    union = sorted({*best(given_, 10), *best(past, 10)})
    shown = embeddings[0][patches].numpy()[union]
    assert trace.kept[1][0].tolist() == sorted(patches[union[i]] for i in diverse(shown, 10))


def test_a_reset_empties_the_window() -> None:
    backbone = tiny_policy_parts(tiny_config(depth=4))
    config = VLAPrunerConfig(use="vla_pruner", keep={"full": 1.0, "pruned": 0.5}, window=1)
    policy = Policy(backbone, pipeline(config, modes=("full", "pruned")), REGISTRY)
    modes = []
    for _ in range(2):
        policy.reset(INSTRUCTION)
        modes += [policy.act(observation(backbone.config)).trace.plan.mode for _ in range(2)]
    assert modes == ["full", "pruned"] * 2
