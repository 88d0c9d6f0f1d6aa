"""What SpecPrune looks at, one small function each; other strategies may use them as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokenprune import ExecutedAction

LONGEST_LOOK_BACK = 11


def travelled(executed: Sequence[ExecutedAction], dims: Sequence[int]) -> float:
    """Length of the summed translation of some executed actions, in the actions' own units; 0 for none."""
    sums = [sum(float(record.action[dim]) for record in executed) for dim in dims]
    return math.hypot(*sums)


def look_back(distance: float) -> int:
    """Control steps between the frames to compare, from 1 to 11: far apart when the arm moves slowly.

    `floor(b + k * v) + 4` with b = 7 and k = -1 (SpecPrune-VLA v3), clamped so that it never names the current frame
    or a future one.
    """
    return min(max(math.floor(7 - distance) + 4, 1), LONGEST_LOOK_BACK)


def rank_weights(n: int, decay: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weight of each rank `[n]`: the sigmoid of `-decay * rank`, over its sum."""
    weights = torch.sigmoid(-decay * torch.arange(n, dtype=dtype, device=device))
    return weights / weights.sum()


def entropy_confidence(attention: Tensor) -> Tensor:
    """One over the normalised entropy of attention `[B, H, R, P]` to the patches, a number per batch row `[B]`.

    The mean over heads of each query row is renormalised over the patches; its entropy is divided by ln P and averaged
    over rows.
    """
    shares = attention.double().mean(1)
    shares = shares / shares.sum(2, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(2) / math.log(max(shares.shape[2], 2))
    return 1 / (entropy.mean(1) + 1e-8)


def moving_average(before: Tensor, new: Tensor, beta: float) -> Tensor:
    """`(1 - beta) * before + beta * new`."""
    return (1 - beta) * before + beta * new


def in_mode(value: float | Mapping[str, float], mode: str) -> float:
    """A number that may depend on the mode."""
    return value[mode] if isinstance(value, Mapping) else value
