"""SP-VLA's token pruning (arXiv 2506.12723): fewer patches the faster the arm moves up or down, and every edge.

Of each view the patches that the vision tower attends to most stay, until what they get reaches a share of what all of
the view get. That share is 1, so that all stay, while the vertical part of the last executed action is below `rise`;
from there it falls in a straight line to 1 - `given_up` at 1 and beyond. The action is the one commanded, in its own
units and regardless of sign; in LIBERO these lie between -1 and 1. Before the first action all stay. A patch in which
Canny's detector finds an edge always stays. How many stay is known only during the query; `bucket` rounds it up.

The attention is what a patch gets from all tokens, mean over heads and queries, at the block whose output is the
feature; of two towers it is SigLIP's, as in the released code. Edges are those of the cropped picture that the policy
sees. The defaults are the released code's for LIBERO-Spatial. The method's other half, the scheduler that goes on
without the model, is `sp_vla.scheduler`; the pipeline `sp_vla-scheduled` has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tokenprune import UNION, BackboneInfo, CutConfig, Keep, Proposal, SelectContext, Slot, StageNeeds
from tokenprune_plugins.shared.bases import Anywhere
from tokenprune_plugins.shared.canny import canny


class SPVLAConfig(CutConfig):
    """When patches are given up, and which edges always stay."""

    keep: Keep = UNION
    rise: float = Field(default=0.5, ge=0, lt=1, description="Vertical part of an action from which patches leave.")
    given_up: float = Field(
        default=0.9, ge=0, le=1, description="Share of the attention that is given up where that part is 1 or more."
    )
    edges: tuple[int, int] = Field(
        default=(100, 200), description="Canny's lower and upper threshold, of strengths from 0 to 2040."
    )

    @field_validator("edges")
    @classmethod
    def _in_order(cls, edges: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= edges[0] <= edges[1]:
            raise ValueError(f"the lower threshold comes first and is at least 0, got {list(edges)}")
        return edges


class SPVLA(Anywhere[SPVLAConfig]):
    """Keeps edges, and patches that hold a share of the vision tower's attention, a smaller one in vertical motion."""

    Config = SPVLAConfig

    def bind(self, info: BackboneInfo) -> None:
        """Find the vertical dimension among the actions.

        Raises:
            ValueError: If the actions have no translation of three numbers.
        """
        translation = info.action.groups.get("translation", ())
        if len(translation) != 3:
            raise ValueError(
                "it needs actions with a translation of three numbers; "
                f"'{info.name}' moves {', '.join(f'{n} {list(d)}' for n, d in info.action.groups.items())}"
            )
        self._vertical = translation[2]

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The attention that patches get from all tokens of the towers."""
        return replace(super().requirements(info), encoder_attention=("received",))

    def host_state(self, slot: Slot) -> float:
        """The vertical speed; it is seldom the same again."""
        return self._speed(slot)

    def caveats(self, info: BackboneInfo) -> str:
        """What the speed is measured in."""
        return "vertical speed in the action's own units"

    def propose(self, ctx: SelectContext) -> Proposal:
        """What holds its share of the attention, and edges."""
        attention = ctx.encoder_attention("received")
        share = self._shares(ctx.slots, attention.device)
        attended = torch.zeros_like(ctx.prunable, dtype=torch.bool)
        for view in ctx.layout.views:
            attended = attended | holding(attention, ctx.in_view(view), share)
        edge = on_edges(ctx, *self.config.edges)
        return Proposal(score=attention, protect=attended | edge, reasons={"attended": attended, "edge": edge})

    def _shares(self, slots: Sequence[Slot], device: torch.device) -> Tensor:
        """Share of the attention that stays in each environment `[B]`."""
        shares = [share_at(self._speed(slot), self.config.rise, self.config.given_up) for slot in slots]
        return torch.stack([torch.full((), share, dtype=torch.float64, device=device) for share in shares])

    def _speed(self, slot: Slot) -> float:
        return abs(float(slot.executed[-1].action[self._vertical])) if slot.executed else 0.0


def share_at(speed: float, rise: float, given_up: float) -> float:
    """Share of the attention that stays at a vertical speed."""
    return 1.0 if speed < rise else 1 - (min(speed, 1.0) - rise) * given_up / (1 - rise)


def holding(attention: Tensor, member: Tensor, share: Tensor) -> Tensor:
    """The most attended members that together hold a share of the members' attention, boolean `[B, P]`.

    A member stays while those before it hold less, so the last of them reaches the share, and the first always stays;
    at 1 all stay, whatever sums are rounded to.

    Args:
        attention: What each token gets `[B, P]`; of equals the lower index comes first.
        member: Which are counted `[B, P]`.
        share: `[B]`.
    """
    inside = attention.double().masked_fill(~member, -torch.inf)
    order = inside.argsort(dim=1, descending=True, stable=True)
    sums = inside.gather(1, order).clamp(min=0).cumsum(1)
    short = sums < share[:, None] * sums[:, -1:]
    stays = torch.cat([torch.ones_like(short[:, :1]), short[:, :-1]], 1) | (share[:, None] >= 1)
    return torch.zeros_like(member).scatter(1, order, stays) & member


def on_edges(ctx: SelectContext, low: int, high: int) -> Tensor:
    """Held patches that contain an edge pixel, boolean `[B, P]`; none in a view whose patches form no grid."""
    found = torch.zeros(len(ctx.prunable), ctx.layout.n_tokens, dtype=torch.bool, device=ctx.prunable.device)
    grids = [(view, segment.span, segment.grid) for view, segment in ctx.layout.views.items() if segment.grid]
    if grids:
        edges = canny(torch.cat([ctx.images[view] for view, _, _ in grids]), low, high).chunk(len(grids))
        for (_, span, (rows, cols)), one in zip(grids, edges, strict=True):
            patches = one.unflatten(1, (rows, -1)).unflatten(3, (cols, -1)).any(4).any(2)
            found[:, span.start : span.stop] = patches.flatten(1)
    return found.gather(1, ctx.prunable)
