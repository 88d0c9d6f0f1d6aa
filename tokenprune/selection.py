"""Which tokens are kept, in original coordinates, and how stages' wishes become one choice.

Pure tensor functions. Two index spaces exist and have two types: `OriginalIds` are positions in the
unpruned sequence, `CurrentIds` positions in what a layer holds now. Shapes never depend on data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType

import torch
from torch import Tensor

from tokenprune.errors import SelectionError

if TYPE_CHECKING:
    OriginalIds = NewType("OriginalIds", Tensor)
    CurrentIds = NewType("CurrentIds", Tensor)
else:
    # What NewType does when called, in a form that torch.compile can look into.
    def OriginalIds(ids):  # noqa: ANN001, ANN201, D103
        return ids

    CurrentIds = OriginalIds


@dataclass(frozen=True, slots=True)
class TokenSelection:
    """The kept tokens of a sequence.

    Attributes:
        ids: Kept original indices `[B, K]`, int64, strictly increasing along the row.
        n_source: Length of the unpruned sequence.
    """

    ids: OriginalIds
    n_source: int

    @classmethod
    def identity(cls, n_source: int, batch: int, device: torch.device | str = "cpu") -> TokenSelection:
        """Keep everything."""
        return cls(OriginalIds(torch.arange(n_source, device=device).expand(batch, n_source)), n_source)

    @property
    def n_kept(self) -> int:
        """Tokens kept per batch row."""
        return self.ids.shape[1]

    def compose(self, inner: TokenSelection) -> TokenSelection:
        """Select again among what is kept; `inner` counts from zero within this selection.

        Raises:
            SelectionError: If `inner` was made for another number of tokens.
        """
        if inner.n_source != self.n_kept:
            raise SelectionError(f"a selection of {inner.n_source} tokens cannot follow one that keeps {self.n_kept}")
        return TokenSelection(self.to_original(CurrentIds(inner.ids)), self.n_source)

    def to_original(self, current: CurrentIds) -> OriginalIds:
        """Map current indices `[B, M]` to original ones."""
        return OriginalIds(self.ids.gather(1, current))

    def to_current(self, original: OriginalIds) -> CurrentIds:
        """Map original indices `[B, M]` of tokens that are kept to current ones."""
        return CurrentIds(torch.searchsorted(self.ids.contiguous(), original.contiguous()))

    def seen(self) -> Tensor:
        """Boolean `[B, n_source]`, true where a token is kept."""
        mask = torch.zeros(self.ids.shape[0], self.n_source, dtype=torch.bool, device=self.ids.device)
        return mask.scatter(1, self.ids, True)


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


def others(chosen: Tensor, n: int) -> Tensor:
    """The indices `[B, n - K]` of `n` that are not among `chosen` `[B, K]`, strictly increasing."""
    taken = torch.zeros(len(chosen), n, dtype=torch.int64, device=chosen.device).scatter(1, chosen, 1)
    return taken.argsort(dim=1, stable=True)[:, : n - chosen.shape[1]]


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


def rows_at(values: Tensor, at: Tensor) -> Tensor:
    """Rows `at` `[B, M]` of `values` `[B, n, D]`, `[B, M, D]`; whole rows are copied, not element by element."""
    batch, n, width = values.shape
    first = torch.arange(batch, device=values.device)[:, None] * n
    return values.reshape(batch * n, width).index_select(0, (at + first).flatten()).view(batch, -1, width)


def apply(
    tokens: TokenSelection, prunable: OriginalIds, fixed: Tensor, chosen: Tensor
) -> tuple[TokenSelection, OriginalIds]:
    """Keep the chosen prunable tokens and every fixed one.

    Args:
        tokens: What is held now.
        prunable: Original ids of the prunable tokens held now `[B, P]`, ascending.
        fixed: Original ids of the tokens that always stay `[F]`, ascending.
        chosen: Indices `[B, K]` into `prunable`, from `resolve`.

    Returns:
        What is held next, and the original ids of its prunable tokens `[B, K]`.
    """
    kept = OriginalIds(prunable.gather(1, chosen))
    ids = torch.cat([fixed.expand(kept.shape[0], -1), kept], dim=1).sort(dim=1).values
    return TokenSelection(OriginalIds(ids), tokens.n_source), kept
