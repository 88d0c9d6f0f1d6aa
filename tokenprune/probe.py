"""Attention of a few chosen queries, exact, while the layer itself stays on its fast kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.selection import CurrentIds


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


def received(q: Tensor, k: Tensor, causal: bool, block: int = 64) -> Tensor:
    """Attention that each key gets `[B, m]`, mean over heads and all queries, in at least float32.

    A block of queries at a time, so that the whole map is never held.
    """
    n = q.shape[2]
    total: Tensor = torch.zeros((), device=q.device)
    for start in range(0, n, block):
        part = q[:, :, start : start + block]
        rows = torch.arange(start, start + part.shape[2], device=q.device).expand(len(q), -1)
        total = total + probabilities(part, k, CurrentIds(rows) if causal else None).sum(2)
    mean: Tensor = total.mean(1) / n
    return mean


def probabilities(q: Tensor, k: Tensor, rows: CurrentIds | None) -> Tensor:
    """Attention probabilities `[B, H, R, m]` of queries `[B, H, R, d]` over keys `[B, G, m, d]`.

    Where `rows` `[B, R]` are given, a query sees only keys up to its own current index.
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
