"""Combines the proposals at one cut: which tokens stay, and what is merged into them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.errors import SelectionError, StageError
from tokenprune.pipelines.binding import BoundPipeline, HookCall
from tokenprune.stages.token_context import SelectContext
from tokenprune.tokens.plan import Cut, Removal
from tokenprune.tokens.proposal import Proposal, Quota, resolve

Proposals = list[tuple[int, Proposal]]
"""Proposals at one cut, each with the index of its stage."""


def checked(answer: object, prunable: Tensor, what: str) -> None:
    """Check that a stage returned None or a proposal over the prunable tokens `[B, P]`.

    Raises:
        StageError: If not; the message begins with `what`.
    """
    if answer is None:
        return
    if not isinstance(answer, Proposal):
        raise StageError(f"{what} {type(answer).__name__}, not a Proposal or None")
    votes = {"score": answer.score, "protect": answer.protect, "drop": answer.drop, **(answer.reasons or {})}
    for name, vote in votes.items():
        if vote is not None and vote.shape != prunable.shape:
            raise StageError(
                f"{what} a {name} of shape {list(vote.shape)}; the prunable tokens held are {list(prunable.shape)}"
            )


def choose(cut: Cut, proposals: Proposals, context: SelectContext, pipeline: BoundPipeline, where: str) -> Tensor:
    """Indices `[B, K]` of the prunable tokens that stay at a cut.

    Raises:
        StageError: If no stage proposed, or the proposals cannot be resolved.
    """
    if not proposals:
        asked = ", ".join(pipeline.names[i] for i in cut.stages)
        raise StageError(
            f"{where}: {cut.keep} of {cut.found} tokens are to stay, but no stage said which (asked: {asked})"
        )
    quotas = [
        Quota(torch.stack([context.in_view(view) for view in group.views]).any(0), group.keep) for group in cut.groups
    ]
    try:
        return resolve([p for _, p in proposals], cut.keep, pipeline.weights([i for i, _ in proposals]), quotas)
    except SelectionError as error:
        names = ", ".join(pipeline.names[i] for i, _ in proposals)
        raise StageError(f"{names}: {where}: {error}") from error


def merged(
    proposals: Proposals, context: SelectContext, chosen: Tensor, pipeline: BoundPipeline, where: str
) -> Tensor | None:
    """Hidden states `[B, K, D]` of the kept tokens `[B, K]` after merging; None if no stage merges.

    Raises:
        StageError: If several stages merge, a stage merges undeclared, or its weights have the wrong shape.
    """
    merging = [(pipeline.names[index], index, p.merge) for index, p in proposals if p.merge is not None]
    if not merging:
        return None
    if len(merging) > 1:
        names = " and ".join(name for name, _, _ in merging)
        raise StageError(f"{names} both merge tokens {where}; only one of them can")
    name, index, merge = merging[0]
    if pipeline.needs[index].removal is not Removal.MERGE:
        raise StageError(f"stage '{name}' {where} merges tokens, but its requirements lack `removal=Removal.MERGE`")
    weights: Tensor = pipeline.call(HookCall("merge", index, merge), chosen, where)
    wanted = [*chosen.shape, context.prunable.shape[1]]
    if list(weights.shape) != wanted:
        raise StageError(f"stage '{name}' {where}: weights to merge by have shape {list(weights.shape)}, not {wanted}")
    return weights.to(context.hidden.dtype) @ context.patches
