"""What stages propose at a cut, and how proposals become one choice.

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
    """What one stage wishes for the prunable tokens a cut finds, in their current order.

    Attributes:
        score: Floating `[B, P]`; higher stays.
        protect: Boolean `[B, P]`; kept before any score is looked at.
        drop: Boolean `[B, P]`; kept only when nothing else is left to fill the budget.
        reasons: Boolean `[B, P]` by a name, such as `local`: why a token is wanted. Recorded; changes nothing.
        merge: Given the tokens that are kept, indices `[B, K]` into the `P`, what each becomes: weights `[B, K, P]` of
            a sum over all tokens the cut finds. It keeps its place and position. Left out, tokens stay as they are.
    """

    score: Tensor | None = None
    protect: Tensor | None = None
    drop: Tensor | None = None
    reasons: Mapping[str, Tensor] | None = None
    merge: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """A share of the budget that is filled first from one group of tokens.

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

    The order is: tokens within a group's quota, then protected, then undropped ones, then higher score, then lower
    index. Protect and drop votes are OR-ed. One score counts as it is; several are rank-normalised and summed with
    their weights. Votes move tokens up and down this order and never change how many are kept, so the
    shape is static. A NaN score ranks lowest.

    Args:
        proposals: At least one, each over the same `[B, P]` tokens.
        keep: Tokens to keep, `0 <= keep <= P`.
        weights: One per proposal; 1 each when left out.
        quotas: Groups with budgets of their own; what a group cannot fill goes to the best of the others.

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
        # All ranks are out of the same n; not dividing by it keeps sums exact, so that ties do not hang on stage order.
        rank = rank_below(torch.stack([rank_below(s).double() * w for s, w in scored]).sum(0))
    level = torch.ones(shape, dtype=torch.int64, device=device)
    dropped = _any_vote([p.drop for p in proposals])
    if dropped is not None:
        level = level - dropped.long()
    protected = _any_vote([p.protect for p in proposals])
    if protected is not None:
        level = torch.where(protected, 2, level)

    # One integer key holds the whole lexicographic order and has no ties, so topk is deterministic everywhere.
    key = (level * n + rank) * n + torch.arange(n - 1, -1, -1, device=device)
    if quotas:
        key = key + _within_quota(key, quotas).long() * (3 * n * n)
    return key.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def rank_below(score: Tensor) -> Tensor:
    """Number of tokens with a strictly lower score, int64 `[B, P]`; equal scores share a rank, NaN ranks lowest."""
    score = torch.nan_to_num(score, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).contiguous()
    return torch.searchsorted(score.sort(dim=1).values, score)


def _within_quota(key: Tensor, quotas: Sequence[Quota]) -> Tensor:
    """Boolean `[B, P]`: whether a token is among the best `keep` of a group it belongs to."""
    order = key.argsort(dim=1, descending=True)
    inside = torch.zeros_like(key, dtype=torch.bool)
    for quota in quotas:
        place = quota.member.gather(1, order).cumsum(1)
        chosen = quota.member & (torch.empty_like(place).scatter(1, order, place) <= quota.keep)
        inside = inside | chosen
    return inside


def _any_vote(votes: Sequence[Tensor | None]) -> Tensor | None:
    cast = [v for v in votes if v is not None]
    if not cast:
        return None
    return torch.stack(cast).any(0)


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
