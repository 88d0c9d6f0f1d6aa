"""The decoder loop against transformers' Llama, and pruning in it against a masked dense model written out here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaModel

from tests.helpers.drawing import batches, decoder_of, llamas, random, seeds, tiny_llama
from tests.helpers.masked_decoder import NEVER, Cuts, FakePruner, at, close, cuts, masked_dense, pattern
from tokenprune.model.kv_cache import KVCache
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.selection import OriginalIds, TokenSelection


@given(st.one_of(llamas(), llamas(own_norms=True)), batches, st.integers(1, 12), st.booleans(), seeds)
def test_equals_transformers(model: LlamaModel, batch: int, n: int, causal: bool, seed: int) -> None:
    x = random(seed, batch, n, model.config.hidden_size)
    mask = None if causal else torch.zeros(batch, 1, n, n, dtype=torch.float64)
    expected = model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    decoded = decoder_of(model, causal).run(x, TokenSelection.identity(n, batch))
    close(decoded.hidden, expected, 1e-12)
    assert decoded.held == (n,) * len(model.layers)


@given(llamas(), batches, st.integers(1, 10), st.booleans(), seeds)
def test_the_reference_equals_transformers(model: LlamaModel, batch: int, n: int, causal: bool, seed: int) -> None:
    x = random(seed, batch, n, model.config.hidden_size)
    mask = None if causal else torch.zeros(batch, 1, n, n, dtype=torch.float64)
    expected = model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    close(masked_dense(model, x, torch.full((batch, n), NEVER), pattern(n, causal)), expected, 1e-12)


@given(st.data(), llamas(), batches, st.integers(2, 12), st.booleans(), seeds)
def test_i17_physical_drop_equals_the_masked_dense_model(
    data: st.DataObject, model: LlamaModel, batch: int, n: int, causal: bool, seed: int
) -> None:
    plan = data.draw(cuts(len(model.layers), n, batch))
    x = random(seed, batch, n, model.config.hidden_size)
    decoded = plan.run(model, x, causal)
    expected = masked_dense(model, x, plan.last_layer_that_sees(), pattern(n, causal))
    close(decoded.hidden, at(expected, plan.survivors()), 1e-10)
    assert decoded.tokens.ids.tolist() == plan.survivors()
    held, expected_held = n, []
    for layer in range(len(model.layers)):
        held = len(plan.keep[layer - 1][0]) if layer - 1 in plan.keep else held
        expected_held.append(held)
    assert decoded.held == tuple(expected_held)


@given(st.data(), llamas(), batches, st.integers(2, 10), st.integers(1, 4), seeds)
def test_i17_decoding_over_the_ragged_cache_equals_the_masked_dense_model(
    data: st.DataObject, model: LlamaModel, batch: int, n: int, new: int, seed: int
) -> None:
    plan = data.draw(cuts(len(model.layers), n, batch))
    x = random(seed, batch, n + new, model.config.hidden_size)
    last = torch.cat([plan.last_layer_that_sees(), torch.full((batch, new), NEVER)], dim=1)
    expected = masked_dense(model, x, last, pattern(n + new, causal=True))

    cache = KVCache()
    prefill = plan.run(model, x[:, :n], causal=True, cache=cache)
    close(prefill.hidden, at(expected, plan.survivors()), 1e-10)
    for step in range(n, n + new):
        token = TokenSelection(OriginalIds(torch.full((batch, 1), step)), n + new)
        decoded = decoder_of(model, causal=True).run(x[:, step : step + 1], token, cache=cache)
        close(decoded.hidden, expected[:, step : step + 1], 1e-10)
        assert cache.lengths == tuple(held + step - n + 1 for held in prefill.held)


@given(st.data(), llamas(), batches, st.integers(2, 10), st.integers(1, 4), seeds)
def test_a_bidirectional_suffix_over_a_pruned_prefix_equals_the_masked_dense_model(
    data: st.DataObject, model: LlamaModel, batch: int, n: int, new: int, seed: int
) -> None:
    plan = data.draw(cuts(len(model.layers), n, batch))
    x = random(seed, batch, n + new, model.config.hidden_size)
    last = torch.cat([plan.last_layer_that_sees(), torch.full((batch, new), NEVER)], dim=1)
    sees = torch.ones(n + new, n + new, dtype=torch.bool)
    sees[:n, n:] = False
    expected = masked_dense(model, x, last, sees)

    cache = KVCache()
    plan.run(model, x[:, :n], causal=False, cache=cache)
    suffix = TokenSelection(OriginalIds(torch.arange(n, n + new).repeat(batch, 1)), n + new)
    decoded = decoder_of(model, causal=False).run(x[:, n:], suffix, cache=cache)
    close(decoded.hidden, expected[:, n:], 1e-10)


def test_several_new_tokens_on_a_filled_causal_cache_are_refused() -> None:
    model, cache = tiny_llama(), KVCache()
    decoder = decoder_of(model, causal=True)
    x = random(0, 1, 5, 16)
    decoder.run(x[:, :3], TokenSelection.identity(3, 1), cache=cache)
    before = [entry.k for entry in cache.layers]
    with pytest.raises(ValueError, match="one token at a time, not 2"):
        decoder.run(x[:, 3:], TokenSelection(OriginalIds(torch.tensor([[3, 4]])), 5), cache=cache)
    assert all(entry.k is k for entry, k in zip(cache.layers, before, strict=True)), "the cache was touched"


@given(st.data(), llamas(), batches, st.integers(2, 10), st.booleans(), seeds)
def test_compact_positions_equal_a_renumbered_model(
    data: st.DataObject, model: LlamaModel, batch: int, n: int, causal: bool, seed: int
) -> None:
    plan = data.draw(cuts(len(model.layers), n, batch))
    x = random(seed, batch, n, model.config.hidden_size)
    decoded = plan.run(model, x, causal, Positions.COMPACT)
    expected = masked_dense(model, x, plan.last_layer_that_sees(), pattern(n, causal), renumber=True)
    close(decoded.hidden, at(expected, plan.survivors()), 1e-10)
    assert decoded.tokens.ids.tolist() == plan.survivors()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("after", [-1, 0, 1])
def test_i10_original_positions_reach_rope(causal: bool, after: int) -> None:
    model, x = tiny_llama(depth=3), random(1, 1, 8, 16)
    plan = Cuts(8, 1, {after: [[0, 3, 4, 7]]})
    preserved = plan.run(model, x, causal).hidden
    renumbered = plan.run(model, x, causal, Positions.COMPACT).hidden
    assert (preserved - renumbered).abs().max() > 1e-3, "a renumbering would not be noticed"
    expected = masked_dense(model, x, plan.last_layer_that_sees(), pattern(8, causal))
    close(preserved, at(expected, plan.survivors()), 1e-10)


@given(llamas(), batches, st.integers(1, 8), st.booleans(), seeds)
def test_i11_keeping_everything_equals_dense_bitwise(
    model: LlamaModel, batch: int, n: int, causal: bool, seed: int
) -> None:
    x = random(seed, batch, n, model.config.hidden_size)
    everything = [list(range(n))] * batch
    pruned = Cuts(n, batch, dict.fromkeys(range(len(model.layers) - 1), everything)).run(model, x, causal)
    dense = decoder_of(model, causal).run(x, TokenSelection.identity(n, batch))
    assert torch.equal(pruned.hidden, dense.hidden)


@given(st.data(), llamas(), st.integers(2, 10), st.booleans(), seeds)
def test_i9_batch_rows_are_independent(data: st.DataObject, model: LlamaModel, n: int, causal: bool, seed: int) -> None:
    plan = data.draw(cuts(len(model.layers), n, 3))
    x = random(seed, 3, n, model.config.hidden_size)
    together = plan.run(model, x, causal).hidden
    for row in range(3):
        alone = Cuts(n, 1, {layer: [kept[row]] for layer, kept in plan.keep.items()})
        close(together[row : row + 1], alone.run(model, x[row : row + 1], causal).hidden, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_i14_dtype_is_kept(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    x = random(0, 2, 6, 16, dtype=dtype)
    cache = KVCache()
    decoded = Cuts(6, 2, {0: [[0, 2, 5], [1, 2, 3]]}).run(model, x, causal=True, cache=cache)
    assert decoded.hidden.dtype == dtype
    assert {entry.k.dtype for entry in cache.layers} == {dtype}


def test_the_pruner_is_asked_only_where_it_acts() -> None:
    model, x = tiny_llama(depth=4), random(0, 1, 5, 16)
    pruner = FakePruner({1: [[0, 1, 4]]})
    decoder_of(model, causal=True).run(x, TokenSelection.identity(5, 1), pruner)
    assert pruner.asked == [1]
