"""A whole attention map, computed query by query."""

from __future__ import annotations

import torch
from torch import Tensor


def full_map(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Attention probabilities `[B, H, n, n]`, one query of one head at a time."""
    batch, heads, n, dim = q.shape
    share = heads // k.shape[1]
    full = torch.zeros(batch, heads, n, n, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                seen = i + 1 if causal else n
                logits = torch.stack([(q[b, h, i] * k[b, h // share, j]).sum() for j in range(seen)]) / dim**0.5
                raised = torch.exp(logits - logits.max())
                full[b, h, i, :seen] = raised / raised.sum()
    return full
