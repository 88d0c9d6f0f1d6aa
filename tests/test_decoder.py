"""The decoder loop against transformers' Llama, and pruning in it against a masked dense model written out here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaModel

from tests.drawing import batches, decoder_of, keep_sets, llamas, random, seeds, tiny_llama
from tokenprune.model.decoder import Decoded, Positions
from tokenprune.model.kv_cache import KVCache, LayerKV
from tokenprune.tokens.selection import OriginalIds, TokenSelection

NEVER = 10**6
Kept = list[list[int]]
"""Original ids kept, per batch row."""


@dataclass
class FakePruner:
    """Keeps the given original ids after the given layers."""

    keep: dict[int, Kept] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def acts_after(self, layer: int) -> bool:
        return layer in self.keep

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, seen: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        self.asked.append(layer)
        rows = []
        for row, kept in enumerate(self.keep[layer]):
            place = {token: at for at, token in enumerate(tokens.ids[row].tolist())}
            rows.append(torch.stack([hidden[row, place[token]] for token in kept]))
        return torch.stack(rows), TokenSelection(OriginalIds(torch.tensor(self.keep[layer])), tokens.n_source)


@dataclass
class Cuts:
    """Nested keep sets: `keep[-1]` before layer 0, `keep[l]` after layer l."""

    n: int
    batch: int
    keep: dict[int, Kept]

    def last_layer_that_sees(self) -> Tensor:
        """The last layer in which each token `[B, n]` is a key; NEVER for one that is never dropped."""
        last = torch.full((self.batch, self.n), NEVER)
        for layer in sorted(self.keep, reverse=True):
            for row, kept in enumerate(self.keep[layer]):
                gone = [token for token in range(self.n) if token not in kept]
                last[row, gone] = layer
        return last

    def survivors(self) -> Kept:
        return self.keep[max(self.keep)] if self.keep else [list(range(self.n))] * self.batch

    def run(
        self, model: LlamaModel, embeddings: Tensor, causal: bool, positions: Positions = "preserve",
        cache: KVCache | None = None,
    ) -> Decoded:  # fmt: skip
        first = self.keep.get(-1, [list(range(self.n))] * self.batch)
        hidden = torch.stack([embeddings[row, kept] for row, kept in enumerate(first)])
        tokens = TokenSelection(OriginalIds(torch.tensor(first)), self.n)
        later = {layer: kept for layer, kept in self.keep.items() if layer >= 0}
        return decoder_of(model, causal).run(hidden, tokens, FakePruner(later), cache, positions=positions)


@st.composite
def cuts(draw: st.DrawFn, depth: int, n: int, batch: int) -> Cuts:
    held, keep = [list(range(n))] * batch, {}
    for layer in sorted(draw(st.sets(st.integers(-1, depth - 2), max_size=depth))):
        keep[layer] = held = draw(keep_sets(held))
    return Cuts(n, batch, keep)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as complex numbers: component j is rotated by position / theta^(2j/d); the table is float32 in Llama."""
    half = x.shape[-1] // 2
    frequency = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) * 2 / x.shape[-1])
    angle = positions.to(torch.float32)[..., None] * frequency
    spin = torch.complex(torch.cos(angle).double(), torch.sin(angle).double())
    z = torch.complex(x[..., :half], x[..., half:]) * spin
    return torch.cat([z.real, z.imag], dim=-1)


def masked_dense(model: LlamaModel, x: Tensor, last: Tensor, sees: Tensor, renumber: bool = False) -> Tensor:
    """Every token through every layer, with an N x N additive mask that hides dropped tokens.

    `last` `[B, N]` is the last layer in which a token is a key, `sees` `[N, N]` the pattern without pruning. The row of
    a dropped token goes on seeing the token itself, so that it stays finite; nobody reads it.
    """
    config = model.config
    dim, theta = config.head_dim, config.rope_parameters["rope_theta"]
    n = x.shape[1]
    for index, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        alive = last >= index
        allowed = (sees & alive[:, None, :]) | torch.eye(n, dtype=torch.bool)
        mask = torch.where(allowed, 0.0, -math.inf).double()
        positions = torch.where(alive, alive.cumsum(1) - 1, 0) if renumber else torch.arange(n).expand(x.shape[:2])
        normed = rms_norm(x, layer.input_layernorm.weight)
        q, k, v = (normed @ part.weight.T for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = []
        for head in range(config.num_attention_heads):
            group = head * config.num_key_value_heads // config.num_attention_heads
            own = slice(head * dim, (head + 1) * dim)
            shared = slice(group * dim, (group + 1) * dim)
            logits = (
                turned(q[..., own], positions, theta) @ turned(k[..., shared], positions, theta).mT / math.sqrt(dim)
            )
            raised = torch.exp(logits + mask - (logits + mask).amax(-1, keepdim=True))
            mixed.append(raised / raised.sum(-1, keepdim=True) @ v[..., shared])
        x = x + torch.cat(mixed, dim=-1) @ attention.o_proj.weight.T
        normed = rms_norm(x, layer.post_attention_layernorm.weight)
        gate = normed @ mlp.gate_proj.weight.T
        x = x + (gate * torch.sigmoid(gate) * (normed @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return rms_norm(x, model.norm.weight)


def pattern(n: int, causal: bool) -> Tensor:
    every = torch.ones(n, n, dtype=torch.bool)
    return every.tril() if causal else every


def at(x: Tensor, kept: Kept) -> Tensor:
    return torch.stack([x[row, ids] for row, ids in enumerate(kept)])


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


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
    decoded = plan.run(model, x, causal, "compact")
    expected = masked_dense(model, x, plan.last_layer_that_sees(), pattern(n, causal), renumber=True)
    close(decoded.hidden, at(expected, plan.survivors()), 1e-10)
    assert decoded.tokens.ids.tolist() == plan.survivors()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("after", [-1, 0, 1])
def test_i10_original_positions_reach_rope(causal: bool, after: int) -> None:
    model, x = tiny_llama(depth=3), random(1, 1, 8, 16)
    plan = Cuts(8, 1, {after: [[0, 3, 4, 7]]})
    preserved = plan.run(model, x, causal).hidden
    renumbered = plan.run(model, x, causal, "compact").hidden
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
