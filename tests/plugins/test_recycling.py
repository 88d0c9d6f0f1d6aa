"""SparseVLM's recycling against density peaks written out with NumPy, and in a query."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.naive_oft import attention_map, entering
from tests.helpers.naive_sparsevlm import chosen_by_the_paper, scored_by_the_paper
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.policy import Policy
from tokenprune_plugins.shared.recycling import recycle, recycling_counts
from tokenprune_plugins.sparsevlm import SparseVLMConfig


def clusters_by_the_paper(tokens: np.ndarray, count: int) -> dict[int, list[int]]:
    """Members by centre, of tokens `[F, D]`."""
    n = len(tokens)
    distance = np.array([[np.linalg.norm(a - b) for b in tokens] for a in tokens]) / np.sqrt(tokens.shape[1])
    density = [np.exp(-np.mean(np.sort(row)[:5] ** 2)) for row in distance]
    order = sorted(range(n), key=lambda i: (-density[i], i))
    apart = []
    for i in range(n):
        denser = order[: order.index(i)]
        apart.append(min([distance[i, j] for j in denser], default=distance.max()))
    centres = sorted(range(n), key=lambda i: (-density[i] * apart[i], i))[:count]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in range(n):
        nearest = i if i in members else min(centres, key=lambda c: (distance[i, c], centres.index(c)))
        members[nearest].append(i)
    return members


def recycled_by_the_paper(score: np.ndarray, tokens: np.ndarray, keep: int) -> dict[int, list[int]]:
    """What stays, each with those it is the mean of."""
    leaving = len(score) - keep
    folded = min(int(0.3 * leaving) + 1, leaving)
    count = min(folded // 10 + 1, folded, keep)
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    groups = {i: [i] for i in order[: keep - count]}
    among = order[keep - count : keep - count + folded]
    for centre, members in clusters_by_the_paper(tokens[among], count).items():
        groups[among[centre]] = [among[i] for i in members]
    return groups


@given(st.integers(0, 10_000), st.integers(2, 60), st.data())
def test_the_best_of_what_leaves_is_clustered(seed: int, n: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, n - 1))
    draw = np.random.default_rng(seed)
    score, tokens = draw.integers(0, 9, n).astype(float), draw.normal(size=(n, 7))
    folded, count = recycling_counts(n - keep)
    count = min(count, keep)
    found = recycle(torch.from_numpy(score)[None], torch.from_numpy(tokens)[None], keep - count, folded, count)
    worth, destination, takes_part = (values[0].numpy() for values in found)
    kept = sorted(range(n), key=lambda i: (-worth[i], i))[:keep]
    expected = recycled_by_the_paper(score, tokens, keep)
    assert sorted(kept) == sorted(expected)
    for stays in kept:
        assert sorted(i for i in range(n) if destination[i] == stays and takes_part[i]) == sorted(expected[stays])


def test_in_a_query_a_cluster_stays_as_its_mean() -> None:
    backbone = tiny_policy_parts(tiny_config())
    layout, layers = backbone.layout(INSTRUCTION), backbone.decoder.layers
    config = SparseVLMConfig(use="sparsevlm", after=(1,), keep=11, recycle=True)
    with entering(layers[0]) as embeddings, entering(layers[1]) as inputs, entering(layers[2]) as after:
        policy = Policy(backbone, pipeline(config), REGISTRY)
        policy.reset(INSTRUCTION)
        kept = policy.act(observation(backbone.config)).trace.kept[1][0].tolist()
    with entering(layers[2]) as before:
        policy = Policy(backbone, pipeline(), REGISTRY)
        policy.reset(INSTRUCTION)
        policy.act(observation(backbone.config))
    patches, text = list(layout.prunable), list(layout.span("text"))
    rows = chosen_by_the_paper(embeddings[0][patches].numpy(), embeddings[0][text].numpy())
    score = scored_by_the_paper(attention_map(backbone, 1, inputs[0])[:, text][:, :, patches].numpy(), rows, None)
    groups = recycled_by_the_paper(score, before[0][patches].numpy(), 11)
    assert kept == sorted(patches[i] for i in groups)
    held = sorted({*layout.fixed, *kept})
    expected = np.stack([before[0][[patches[j] for j in groups[i]]].mean(0).numpy() for i in sorted(groups)])
    np.testing.assert_allclose(after[0][[held.index(patches[i]) for i in sorted(groups)]], expected, atol=1e-9)
    assert max(len(members) for members in groups.values()) > 1
