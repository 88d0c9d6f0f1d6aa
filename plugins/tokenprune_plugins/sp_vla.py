"""SP-VLA's token pruning (arXiv 2506.12723): keep edges, and fewer other patches the faster the arm moves vertically.

In each view the most attended patches stay that together hold a share of the view's attention. The share depends on
the vertical part of the last executed action, without its sign: below `rise` it is 1, so all patches stay; from there
it falls linearly, to 1 - `given_up` at a speed of 1 and above. The action is the commanded one, in its own units; in
LIBERO these lie between -1 and 1. Before the first action all patches stay. A patch in which Canny's detector finds an
edge always stays. The number of kept patches is known only during the query; `bucket` rounds it up.

The attention is what a patch gets from all tokens of the vision tower, mean over heads and queries, at the block whose
output is the feature; with two towers it is SigLIP's, as in the released code. Edges are found in the cropped picture
that the policy receives. The defaults are the released code's for LIBERO-Spatial. The method's other half, the
scheduler that answers queries without the model, is `sp_vla.scheduler`; the pipeline `sp_vla-scheduled` has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tokenprune import UNION, BackboneInfo, CutConfig, Keep, Proposal, SelectContext, Slot, StageNeeds
from tokenprune_plugins.shared.action_dims import three_dims
from tokenprune_plugins.shared.bases import AnyLayerStage
from tokenprune_plugins.shared.canny import canny


class SPVLAConfig(CutConfig):
    """How the kept share of the attention depends on vertical speed, and which edges always stay."""

    keep: Keep = UNION
    rise: float = Field(
        default=0.5, ge=0, lt=1, description="Vertical speed, in the action's own units, from which patches leave."
    )
    given_up: float = Field(
        default=0.9, ge=0, le=1, description="Share of the attention that leaves at a vertical speed of 1 or more."
    )
    edges: tuple[int, int] = Field(
        default=(100, 200), description="Canny's lower and upper threshold, for gradient magnitudes from 0 to 2040."
    )

    @field_validator("edges")
    @classmethod
    def _in_order(cls, edges: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= edges[0] <= edges[1]:
            raise ValueError(f"the lower threshold comes first and is at least 0, got {list(edges)}")
        return edges


class SPVLA(AnyLayerStage[SPVLAConfig]):
    """Keeps patches with edges, and patches that hold a share of the vision tower's attention."""

    Config = SPVLAConfig

    def bind(self, info: BackboneInfo) -> None:
        """Look up the vertical dimension of the action.

        Raises:
            ValueError: If the actions have no translation of three numbers.
        """
        self._vertical = three_dims(info, "translation")[2]

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, and the attention that patches get from all tokens of the vision tower."""
        return replace(super().requirements(info), encoder_attention=("received",))

    def host_state(self, slot: Slot) -> float:
        """The vertical speed, which seldom repeats."""
        return self._speed(slot)

    def caveats(self, info: BackboneInfo) -> str:
        """Units of the vertical speed."""
        return "vertical speed in the action's own units"

    def propose(self, ctx: SelectContext) -> Proposal:
        """Protect the patches that hold the share of the attention, and patches with edges."""
        attention = ctx.encoder_attention("received")
        share = self._kept_shares(ctx.slots, attention.device)
        attended = torch.zeros_like(ctx.prunable, dtype=torch.bool)
        for view in ctx.layout.views:
            attended = attended | top_p(attention, ctx.in_view(view), share)
        edge = has_edge(ctx, *self.config.edges)
        return Proposal(score=attention, protect=attended | edge, reasons={"attended": attended, "edge": edge})

    def _kept_shares(self, slots: Sequence[Slot], device: torch.device) -> Tensor:
        """Share of the attention that stays in each batch row `[B]`."""
        shares = [kept_share(self._speed(slot), self.config.rise, self.config.given_up) for slot in slots]
        return torch.stack([torch.full((), share, dtype=torch.float64, device=device) for share in shares])

    def _speed(self, slot: Slot) -> float:
        return abs(float(slot.executed[-1].action[self._vertical])) if slot.executed else 0.0


def kept_share(speed: float, rise: float, given_up: float) -> float:
    """Share of the attention that stays at a vertical speed."""
    return 1.0 if speed < rise else 1 - (min(speed, 1.0) - rise) * given_up / (1 - rise)


def top_p(attention: Tensor, member: Tensor, share: Tensor) -> Tensor:
    """The most attended members that together hold a share of the members' attention, boolean `[B, P]`.

    The last of them is the one with which the sum reaches the share, and the first always stays. At a share of 1 all
    members stay, whatever rounding does to the sums.

    Args:
        attention: Attention that each token gets `[B, P]`; of equal ones the lower index comes first.
        member: Tokens to choose from, boolean `[B, P]`.
        share: Share to hold in each batch row `[B]`.
    """
    inside = attention.double().masked_fill(~member, -torch.inf)
    order = inside.argsort(dim=1, descending=True, stable=True)
    sums = inside.gather(1, order).clamp(min=0).cumsum(1)
    short = sums < share[:, None] * sums[:, -1:]
    stays = torch.cat([torch.ones_like(short[:, :1]), short[:, :-1]], 1) | (share[:, None] >= 1)
    return torch.zeros_like(member).scatter(1, order, stays) & member


def has_edge(ctx: SelectContext, low: int, high: int) -> Tensor:
    """Held patches that contain an edge pixel, boolean `[B, P]`; none in a view whose patches form no grid."""
    found = torch.zeros(len(ctx.prunable), ctx.layout.n_tokens, dtype=torch.bool, device=ctx.prunable.device)
    grids = [(view, segment.span, segment.grid) for view, segment in ctx.layout.views.items() if segment.grid]
    if grids:
        edges = canny(torch.cat([ctx.images[view] for view, _, _ in grids]), low, high).chunk(len(grids))
        for (_, span, (rows, cols)), one in zip(grids, edges, strict=True):
            patches = one.unflatten(1, (rows, -1)).unflatten(3, (cols, -1)).any(4).any(2)
            found[:, span.start : span.stop] = patches.flatten(1)
    return found.gather(1, ctx.prunable)
