"""Exact attention probabilities of a few queries, computed beside the layer's fused kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenprune.tokens.selection import CurrentIds, head_rows_at


def attention_rows(q: Tensor, k: Tensor, rows: CurrentIds, causal: bool) -> Tensor:
    """Attention probabilities of the queries `rows` over all keys, in at least float32.

    Args:
        q: Queries after rotary embedding `[B, H, n, d]`.
        k: Keys after rotary embedding `[B, G, m, d]`; `G` divides `H` (grouped-query attention).
        rows: Current indices of the queries `[B, R]`.
        causal: Whether a query attends only to keys up to itself; there must then be as many keys as queries.

    Returns:
        `[B, H, R, m]`, each row summing to 1.
    """
    return probabilities(head_rows_at(q, rows), k, rows if causal else None)


def received(q: Tensor, k: Tensor, rows: CurrentIds | None, block: int = 64) -> Tensor:
    """Attention that each key receives `[B, m]`, mean over heads and all queries, in at least float32.

    Args:
        q: Queries `[B, H, n, d]`.
        k: Keys `[B, G, m, d]`.
        rows: Index of each query among the keys `[B, n]` if attention is causal, else None.
        block: Queries per step, so that the whole attention map is never in memory.
    """
    total: Tensor = torch.zeros((), device=q.device)
    for weights in _blocks(q, k, rows, block):
        total = total + weights.sum(2)
    mean: Tensor = total.mean(1) / q.shape[2]
    return mean


def row_entropy(q: Tensor, k: Tensor, rows: CurrentIds | None, block: int = 64) -> Tensor:
    """Entropy in nats of the head-averaged attention, mean over all queries `[B]`; arguments as in `received`."""
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

    `rows` `[B, R]` are the indices of the queries among the keys; with them, attention is causal.
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
