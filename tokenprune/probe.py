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
    batch, heads, _, dim = q.shape
    groups, n = k.shape[1], k.shape[2]
    exact = torch.promote_types(q.dtype, torch.float32)
    index = rows[:, None, :, None].expand(batch, heads, rows.shape[1], dim)
    picked = q.gather(2, index).to(exact).view(batch, groups, heads // groups * rows.shape[1], dim)
    logits = (picked @ k.to(exact).transpose(2, 3) * dim**-0.5).view(batch, heads, rows.shape[1], n)
    if causal:
        future = torch.arange(n, device=q.device) > rows[:, :, None]
        logits = logits.masked_fill(future[:, None], -torch.inf)
    weights: Tensor = logits.softmax(-1)
    return weights
