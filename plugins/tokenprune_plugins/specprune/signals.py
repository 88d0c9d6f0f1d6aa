"""SpecPrune's formulas, one function each: motion, look-back, rank weights, confidence, moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokenprune import ExecutedAction

LONGEST_LOOK_BACK = 11
"""Control steps from this frame to the oldest one that `look_back` returns."""


def travelled(executed: Sequence[ExecutedAction], dims: Sequence[int]) -> float:
    """Length of the summed translation of executed actions, in the action's own units; 0 without actions.

    Args:
        executed: The actions.
        dims: Dimensions of the translation.
    """
    sums = [sum(float(record.action[dim]) for record in executed) for dim in dims]
    return math.hypot(*sums)


def look_back(distance: float) -> int:
    """Control steps between the frames to compare, from 1 to 11; the slower the arm, the more.

    It is `floor(b + k * v) + 4` with b = 7 and k = -1 (SpecPrune-VLA v3), clamped to past frames.

    Args:
        distance: Length of the summed translation since the last query, v in the formula.
    """
    return min(max(math.floor(7 - distance) + 4, 1), LONGEST_LOOK_BACK)


def rank_weights(n: int, decay: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights of ranks 0 to n - 1 `[n]`: the sigmoid of `-decay * rank`, normalised to sum 1."""
    weights = torch.sigmoid(-decay * torch.arange(n, dtype=dtype, device=device))
    return weights / weights.sum()


def entropy_confidence(attention: Tensor) -> Tensor:
    """Confidence of a layer `[B]`: 1 over the normalised entropy of its attention to the patches `[B, H, R, P]`.

    Each query row's attention, mean over heads, is renormalised over the patches. Its entropy is divided by ln P and
    averaged over query rows.
    """
    shares = attention.double().mean(1)
    shares = shares / shares.sum(2, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(2) / math.log(max(shares.shape[2], 2))
    return 1 / (entropy.mean(1) + 1e-8)


def moving_average(before: Tensor, new: Tensor, beta: float) -> Tensor:
    """`(1 - beta) * before + beta * new`."""
    return (1 - beta) * before + beta * new


def in_mode(value: float | Mapping[str, float], mode: str) -> float:
    """The value for a mode, where a value may depend on the mode."""
    return value[mode] if isinstance(value, Mapping) else value
