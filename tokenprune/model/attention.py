"""Attention of a few chosen queries, exact, while the layer itself stays on its fast kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenprune.tokens.selection import CurrentIds


def attention_rows(q: Tensor, k: Tensor, rows: CurrentIds, causal: bool) -> Tensor:
    """Attention probabilities of the queries `rows` over all keys, in at least float32.

    Args:
        q: Queries after rotary embedding `[B, H, n, d]`.
        k: Keys after rotary embedding `[B, G, m, d]`; `G` divides `H` (grouped-query attention).
        rows: Current indices of the queries `[B, R]`.
        causal: Whether a query sees only keys up to itself; then there are as many keys as queries.

    Returns:
        `[B, H, R, m]`, each row summing to 1.
    """
    index = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    return probabilities(q.gather(2, index), k, rows if causal else None)


def received(q: Tensor, k: Tensor, rows: CurrentIds | None, block: int = 64) -> Tensor:
    """Attention that each key gets `[B, m]`, mean over heads and all queries, in at least float32.

    Args:
        q: Queries `[B, H, n, d]`.
        k: Keys `[B, G, m, d]`.
        rows: As in `probabilities`.
        block: Queries at a time, so that the whole map is never held.
    """
    total: Tensor = torch.zeros((), device=q.device)
    for weights in _blocks(q, k, rows, block):
        total = total + weights.sum(2)
    mean: Tensor = total.mean(1) / q.shape[2]
    return mean


def row_entropy(q: Tensor, k: Tensor, rows: CurrentIds | None, block: int = 64) -> Tensor:
    """Entropy in nats of the head-averaged attention of a query, mean over all queries `[B]`; arguments as above."""
    total: Tensor = torch.zeros((), device=q.device)
    for weights in _blocks(q, k, rows, block):
        shared = weights.mean(1)
        total = total - torch.xlogy(shared, shared).sum((1, 2))
    return total / q.shape[2]


def _blocks(q: Tensor, k: Tensor, rows: CurrentIds | None, block: int) -> Iterator[Tensor]:
    for start in range(0, q.shape[2], block):
        here = slice(start, start + block)
        yield probabilities(q[:, :, here], k, None if rows is None else CurrentIds(rows[:, here]))


def probabilities(q: Tensor, k: Tensor, rows: CurrentIds | None) -> Tensor:
    """Attention probabilities `[B, H, R, m]` of queries `[B, H, R, d]` over keys `[B, G, m, d]`.

    Where `rows` `[B, R]` are given, each query's own place among the keys, it sees only keys up to that.
    """
    logits = similarity(q, k)
    if rows is not None:
        future = torch.arange(k.shape[2], device=q.device) > rows[:, :, None]
        logits = logits.masked_fill(future[:, None], -torch.inf)
    weights: Tensor = logits.softmax(-1)
    return weights


def similarity(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products `[B, H, R, m]` of queries `[B, H, R, d]` and keys `[B, G, m, d]`, in at least float32."""
    batch, heads, rows, dim = q.shape
    groups, n = k.shape[1], k.shape[2]
    exact = torch.promote_types(q.dtype, torch.float32)
    shared = q.to(exact).reshape(batch, groups, heads // groups * rows, dim)
    products: Tensor = shared @ k.to(exact).transpose(2, 3) * dim**-0.5
    return products.view(batch, heads, rows, n)
