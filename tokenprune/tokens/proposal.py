"""What stages propose at a cut, and how proposals are resolved into one choice.

Pure tensor functions; no shape depends on data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import SelectionError


@dataclass(frozen=True, slots=True)
class Proposal:
    """One stage's vote on the prunable tokens `[B, P]` before a cut, in their current order.

    Attributes:
        score: Floating `[B, P]`; tokens with higher scores are kept.
        protect: Boolean `[B, P]`; these are kept first, whatever their score.
        drop: Boolean `[B, P]`; these are kept only if no other token is left to fill the budget.
        reasons: Boolean `[B, P]` by name, such as `local`: why a token is wanted. For the trace only.
        merge: Maps the kept tokens, indices `[B, K]` into the `P`, to weights `[B, K, P]`: each kept token becomes this
            weighted sum of all tokens before the cut, at its own position. By default tokens are unchanged.
    """

    score: Tensor | None = None
    protect: Tensor | None = None
    drop: Tensor | None = None
    reasons: Mapping[str, Tensor] | None = None
    merge: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """A part of the budget that is filled first, from one group of tokens.

    Attributes:
        member: Boolean `[B, P]`, the tokens of the group.
        keep: Tokens to take from it.
    """

    member: Tensor
    keep: int


def resolve(
    proposals: Sequence[Proposal],
    keep: int,
    weights: Sequence[float] | None = None,
    quotas: Sequence[Quota] = (),
) -> Tensor:
    """Turn the proposals of all stages at one cut into exactly `keep` tokens per row.

    Tokens are ordered by: within a group's quota, protected, not dropped, higher score, lower index. Protect and drop
    votes are OR-ed. A single score is used as it is; several are replaced by their ranks and summed with their weights.
    Votes never change how many tokens are kept, so the shape is static. A NaN score ranks lowest.

    Args:
        proposals: At least one, each over the same `[B, P]` tokens.
        keep: Tokens to keep, `0 <= keep <= P`.
        weights: One per proposal; 1 each by default.
        quotas: Groups with their own budgets; what a group cannot fill goes to the best of the other tokens.

    Returns:
        Indices `[B, keep]` into the `P` tokens, strictly increasing.

    Raises:
        SelectionError: If there is nothing to resolve, shapes differ, or `keep` is out of range.
    """
    shape = _common_shape(proposals)
    n = shape[1]
    if not 0 <= keep <= n:
        raise SelectionError(f"cannot keep {keep} of {n} tokens")
    weights = [1.0] * len(proposals) if weights is None else weights
    device = next(t.device for p in proposals for t in (p.score, p.protect, p.drop) if t is not None)

    scored = [(p.score, w) for p, w in zip(proposals, weights, strict=True) if p.score is not None]
    rank = torch.zeros(shape, dtype=torch.int64, device=device)
    if len(scored) == 1:
        rank = rank_below(scored[0][0])
    elif scored:
        # Ranks are not divided by n: sums of integers are exact, so ties do not depend on the order of stages.
        rank = rank_below(torch.stack([rank_below(s).double() * w for s, w in scored]).sum(0))
    level = torch.ones(shape, dtype=torch.int64, device=device)
    dropped = _any_vote([p.drop for p in proposals])
    if dropped is not None:
        level = level - dropped.long()
    protected = _any_vote([p.protect for p in proposals])
    if protected is not None:
        level = torch.where(protected, 2, level)

    # One integer key without ties encodes the lexicographic order, so topk is deterministic on every device.
    key = (level * n + rank) * n + torch.arange(n - 1, -1, -1, device=device)
    if quotas:
        key = key + _within_quota(key, quotas).long() * (3 * n * n)
    return key.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def rank_below(score: Tensor) -> Tensor:
    """Number of tokens with a strictly lower score, int64 `[B, P]`; equal scores share a rank, NaN ranks lowest."""
    score = torch.nan_to_num(score, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).contiguous()
    return torch.searchsorted(score.sort(dim=1).values, score)


def _within_quota(key: Tensor, quotas: Sequence[Quota]) -> Tensor:
    """Whether a token is among the best `keep` of one of its groups, boolean `[B, P]`."""
    order = key.argsort(dim=1, descending=True)
    within = torch.zeros_like(key, dtype=torch.bool)
    for quota in quotas:
        place = quota.member.gather(1, order).cumsum(1)
        chosen = quota.member & (torch.empty_like(place).scatter(1, order, place) <= quota.keep)
        within = within | chosen
    return within


def _any_vote(votes: Sequence[Tensor | None]) -> Tensor | None:
    present = [v for v in votes if v is not None]
    if not present:
        return None
    return torch.stack(present).any(0)


def _common_shape(proposals: Sequence[Proposal]) -> tuple[int, int]:
    votes = [(name, getattr(p, name)) for p in proposals for name in ("score", "protect", "drop")]
    tensors = [(name, vote) for name, vote in votes if vote is not None]
    if not tensors:
        raise SelectionError("nothing to resolve: no proposal carries a score, protect or drop")
    shape = tuple(tensors[0][1].shape)
    for name, tensor in tensors:
        if tuple(tensor.shape) != shape or tensor.dim() != 2:
            raise SelectionError(
                f"'{name}' has shape {tuple(tensor.shape)}; every vote at a cut must be [B, P] = {shape}"
            )
        if (name == "score") != tensor.dtype.is_floating_point or (name != "score" and tensor.dtype != torch.bool):
            wanted = "floating" if name == "score" else "boolean"
            raise SelectionError(f"'{name}' has dtype {tensor.dtype}; it must be {wanted}")
    return shape[0], shape[1]
