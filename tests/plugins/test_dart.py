"""DART against its rule written out with NumPy, ties included, and in a query."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.naive_oft import entering, naive_rms, naive_rope
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.policy import Policy
from tokenprune_plugins.dart import DARTConfig, largest, pivot_scores


def chosen_by_the_paper(patches: np.ndarray, pivots: list[int], words: np.ndarray, keep: int) -> set[int]:
    """Pivots, then for each in turn its share of the remaining patches that are least like it."""
    unit = patches / np.linalg.norm(patches, axis=1, keepdims=True)
    looking = [unit[i] for i in pivots] + [word / np.linalg.norm(word) for word in words]
    chosen = list(pivots)
    share, extra = divmod(keep - len(pivots), len(looking))
    for number, pivot in enumerate(looking):
        left = [i for i in range(len(unit)) if i not in chosen]
        left.sort(key=lambda i: (unit[i] @ pivot, i))
        chosen += left[: share + (1 if number < extra else 0)]
    return set(chosen)


@given(st.data())
def test_the_choice_is_the_papers_ties_included(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 30))
    keep = data.draw(st.integers(1, n))
    draw = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    batch = data.draw(st.integers(1, 3))
    # Signs in 16 dimensions have cosines that no rounding touches, and many of them are equal.
    patches = draw.choice([-1.0, 1.0], size=(batch, n, 16))
    words = draw.choice([-1.0, 1.0], size=(batch, data.draw(st.integers(0, 4)), 16))
    length = draw.integers(0, 5, size=(batch, n)).astype(float)
    pivots = largest(torch.from_numpy(length), min(4, keep))
    score = pivot_scores(torch.from_numpy(patches), pivots, torch.from_numpy(words), keep)
    for row in range(batch):
        first = sorted(range(n), key=lambda i: (-length[row, i], i))[: min(4, keep)]
        assert pivots[row].tolist() == first
        kept = sorted(range(n), key=lambda i: (-float(score[row, i]), i))[:keep]
        assert set(kept) == chosen_by_the_paper(patches[row], first, words[row], keep)


def test_in_a_query_it_measures_rotated_keys_and_compares_behind_the_last_norm() -> None:
    backbone = tiny_policy_parts(tiny_config())
    layout, layers, shape = backbone.layout(INSTRUCTION), backbone.decoder.layers, backbone.config.body.decoder
    with entering(layers[1]) as inputs:
        policy = Policy(backbone, pipeline(DARTConfig(use="dart", keep=13, pivot_text=2)), REGISTRY)
        policy.reset(INSTRUCTION)
        kept = policy.act(observation(backbone.config)).trace.kept[1][0].tolist()
    with entering(layers[2]) as outputs:
        policy = Policy(backbone, pipeline(), REGISTRY)
        policy.reset(INSTRUCTION)
        policy.act(observation(backbone.config))
    weights, name = backbone.model.state_dict(), "language_model.model.layers.1"
    normed = naive_rms(inputs[0], weights[f"{name}.input_layernorm.weight"], 1e-6)
    keys = normed @ weights[f"{name}.self_attn.k_proj.weight"].T
    turned = [naive_rope(keys[:, h * shape.head_dim :][:, : shape.head_dim]) for h in range(shape.kv_heads)]
    length = torch.cat(turned, 1).abs().sum(1).numpy()
    hidden = naive_rms(outputs[0], weights["language_model.model.norm.weight"], 1e-6).numpy()
    patches, text = list(layout.prunable), list(layout.span("text"))
    pivots = sorted(range(len(patches)), key=lambda i: -length[patches[i]])[:4]
    words = hidden[sorted(text, key=lambda i: -length[i])[:2]]
    chosen = chosen_by_the_paper(hidden[patches], pivots, words, 13)
    assert kept == sorted(patches[i] for i in chosen)
