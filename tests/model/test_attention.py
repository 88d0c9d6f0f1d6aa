"""Attention rows against the same rows of a full attention map, computed query by query."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.attention_map import full_map
from tests.helpers.drawing import batches, random, seeds
from tokenprune.model.attention import attention_rows
from tokenprune.tokens.selection import CurrentIds


@given(
    st.data(), batches, st.integers(1, 6), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 5]), st.booleans(), seeds,
)  # fmt: skip
def test_rows_equal_those_of_the_full_map(
    data: st.DataObject, batch: int, n: int, groups: int, share: int, dim: int, causal: bool, seed: int
) -> None:
    q = 2 * random(seed, batch, n, groups * share, dim).transpose(1, 2)
    k = 2 * random(seed + 1, batch, n, groups, dim).transpose(1, 2)
    asked = st.lists(st.integers(0, n - 1), min_size=1, max_size=n)
    first = data.draw(asked)
    rows = [first] + [data.draw(st.permutations(first)) for _ in range(batch - 1)]
    weights = attention_rows(q, k, CurrentIds(torch.tensor(rows)), causal)
    full = full_map(q, k, causal)
    expected = torch.stack([full[b][:, wanted] for b, wanted in enumerate(rows)])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_get_a_float32_softmax(dtype: torch.dtype, causal: bool) -> None:
    q, k = random(0, 2, 4, 9, 8, dtype=dtype), random(1, 2, 2, 9, 8, dtype=dtype)
    rows = CurrentIds(torch.tensor([[8, 0, 3], [1, 2, 8]]))
    weights = attention_rows(q, k, rows, causal)
    full = full_map(q.double(), k.double(), causal)
    expected = torch.stack([full[b][:, wanted] for b, wanted in enumerate(rows.tolist())])
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)


def test_float32_stays_float32() -> None:
    q = random(0, 1, 2, 3, 4, dtype=torch.float32)
    assert attention_rows(q, q, CurrentIds(torch.tensor([[0]])), causal=True).dtype == torch.float32


def test_a_causal_query_sees_nothing_after_itself() -> None:
    q, k = random(0, 1, 2, 6, 4), random(1, 1, 2, 6, 4)
    weights = attention_rows(q, k, CurrentIds(torch.tensor([[2, 5]])), causal=True)
    assert torch.equal(weights[:, :, 0, 3:], torch.zeros(1, 2, 3, dtype=torch.float64))
    assert bool((weights[:, :, 1] > 0).all())
