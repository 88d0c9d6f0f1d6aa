"""How alike tokens are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def unit(features: Tensor) -> Tensor:
    """Features `[..., D]` at length 1, in at least float32."""
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def likeness_flops(patches: int, width: int, others: int | None = None) -> int:
    """FLOPs of the cosines of some patches with others, or with each other."""
    return 2 * patches * (patches if others is None else others) * width


def likeness(features: Tensor) -> Tensor:
    """Cosine of each two of `[B, P, D]`, `[B, P, P]`."""
    directions = unit(features)
    return directions @ directions.mT
