"""OpenVLA's decoding over a pruned cache: against transformers where nothing is dropped, else a masked dense model."""

from __future__ import annotations

from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.drawing import keep_sets, seeds
from tests.helpers.naive_openvla import Spec, naive_query
from tests.helpers.tiny_openvla import (
    INSTRUCTION,
    Watcher,
    act,
    keeping,
    observation,
    registry,
    tiny_config,
    tiny_openvla,
    watched,
)
from tokenprune.engine.query import Query
from tokenprune.model.kv_cache import KVCache
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import ActionChunk, Policy
from tokenprune_adapters.backbones.openvla import backbone as adapter
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA

DEPTH = 3
PATCHES = list(range(1, 17))
Kept = dict[int, list[list[int]]]


@cache
def made(seed: int = 0, restrict: bool = False) -> OpenVLA:
    return tiny_openvla(tiny_config(restrict=restrict), seed)


@st.composite
def kept_sets(draw: st.DrawFn, batch: int, depth: int = DEPTH) -> Kept:
    """Nested patches to keep, per layer a cut follows and batch row."""
    held, kept = [PATCHES] * batch, {}
    for layer in sorted(draw(st.sets(st.integers(-1, depth - 2), min_size=1))):
        if not held[0]:
            break
        kept[layer] = held = draw(keep_sets(held))
    return kept


def row_of(kept: Kept, row: int, chunk: ActionChunk) -> dict[int, set[int]]:
    """What stays of one row, the tokens that cannot be pruned among it."""
    return {layer: {*rows[row], *chunk.trace.plan.layout.fixed} for layer, rows in kept.items()}


def transformers_llama(backbone: OpenVLA) -> LlamaForCausalLM:
    """transformers' own model of the sizes the tests use, with the same weights."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    model.load_state_dict(backbone.model.language_model.state_dict())
    return model


def embeddings(backbone: OpenVLA, image: int = 0) -> Tensor:
    """What enters the decoder."""
    with patch.object(Query, "decode", autospec=True, side_effect=RuntimeError) as decode, pytest.raises(RuntimeError):
        act(backbone, DENSE, [observation(image)])
    return decode.call_args.args[2]


@pytest.mark.parametrize("seed", range(3))
def test_equals_transformers_logits_and_greedy_generation(seed: int) -> None:
    backbone = tiny_openvla(seed=seed, exact=False)
    peer, x = transformers_llama(backbone), embeddings(backbone, seed)
    seen = watched(backbone)
    act(backbone, DENSE, [observation(seed)])
    with torch.no_grad():
        everywhere = peer(inputs_embeds=x).logits
        ids = peer.generate(
            inputs_embeds=x,
            attention_mask=torch.ones(x.shape[:2], dtype=torch.int64),
            max_new_tokens=7,
            do_sample=False,
        )
    torch.testing.assert_close(seen.logits[0], everywhere[:, -1], rtol=0, atol=1e-9)
    assert torch.stack(seen.logits, dim=1).argmax(-1).tolist() == ids.tolist()


@settings(max_examples=20)
@given(st.data(), st.integers(1, 2), st.booleans(), seeds)
def test_pruned_decoding_equals_the_masked_dense_model(
    data: st.DataObject, batch: int, restrict: bool, seed: int
) -> None:
    backbone = made(seed % 3, restrict)
    kept, observations = data.draw(kept_sets(batch)), [observation(seed + row) for row in range(batch)]
    seen = watched(backbone)
    for row, chunk in enumerate(act(backbone, keeping(kept), observations)):
        expected = naive_query(backbone, observations[row], INSTRUCTION, kept=row_of(kept, row, chunk))
        logits, hidden = (torch.stack([step[row] for step in steps]) for steps in (seen.logits, seen.hidden))
        torch.testing.assert_close(hidden, expected.hidden, rtol=0, atol=1e-9)
        torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-9)
        np.testing.assert_allclose(chunk.normalised[0], expected.normalised, rtol=0, atol=1e-12)
        np.testing.assert_allclose(chunk.actions[0], expected.action, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [{-1: [PATCHES[3:9]]}, {0: [PATCHES[::2]]}, {-1: [PATCHES[:12]], 1: [[4, 7]]}])
def test_positions_go_on_from_the_unpruned_length(kept: Kept) -> None:
    backbone = made()
    seen = watched(backbone)
    (chunk,) = act(backbone, keeping(kept), [observation()])
    left = row_of(kept, 0, chunk)
    held = len(left[max(left)])
    sprung = naive_query(backbone, observation(), INSTRUCTION, Spec(decodes_from=held), left)
    assert (seen.logits[0][0] - sprung.logits[0]).abs().max() < 1e-9
    assert (seen.logits[1][0] - sprung.logits[1]).abs().max() > 1e-7, "the comparison would not notice this mistake"


@settings(max_examples=10)
@given(st.data(), st.integers(1, 2))
def test_cache_lengths_equal_the_trace(data: st.DataObject, batch: int) -> None:
    backbone, kept, caches = made(), data.draw(kept_sets(batch)), []
    with patch.object(adapter, "KVCache", lambda: caches.append(KVCache()) or caches[-1]):
        trace = act(backbone, keeping(kept), [observation(row) for row in range(batch)])[0].trace
    held, expected = len(trace.plan.layout.fixed), []
    left = len(PATCHES)
    for layer in range(DEPTH):
        left = len(kept[layer - 1][0]) if layer - 1 in kept else left
        expected.append(held + left)
    assert trace.cached == trace.held == tuple(expected)
    assert [cache.lengths for cache in caches] == [tuple(length + 6 for length in expected)]
    for layer, entry in enumerate(caches[0].layers):
        assert entry.k.shape == entry.v.shape == (batch, 2, expected[layer] + 6, 8)


@settings(max_examples=12)
@given(st.data(), st.integers(1, 2), seeds)
def test_observers_get_the_attention_of_the_tokens_fed_back(data: st.DataObject, batch: int, seed: int) -> None:
    backbone, kept = made(seed % 3), data.draw(kept_sets(batch))
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, DEPTH - 1), min_size=1))))
    policy = Policy(backbone, keeping(kept, layers), registry())
    for row in range(batch):
        policy.reset(INSTRUCTION, row)
    chunks = policy.act_batch({row: observation(seed + row) for row in range(batch)})
    (watcher,) = (stage for stage in policy.pipeline.stages if isinstance(stage, Watcher))
    assert watcher.attention.keys() == set(layers)
    for row in range(batch):
        expected = naive_query(backbone, observation(seed + row), INSTRUCTION, kept=row_of(kept, row, chunks[row]))
        for layer, found in watcher.attention.items():
            columns = found.prunable[row]
            before = [after for after in kept if after < layer]
            assert columns.tolist() == (kept[max(before)][row] if before else PATCHES)
            assert found.weights.shape == (batch, 4, 6, len(columns))
            torch.testing.assert_close(
                found.weights[row], expected.attention[layer][:, :, columns], rtol=0, atol=1e-9, check_dtype=False
            )


def test_a_second_query_starts_with_an_empty_cache() -> None:
    policy = Policy(made(), keeping({0: [PATCHES[:5]]}), registry())
    policy.reset(INSTRUCTION)
    first, other, again = (policy.act(observation(seed)) for seed in (0, 1, 0))
    assert np.array_equal(first.normalised, again.normalised)
    assert first.trace.cached == other.trace.cached == again.trace.cached
