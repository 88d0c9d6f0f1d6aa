"""Tokens merged into others: ToMe, VisionZip and pooling against their rules in NumPy, and what the runtime does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import tiny_oft
from tests.helpers.backbones import BACKBONES
from tests.helpers.naive_oft import entering, naive_rms, naive_rope
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.errors import ConfigError, StageError
from tokenprune.model.flops import query_flops
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune_plugins.baselines.pooling import PoolConfig
from tokenprune_plugins.shared.merging import merge_weights
from tokenprune_plugins.tome import ToMeConfig, bipartite_matching
from tokenprune_plugins.visionzip import VisionZipConfig, contextual_weights, dominant_and_contextual


def merged_by_the_paper(metric: np.ndarray, size: np.ndarray, keep: int) -> dict[int, list[int]]:
    """Groups by the token that stays, of tokens `[P, D]` dealt alternately; of equally alike pairs the later stays."""
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    first, second = range(0, len(unit), 2), range(1, len(unit), 2)
    best = {a: max(second, key=lambda b: (unit[a] @ unit[b], -b)) for a in first if second}
    alike = sorted(best, key=lambda a: (-(unit[a] @ unit[best[a]]), -a))
    groups = {i: [i] for i in range(len(unit))}
    for a in alike[: len(unit) - keep]:
        groups[best[a]].append(a)
        del groups[a]
    return groups


@given(st.data())
def test_tome_merges_the_papers_pairs_ties_included(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 24))
    keep = data.draw(st.integers((n + 1) // 2, n))
    draw = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    metric = draw.choice([-1.0, 1.0], size=(n, 16))
    size = draw.integers(1, 4, n).astype(float)
    best, partner = bipartite_matching(torch.from_numpy(metric)[None])
    kept = sorted(range(n), key=lambda i: (i % 2 == 0, float(best[0, i]), i))[:keep]
    groups = merged_by_the_paper(metric, size, keep)
    assert sorted(kept) == sorted(groups)
    destination = torch.tensor([[i if i in groups else int(partner[0, i]) for i in range(n)]])
    weights = merge_weights(destination, torch.from_numpy(size)[None], torch.tensor([sorted(groups)]))[0].numpy()
    for row, (stays, members) in zip(weights, sorted(groups.items()), strict=True):
        assert stays in members
        expected = np.zeros(n)
        expected[members] = size[members] / size[members].sum()
        np.testing.assert_allclose(row, expected, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 3))
def test_merged_tokens_conserve_mass(seed: int, n: int, batch: int) -> None:
    draw = np.random.default_rng(seed)
    kept = np.stack([np.sort(draw.choice(n, size=max(n // 2, 1), replace=False)) for _ in range(batch)])
    destination = np.stack([[i if i in row else draw.choice(row) for i in range(n)] for row in kept])
    size, tokens = draw.integers(1, 5, (batch, n)).astype(float), draw.normal(size=(batch, n, 3))
    weights = merge_weights(*(torch.from_numpy(values) for values in (destination, size, kept))).numpy()
    for row in range(batch):
        mass = np.array([size[row][destination[row] == stays].sum() for stays in kept[row]])
        np.testing.assert_allclose(mass @ (weights[row] @ tokens[row]), size[row] @ tokens[row], atol=1e-9)


def policy_of(backbone: Any, *stages: Any) -> Policy:
    policy = Policy(backbone, pipeline(*stages), REGISTRY)
    policy.reset(INSTRUCTION)
    return policy


def test_tome_in_a_query_merges_by_keys_and_counts_what_merged_before() -> None:
    backbone = tiny_policy_parts(tiny_config())
    layout, layers, shape = backbone.layout(INSTRUCTION), backbone.decoder.layers, backbone.config.body.decoder
    stage = ToMeConfig(use="tome", after=("embedding", 1), keep=0.5)
    dense = policy_of(backbone)
    with entering(layers[0]) as plain:
        dense.act(observation(backbone.config))
    with entering(layers[0]) as first, entering(layers[1]) as second, entering(layers[2]) as third:
        trace = policy_of(backbone, stage).act(observation(backbone.config)).trace
    patches, fixed = list(layout.prunable), set(layout.fixed)
    embeddings = plain[0][patches].numpy()
    groups = merged_by_the_paper(embeddings, np.ones(len(patches)), len(patches) // 2)
    stays = sorted(groups)
    ids = sorted({*fixed, *(patches[i] for i in stays)})
    rows = [ids.index(patches[i]) for i in stays]
    expected = np.stack([embeddings[groups[i]].mean(0) for i in stays])
    np.testing.assert_allclose(first[0][rows], expected, atol=1e-9)
    assert trace.kept[-1][0].tolist() == [patches[i] for i in stays]

    weights, name = backbone.model.state_dict(), "language_model.model.layers.1"
    normed = naive_rms(second[0], weights[f"{name}.input_layernorm.weight"], 1e-6)
    keys = normed @ weights[f"{name}.self_attn.k_proj.weight"].T
    # Turned at original positions: spread over the whole sequence, and picked again.
    spread = torch.zeros(layout.n_tokens, keys.shape[1], dtype=keys.dtype)
    spread[ids] = keys
    turned = [naive_rope(spread[:, h * shape.head_dim :][:, : shape.head_dim]) for h in range(shape.kv_heads)]
    metric = torch.stack(turned).mean(0)[[patches[i] for i in stays]].numpy()
    size = np.array([len(groups[i]) for i in stays], dtype=float)
    later = merged_by_the_paper(metric, size, len(stays) // 2)
    left = sorted(later)
    assert trace.kept[1][0].tolist() == [patches[stays[i]] for i in left]
    with entering(layers[2]) as unmerged:
        once = ToMeConfig(use="tome", after=("embedding",), keep=0.5)
        policy_of(backbone, once).act(observation(backbone.config))
    before = unmerged[0][rows].numpy()
    expected = np.stack([np.average(before[later[i]], axis=0, weights=size[later[i]]) for i in left])
    places = sorted({*fixed, *(patches[stays[i]] for i in left)})
    np.testing.assert_allclose(third[0][[places.index(patches[stays[i]]) for i in left]], expected, atol=1e-9)


def test_squares_of_patches_become_their_mean() -> None:
    backbone = tiny_policy_parts(tiny_config())
    layout, layers = backbone.layout(INSTRUCTION), backbone.decoder.layers
    with entering(layers[0]) as plain:
        policy_of(backbone).act(observation(backbone.config))
    with entering(layers[0]) as pooled:
        trace = policy_of(backbone, PoolConfig(use="pool2x2")).act(observation(backbone.config)).trace
    expected, kept = [], []
    for segment in layout.views.values():
        rows, cols = segment.grid
        patches = plain[0][segment.start : segment.start + segment.length].view(rows, cols, -1)
        for row in range(0, rows, 2):
            for col in range(0, cols, 2):
                expected.append(patches[row : row + 2, col : col + 2].mean((0, 1)))
                kept.append(segment.start + row * cols + col)
    assert trace.kept[-1][0].tolist() == kept
    held = sorted({*layout.fixed, *kept})
    torch.testing.assert_close(pooled[0][[held.index(i) for i in kept]], torch.stack(expected), rtol=0, atol=1e-9)
    others = [held.index(i) for i in layout.fixed]
    assert torch.equal(pooled[0][others], plain[0][list(layout.fixed)])


def zipped_by_the_paper(
    attention: np.ndarray, keys: np.ndarray, dominant: int, contextual: int
) -> tuple[list[int], np.ndarray]:
    """Kept patches, and weights `[K, P]` of what each becomes."""
    n = len(attention)
    first = sorted(sorted(range(n), key=lambda i: (-attention[i], i))[:dominant])
    rest = [i for i in range(n) if i not in first]
    step = max(len(rest) // contextual, 1) if contextual else 1
    targets = rest[::step][:contextual]
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    weights = np.eye(n)
    came: dict[int, list[int]] = {}
    for i in rest:
        if targets and i not in targets:
            came.setdefault(max(targets, key=lambda t: (unit[i] @ unit[t], -t)), []).append(i)
    for target, members in came.items():
        weights[target, members] = 1 / len(members)
    kept = sorted([*first, *targets])
    return kept, weights[kept]


@given(st.data())
def test_visionzip_folds_as_the_paper_says_ties_included(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 24))
    contextual = data.draw(st.integers(0, n))
    dominant = data.draw(st.integers(1 if not contextual else 0, n - contextual)) if n > contextual else 0
    draw = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    attention, keys = draw.integers(0, 5, n).astype(float), draw.choice([-1.0, 1.0], size=(n, 16))
    score, target = dominant_and_contextual(torch.from_numpy(attention)[None], dominant, contextual)
    keep = dominant + contextual
    kept = sorted(sorted(range(n), key=lambda i: (-float(score[0, i]), i))[:keep])
    expected, weights = zipped_by_the_paper(attention, keys, dominant, contextual)
    assert kept == expected
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    found = contextual_weights(torch.from_numpy(unit @ unit.T)[None], target, torch.tensor([kept]))[0]
    np.testing.assert_allclose(found, weights, atol=1e-12)


def test_visionzip_in_a_query() -> None:
    backbone = tiny_policy_parts(tiny_config())
    layers, layout = backbone.decoder.layers, backbone.layout(INSTRUCTION)
    tower = backbone.model.vision_backbone.featurizer
    seen: list[Tensor] = []
    handle = tower.blocks[-1].norm1.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with entering(layers[0]) as plain:
        policy_of(backbone).act(observation(backbone.config))
    handle.remove()
    stage = VisionZipConfig(use="visionzip", keep=12, contextual=0.25)
    with entering(layers[0]) as zipped_:
        trace = policy_of(backbone, stage).act(observation(backbone.config)).trace
    attention = tower.blocks[-1].attn
    q, k, _ = attention.qkv(seen[0]).chunk(3, -1)
    width = q.shape[-1] // attention.heads
    heads = [slice(at, at + width) for at in range(0, q.shape[-1], width)]
    given_ = torch.stack([torch.softmax(q[:, :1, h] @ k[..., h].mT / width**0.5, -1)[:, 0] for h in heads]).sum(0)
    prefix = tower.config.prefix_tokens
    keys = torch.stack([k[..., h] for h in heads]).mean(0)[:, prefix:].flatten(0, 1).numpy()
    kept, weights = zipped_by_the_paper(given_[:, prefix:].flatten().numpy(), keys, 9, 3)
    patches = list(layout.prunable)
    assert trace.kept[-1][0].tolist() == [patches[i] for i in kept]
    held = sorted({*layout.fixed, *(patches[i] for i in kept)})
    expected = weights @ plain[0][patches].numpy()
    np.testing.assert_allclose(zipped_[0][[held.index(patches[i]) for i in kept]], expected, atol=1e-9)


@pytest.mark.parametrize("name", BACKBONES)
def test_what_merging_costs_is_counted(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    policy = policy_of(backbone, ToMeConfig(use="tome", after=("embedding", 2)))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trace = policy.act(seen).trace
    counted = query_flops(backbone.info, trace.plan)
    assert counted.total == counter.get_total_flops()
    # The likeness of each two tokens, of embeddings and of keys, and what the sums of those that merge take.
    n, width, head = len(trace.plan.layout.prunable), backbone.info.decoder.hidden, backbone.info.decoder.head_dim
    likeness = 2 * n * n * width + 2 * (n // 2) ** 2 * head
    merging = 2 * (n * (n // 2) + (n // 2) * (n // 4)) * width
    assert counted.probe == likeness + merging


def test_merging_nothing_is_dense() -> None:
    backbone = tiny_policy_parts(tiny_config())
    seen = observation(backbone.config)
    every = VisionZipConfig(use="visionzip", keep=1.0)
    dense = Policy(backbone, DENSE, REGISTRY)
    dense.reset(INSTRUCTION)
    assert np.array_equal(policy_of(backbone, every).act(seen).normalised, dense.act(seen).normalised)


def test_one_stage_merges_at_a_cut() -> None:
    backbone = tiny_policy_parts(tiny_config())
    policy = policy_of(backbone, PoolConfig(use="pool2x2"), VisionZipConfig(use="visionzip"))
    with pytest.raises(StageError, match="pool2x2 and visionzip both merge tokens before layer 0"):
        policy.act(observation(backbone.config))


def test_more_than_half_cannot_merge_at_once() -> None:
    with pytest.raises(ConfigError, match=r"keep: 0\.3: at most half can merge at one cut"):
        policy_of(tiny_oft.tiny_policy_parts(tiny_config()), ToMeConfig(use="tome", keep=0.3))
