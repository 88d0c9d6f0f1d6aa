"""Whole attention maps of a vision tower's last blocks."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from tokenprune_adapters.vision.transformer import Attention, VisionTower

ASKED = {
    "oft": ("featurizer", True),
    "openvla": ("featurizer", True),
    "pi0": ("vision", False),
    "pi05": ("vision", False),
}


def whole_map(attention: Attention, x: Tensor) -> Tensor:
    """Attention `[B, n, n]` of a block's normed input `[B, n, D]`, mean over heads, one head at a time."""
    if attention.split:
        q, k = attention.q_proj(x), attention.k_proj(x)
    else:
        q, k, _ = attention.qkv(x).chunk(3, -1)
    width = q.shape[-1] // attention.heads
    maps = [
        torch.softmax(q[..., at : at + width] @ k[..., at : at + width].mT / width**0.5, -1)
        for at in range(0, q.shape[-1], width)
    ]
    return torch.stack(maps).mean(0)


def last_inputs(tower: VisionTower, stack: ExitStack) -> list[Tensor]:
    """What the last block's attention is given in the queries run meanwhile."""
    seen: list[Tensor] = []
    handle = tower.blocks[-1].norm1.register_forward_hook(lambda _m, _a, out: seen.append(out))
    stack.callback(handle.remove)
    return seen
