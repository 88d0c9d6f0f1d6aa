"""The key/value cache: ragged, in order, addressed by original id."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.drawing import batches, random, seeds
from tokenprune.model.kv_cache import KVCache, LayerKV
from tokenprune.tokens.selection import OriginalIds


def entry(first: int, n: int, batch: int, seed: int) -> LayerKV:
    """Random keys and values of n tokens whose ids differ per row."""
    ids = torch.arange(first, first + n) + torch.arange(batch)[:, None]
    return LayerKV(random(seed, batch, 2, n, 3), random(seed + 1, batch, 2, n, 3), OriginalIds(ids))


@given(st.data(), st.integers(1, 4), batches, seeds)
def test_i16_each_layer_holds_what_it_was_given_in_order(
    data: st.DataObject, depth: int, batch: int, seed: int
) -> None:
    cache, given_so_far = KVCache(), [[] for _ in range(depth)]
    assert cache.lengths == ()
    for step in range(data.draw(st.integers(1, 4))):
        for layer in range(depth):
            new = entry(100 * step, data.draw(st.integers(1, 5)), batch, seed + 10 * step + 2 * layer)
            given_so_far[layer].append(new)
            held = cache.extend(layer, new)
            assert held is cache.layers[layer]
            for token, (source, place) in enumerate((e, i) for e in given_so_far[layer] for i in range(e.k.shape[2])):
                assert torch.equal(held.k[:, :, token], source.k[:, :, place])
                assert torch.equal(held.v[:, :, token], source.v[:, :, place])
                assert torch.equal(held.ids[:, token], source.ids[:, place])
        assert cache.lengths == tuple(sum(e.k.shape[2] for e in entries) for entries in given_so_far)


def test_earlier_entries_are_not_written_to() -> None:
    first, later = entry(0, 3, 1, 0), entry(9, 2, 1, 5)
    before = first.k.clone()
    joined = first.then(later)
    joined.k.zero_()
    assert torch.equal(first.k, before)
    assert joined.ids.tolist() == [[0, 1, 2, 9, 10]]


def test_a_layer_cannot_be_skipped() -> None:
    cache = KVCache()
    with pytest.raises(IndexError):
        cache.extend(1, entry(0, 1, 1, 0))
    assert cache.lengths == ()
