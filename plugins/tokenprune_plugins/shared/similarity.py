"""Cosine similarity of tokens, and its FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def unit_vectors(features: Tensor) -> Tensor:
    """Features `[..., D]` scaled to length 1, in at least float32."""
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def pairwise_cosine(features: Tensor) -> Tensor:
    """Cosine similarity `[B, P, P]` of every pair of features `[B, P, D]`."""
    directions = unit_vectors(features)
    return directions @ directions.mT


def similarity_flops(patches: int, width: int, others: int | None = None) -> int:
    """FLOPs of the products of each patch with each of `others` vectors; with each patch where left out."""
    return 2 * patches * (patches if others is None else others) * width
