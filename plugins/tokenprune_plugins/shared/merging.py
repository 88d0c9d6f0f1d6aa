"""Weights by which tokens that leave are merged into tokens that stay."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot


def into(destination: Tensor, size: Tensor, chosen: Tensor) -> Tensor:
    """Weights `[B, K, P]` of means over groups: each kept token, and those that go to it.

    Args:
        destination: Token each goes to, index `[B, P]` into the `P`; its own for those that go nowhere.
        size: Weight of each token in its group's mean `[B, P]`.
        chosen: Kept tokens `[B, K]`; a group whose destination is not kept is lost.
    """
    member = one_hot(destination, destination.shape[1]).mT.to(size.dtype) * size[:, None]
    weights = member.gather(1, chosen[..., None].expand(-1, -1, member.shape[2]))
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-12)
