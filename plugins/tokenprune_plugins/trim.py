"""TRIM (arXiv 2409.10994): keep the patches that a CLIP finds related to the instruction, and the mean of the others.

A patch's feature in CLIP's image tower goes through the tower's last norm and the visual projection, and its product
with the text embedding of the instruction is its similarity. The softmax over the patches of one picture is the score;
the best stay, and one token more, the mean of all that leave. CLIP's patches of the background are *more* similar to
the text than those of what it names, and the released code takes the softmax of the negated similarity:
`similarity: negated`, the default; `direct` is what the formula in words says. Neither the patches nor the text are
scaled to length 1 first, as in the released code; the feature is the output of the last block but one, as LLaVA's.

`keep: union` is the release's own count, as many as are outliers of their picture's scores, above Q3 + 1.5 (Q3 - Q1),
and the mean. In place of a token appended at the end, the mean takes the place and position of the patch that comes
next, so K kept tokens are K - 1 patches and the mean of all others; it is the mean behind the projector, and one over
all views. The paper's CLIP is the policy's own vision tower. A VLA's tower has been fine-tuned away from CLIP's text
tower, so here a CLIP of its own runs beside the policy, counted in FLOPs and time; its text tower runs once for each
instruction. Its grid is interpolated to the policy's. The paper trains with the tokens left out; here nothing is
trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from tokenprune import (
    UNION,
    BackboneInfo,
    CutConfig,
    Keep,
    MissingError,
    Plan,
    Proposal,
    Removal,
    SelectContext,
    Slot,
    Stage,
    StageNeeds,
    hookimpl,
)
from tokenprune_plugins.shared.clip import Clip, load
from tokenprune_plugins.shared.ranks import rank_within


class TRIMConfig(CutConfig):
    """Which CLIP, and how many tokens stay, the mean among them."""

    keep: Keep = 0.25
    model: str = Field(
        default="ViT-L-14-336-quickgelu",
        description="A ViT that open_clip knows, or the path of its description (.json); the default is the paper's.",
    )
    checkpoint: str | None = Field(
        default=None,
        description="The CLIP's weights: a file, a tag of open_clip's such as 'openai', or 'hf-hub:NAME', which brings "
        "its own model. Must be given.",
    )
    similarity: Literal["negated", "direct"] = Field(
        default="negated", description="Whether the least similar patches stay, as in the released code, or the most."
    )
    aggregate: bool = Field(default=True, description="Whether one of the kept tokens is the mean of all that leave.")
    layer: int = Field(
        default=-2, lt=0, description="Block of CLIP whose output is read, counted from the end; -1 is the last."
    )


class TRIM(Stage[TRIMConfig]):
    """Keeps what a CLIP relates to the instruction, and folds the rest into one token."""

    Config = TRIMConfig
    _clip: Clip

    def bind(self, info: BackboneInfo) -> None:
        """Read the CLIP, so that what does not fit is refused before the first query."""
        if self.config.checkpoint is None:
            raise MissingError(
                "checkpoint: patches are compared with the instruction by a CLIP, and no CLIP comes with tokenprune; "
                "give its weights: a file, a tag of open_clip's such as openai, or hf-hub:NAME"
            )
        self._clip = load(self.config.model, self.config.checkpoint, self.config.layer)

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """What leaves is averaged, if the mean is wanted."""
        removal = Removal.MERGE if self.config.aggregate else Removal.DROP
        return replace(super().requirements(info), removal=removal)

    def host_state(self, slot: Slot) -> str:
        """The instruction, whose embedding is looked up."""
        return slot.instruction

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """The image tower, once a view; the text tower is spared while the instruction stays the same."""
        return len(plan.layout.views) * self._clip.flops

    def caveats(self, info: BackboneInfo) -> str:
        """What runs beside the policy."""
        return (
            f"a CLIP runs beside the policy: {self._clip.flops / 1e9:.4g} GFLOP a view in every query, counted among "
            "the probes; its text tower runs once for each instruction and is counted in the time only"
        )

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """The best patches, and one to become the mean."""
        self._clip.follow(ctx.hidden)
        score, outlier = self._scores(ctx)
        protect = None
        if self.config.budget(ctx.mode, -1).amount == UNION:
            # Outliers of one picture may score below patches of another that are none.
            score = score + outlier
            more = int(self.config.aggregate)
            protect = rank_within(score) < outlier.sum(1, keepdim=True) + more
        if not self.config.aggregate:
            return Proposal(score=score, protect=protect)
        return Proposal(score=score, protect=protect, merge=lambda chosen: aggregated(score, chosen))

    def _scores(self, ctx: SelectContext) -> tuple[Tensor, Tensor]:
        """Score of each prunable token held now `[B, P]`, float64, and whether it is an outlier of its picture."""
        texts = torch.stack([self._clip.text(instruction) for instruction in ctx.instructions])
        views = ctx.layout.views
        scores = torch.zeros(len(texts), ctx.layout.n_tokens, dtype=torch.float64, device=texts.device)
        outlier = torch.zeros_like(scores, dtype=torch.bool)
        features = self._clip.patches([ctx.images[view] for view in views])
        for (view, segment), patches in zip(views.items(), features, strict=True):
            if segment.grid is None:
                raise ValueError(f"view '{view}' has no grid of patches that CLIP's could be laid over")
            similarity = (patches @ texts[..., None])[..., 0]
            spread = regridded(similarity, self._clip.grid, segment.grid).double()
            own = torch.softmax(-spread if self.config.similarity == "negated" else spread, dim=1)
            scores[:, segment.start : segment.start + segment.length] = own
            outlier[:, segment.start : segment.start + segment.length] = above_quartiles(own)
        return scores.gather(1, ctx.prunable), outlier.gather(1, ctx.prunable)


def regridded(values: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Values of patches `[B, rows * cols]` at another grid, bilinear; as they are where it is the same."""
    if grid == wanted:
        return values
    return interpolate(values.view(-1, 1, *grid), wanted, mode="bilinear", antialias=True).flatten(1)


def above_quartiles(scores: Tensor) -> Tensor:
    """Which of `[B, N]` are upper outliers of their row: above Q3 + 1.5 (Q3 - Q1)."""
    low, high = (torch.quantile(scores, share, dim=1, keepdim=True) for share in (0.25, 0.75))
    return scores > high + 1.5 * (high - low)


def aggregated(score: Tensor, chosen: Tensor) -> Tensor:
    """Weights `[B, K, P]`: kept tokens as they are, but the last of them in rank is the mean of it and all that leave.

    Args:
        score: Scores `[B, P]`; of equals the lower index ranks first.
        chosen: Kept tokens `[B, K]`.
    """
    n = score.shape[1]
    own = one_hot(chosen, n).to(score.dtype)
    if not chosen.shape[1]:
        return own
    last = rank_within(score).gather(1, chosen).argmax(1, keepdim=True)
    becomes_mean = one_hot(last[:, 0], chosen.shape[1])[..., None].to(score.dtype)
    rest = 1 - ((1 - becomes_mean) * own).sum(1, keepdim=True)
    return torch.where(becomes_mean > 0, rest / rest.sum(2, keepdim=True), own)
