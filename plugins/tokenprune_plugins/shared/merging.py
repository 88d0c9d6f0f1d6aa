"""Weights by which tokens that leave are merged into tokens that stay."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot


def merge_weights(destination: Tensor, size: Tensor, chosen: Tensor) -> Tensor:
    """Weights `[B, K, P]` that make each kept token the weighted mean of its group.

    Args:
        destination: Index `[B, P]` of the token that each token merges into; its own index for a token that stays.
        size: Weight of each token in the mean of its group `[B, P]`.
        chosen: Kept tokens `[B, K]`; a group whose destination is not kept is lost.
    """
    member = one_hot(destination, destination.shape[1]).mT.to(size.dtype) * size[:, None]
    weights = member.gather(1, chosen[..., None].expand(-1, -1, member.shape[2]))
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-12)
