"""What comes after the layout's tokens: reading at the end, continuing a ragged cache, and running again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaModel

from tests.helpers.drawing import batches, decoder_of, llamas, random, seeds, tiny_llama
from tests.helpers.masked_decoder import Cuts, FakePruner, close, cuts, masked_dense, pattern
from tokenprune.model.decoder import Decoded
from tokenprune.model.kv_cache import KVCache
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.selection import OriginalIds, TokenSelection


def begun(plan: Cuts, x: Tensor) -> tuple[Tensor, TokenSelection]:
    first = plan.keep.get(-1, [list(range(plan.n))] * plan.batch)
    hidden = torch.stack([x[row, kept] for row, kept in enumerate(first)])
    return hidden, TokenSelection(OriginalIds(torch.tensor(first)), plan.n)


@given(st.data(), llamas(), batches, st.integers(3, 10), seeds)
def test_only_what_is_read_is_made_at_the_end(
    data: st.DataObject, model: LlamaModel, batch: int, n: int, seed: int
) -> None:
    plan, x = data.draw(cuts(len(model.layers), n, batch)), random(seed, batch, n, model.config.hidden_size)
    everywhere = plan.run(model, x, causal=False)
    width = min(map(len, plan.survivors()))
    rows = [data.draw(st.lists(st.sampled_from(kept), min_size=0, max_size=width)) for kept in plan.survivors()]
    rows = [row[: min(map(len, rows))] for row in rows]
    read = OriginalIds(torch.tensor(rows, dtype=torch.int64).view(batch, -1))
    made = run_read(plan, model, x, read, causal=False)
    assert made.hidden.shape == (batch, len(rows[0]), model.config.hidden_size)
    assert made.tokens.ids.tolist() == plan.survivors()
    assert made.held == everywhere.held
    for row, wanted in enumerate(rows):
        places = [plan.survivors()[row].index(token) for token in wanted]
        close(made.hidden[row], everywhere.hidden[row, places], 1e-12)


def run_read(plan: Cuts, model: LlamaModel, x: Tensor, read: OriginalIds, causal: bool) -> Decoded:
    hidden, tokens = begun(plan, x)
    later = {layer: kept for layer, kept in plan.keep.items() if layer >= 0}
    return decoder_of(model, causal).run(hidden, tokens, FakePruner(later), read=read)


@given(llamas(), batches, st.integers(1, 8), seeds)
def test_a_causal_decoder_is_read_at_its_end(model: LlamaModel, batch: int, n: int, seed: int) -> None:
    x = random(seed, batch, n, model.config.hidden_size)
    decoder, everything = decoder_of(model, causal=True), TokenSelection.identity(n, batch)
    read = OriginalIds(torch.full((batch, 1), n - 1))
    close(decoder.run(x, everything, read=read).hidden, decoder.run(x, everything).hidden[:, -1:], 1e-12)
    if n > 1:
        with pytest.raises(ValueError, match="read at its last token, not at 2"):
            decoder.run(x, everything, read=OriginalIds(torch.tensor([[0, 1]] * batch)))


@pytest.mark.parametrize("positions", list(Positions))
@given(data=st.data(), model=llamas(), batch=batches, n=st.integers(2, 8), new=st.integers(1, 3), seed=seeds)
def test_tokens_behind_a_ragged_cache_equal_a_masked_dense_model(
    positions: str, data: st.DataObject, model: LlamaModel, batch: int, n: int, new: int, seed: int
) -> None:
    plan = data.draw(cuts(len(model.layers), n, batch))
    x = random(seed, batch, n + new, model.config.hidden_size)
    cache = KVCache()
    plan.run(model, x[:, :n], True, positions, cache)
    decoder, made = decoder_of(model, causal=True), []
    for step in range(new):
        tokens = TokenSelection(OriginalIds(torch.full((batch, 1), n + step)), n + step + 1)
        made.append(decoder.run(x[:, n + step : n + step + 1], tokens, cache=cache, positions=positions).hidden)
    gone = torch.cat([plan.last_layer_that_sees(), torch.full((batch, new), 10**6)], dim=1)
    expected = masked_dense(model, x, gone, pattern(n + new, True), renumber=positions is Positions.COMPACT)
    close(torch.cat(made, dim=1), expected[:, n:], 1e-10)


def test_a_frozen_cache_stays_as_it_is() -> None:
    model, cache = tiny_llama(depth=3), KVCache()
    decoder, x = decoder_of(model, causal=False), random(0, 1, 7, 16)
    decoder.run(x[:, :5], TokenSelection.identity(5, 1), cache=cache)
    frozen, tokens = cache.frozen(), TokenSelection(OriginalIds(torch.tensor([[5, 6]])), 7)
    first = decoder.run(x[:, 5:], tokens, cache=frozen).hidden
    assert torch.equal(first, decoder.run(x[:, 5:], tokens, cache=frozen).hidden)
    assert frozen.lengths == cache.lengths == (5, 5, 5)
    assert torch.equal(first, decoder.run(x[:, 5:], tokens, cache=cache).hidden)
    assert cache.lengths == (7, 7, 7)
    assert frozen.lengths == (5, 5, 5)


@given(st.data(), llamas(), st.integers(3, 8), seeds)
def test_pruned_rows_behind_a_prefix_equal_a_masked_dense_model(
    data: st.DataObject, model: LlamaModel, n: int, seed: int
) -> None:
    """A block that sees the prefix and itself, while the prefix does not see it."""
    plan = data.draw(cuts(len(model.layers), n, 1))
    x, cache = random(seed, 1, n + 3, model.config.hidden_size), KVCache()
    plan.run(model, x[:, :n], False, cache=cache)
    tokens = TokenSelection(OriginalIds(torch.arange(n, n + 3)[None]), n + 3)
    made = decoder_of(model, causal=False).run(x[:, n:], tokens, cache=cache.frozen()).hidden
    blocks = torch.ones(n + 3, n + 3, dtype=torch.bool)
    blocks[:n, n:] = False
    gone = torch.cat([plan.last_layer_that_sees(), torch.full((1, 3), 10**6)], dim=1)
    close(made, masked_dense(model, x, gone, blocks)[:, n:], 1e-10)
