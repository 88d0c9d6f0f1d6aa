"""Token merging (ToMe, arXiv 2210.09461): merge the most similar pairs, half of the tokens against the other half.

Tokens are dealt alternately into A and B. Each of A looks for the most similar one of B; the pairs that are most alike
merge into their token of B, a mean weighted by how many patches each stands for. So at most half leave at one cut.
Similar means the cosine of keys, mean over heads; before layer 0, where there are none, of embeddings. The paper's
proportional attention, which counts a merged token once for each patch, is left out: the fast kernel has no place for
it. A merged token keeps the position of its token of B.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenprune import (
    BackboneInfo,
    CutConfig,
    Cuts,
    Keep,
    LayerContext,
    Plan,
    Proposal,
    Removal,
    SelectContext,
    Stage,
    StageNeeds,
    hookimpl,
    rows_at,
)
from tokenprune_plugins.shared.merging import into
from tokenprune_plugins.shared.similarity import likeness, likeness_flops


class ToMeConfig(CutConfig):
    """Where pairs merge; a cut keeps at least half of what it finds."""

    after: Cuts = ("embedding", "6%")
    keep: Keep = 0.5


class ToMe(Stage[ToMeConfig]):
    """Merges the pairs that are most alike."""

    Config = ToMeConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, and a look that begins to count patches; what leaves is merged."""
        return replace(super().requirements(info).also_called_after([-1]), removal=Removal.MERGE)

    def bind(self, info: BackboneInfo) -> None:
        """Find the cuts.

        Raises:
            ValueError: If a cut is to keep less than half.
        """
        self._cuts = self.cuts(info.decoder.depth)
        modes = next(iter(self.config.modes().values()), {""})
        amounts = {self.config.budget(mode, entry).amount for mode in modes for entry in range(len(self.config.after))}
        small = [amount for amount in amounts if isinstance(amount, float) and amount < 0.5]
        if small:
            raise ValueError(f"keep: {min(small)}: at most half can merge at one cut; use several cuts")

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """Cosines of all pairs of embeddings, or of keys."""
        shape = info.decoder
        return sum(
            likeness_flops(cut.found, shape.hidden if cut.after < 0 else shape.head_dim) for cut in self.own_cuts(plan)
        )

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal | None:
        """Begin to count, and merge by embeddings where there is a cut."""
        ctx.scratch["size"] = torch.ones_like(ctx.prunable, dtype=torch.promote_types(ctx.hidden.dtype, torch.float32))
        return self._propose(ctx, ctx.patches) if ctx.layer in self._cuts else None

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Merge by keys."""
        return self._propose(ctx, rows_at(ctx.k.mean(1), ctx.tokens.to_current(ctx.prunable)))

    def _propose(self, ctx: SelectContext, metric: Tensor) -> Proposal:
        places = ctx.places
        size = ctx.scratch["size"].gather(1, places)
        best, partner = pairs(metric)
        second = torch.arange(metric.shape[1], device=metric.device) % 2 == 1

        def merge(chosen: Tensor) -> Tensor:
            own = torch.arange(metric.shape[1], device=metric.device).expand_as(partner)
            kept = torch.zeros_like(second.expand_as(partner)).scatter(1, chosen, True)
            destination = torch.where(kept, own, partner)
            total = torch.zeros_like(size).scatter_add(1, destination, size)
            ctx.scratch["size"] = ctx.scratch["size"].scatter(1, places, total)
            return into(destination, size, chosen)

        return Proposal(score=-best, protect=second.expand_as(partner), merge=merge)


def pairs(metric: Tensor) -> tuple[Tensor, Tensor]:
    """For tokens `[B, P, D]` dealt alternately: cosine with the most similar one of the other half, and which it is.

    Those of the second half, and all where there is no second half, count as alike to nothing and their own partner.
    """
    n = metric.shape[1]
    own = torch.arange(n, device=metric.device)
    second = own % 2 == 1
    alike = likeness(metric).masked_fill(~second, -torch.inf)
    best, partner = alike.max(2)
    alone = second | torch.isinf(best)
    return best.masked_fill(alone, -2.0), torch.where(alone, own, partner)
