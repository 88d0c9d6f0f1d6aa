"""EfficientVLA's token half against its rule written out with NumPy, ties included."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.naive_oft import attention_map, entering
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.policy import Policy
from tokenprune_plugins.efficientvla import EfficientVLATokensConfig, tiered_scores


def chosen_by_the_paper(relevance: np.ndarray, features: np.ndarray, keep: int, key: int, alpha: float) -> set[int]:
    """Key patches, relevant ones, and those whose largest cosine with a key patch is smallest."""
    by_relevance = sorted(range(len(relevance)), key=lambda i: (-relevance[i], i))
    keys = by_relevance[: min(key, keep)]
    chosen = by_relevance[: len(keys) + round(alpha * (keep - len(keys)))]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    left = by_relevance[len(chosen) :]
    left.sort(key=lambda i: (max(unit[i] @ unit[k] for k in keys), i))
    return {*chosen, *left[: keep - len(chosen)]}


@given(st.data())
def test_the_choice_is_the_papers_ties_included(data: st.DataObject) -> None:
    patches = data.draw(st.integers(1, 24))
    keep = data.draw(st.integers(1, patches))
    key, alpha = data.draw(st.integers(1, 8)), data.draw(st.floats(0, 1))
    draw = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    relevance = draw.integers(0, 5, patches).astype(float)
    # Signs in 16 dimensions have cosines that no rounding touches, and many of them are equal.
    features = draw.choice([-1.0, 1.0], size=(patches, 16))
    first = min(key, keep)
    rows = torch.from_numpy(relevance)[None], torch.from_numpy(features)[None]
    score = tiered_scores(*rows, first, round(alpha * (keep - first)))
    kept = sorted(range(patches), key=lambda i: (-float(score[0, i]), i))[:keep]
    assert set(kept) == chosen_by_the_paper(relevance, features, keep, key, alpha)


def test_in_a_query_it_reads_the_texts_rows_and_the_layers_output() -> None:
    backbone = tiny_policy_parts(tiny_config())
    layout, layers = backbone.layout(INSTRUCTION), backbone.decoder.layers
    config = EfficientVLATokensConfig(use="efficientvla_tokens", after=(1,), keep=14, key=4)
    with entering(layers[1]) as inputs:
        policy = Policy(backbone, pipeline(config), REGISTRY)
        policy.reset(INSTRUCTION)
        kept = policy.act(observation(backbone.config)).trace.kept[1][0].tolist()
    with entering(layers[2]) as outputs:
        policy = Policy(backbone, pipeline(), REGISTRY)
        policy.reset(INSTRUCTION)
        policy.act(observation(backbone.config))
    relevance = attention_map(backbone, 1, inputs[0]).mean(0)[list(layout.span("text"))].sum(0)
    patches = list(layout.prunable)
    chosen = chosen_by_the_paper(relevance[patches].numpy(), outputs[0][patches].numpy(), 14, 4, 0.5)
    assert kept == sorted(patches[i] for i in chosen)
