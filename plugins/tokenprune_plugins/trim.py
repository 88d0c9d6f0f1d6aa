"""TRIM (arXiv 2409.10994): keep the patches that CLIP relates to the instruction, and the mean of the others.

The similarity of a patch is the product of its feature from CLIP's image tower, after the tower's last norm and the
visual projection, with the text embedding of the instruction. The score is the softmax over the patches of one picture.
The best patches stay, and one more token: the mean of all that leave. In CLIP, patches of the background are *more*
similar to the text than patches of the objects it names, so the released code takes the softmax of the negated
similarity: `similarity: negated`, the default; `direct` follows the paper's formula. As in the released code, patches
and text are not scaled to length 1; as in LLaVA, the feature is the output of the second-to-last block.

`keep: union` keeps as many patches as the released code: the outliers of each picture's scores, above
Q3 + 1.5 (Q3 - Q1), and the mean. The released code appends the mean at the end; here it takes the place and position of
the next best patch, so K kept tokens are K - 1 patches and the mean of all others. It is one mean over all views, taken
behind the projector. The paper uses the CLIP that is the model's own vision tower. A VLA's vision tower is fine-tuned
and no longer matches CLIP's text tower, so here a separate CLIP runs beside the policy, counted in FLOPs and time; its
text tower runs once for each instruction. Its grid is interpolated to the policy's. The paper trains the model on the
reduced tokens; here nothing is trained.
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
    """Which CLIP scores patches, and how many tokens stay, including the mean."""

    keep: Keep = 0.25
    model: str = Field(
        default="ViT-L-14-336-quickgelu",
        description="CLIP model: a ViT of open_clip, or the path of its config (.json); the default is the paper's.",
    )
    checkpoint: str | None = Field(
        default=None,
        description="Weights of the CLIP: a file, a pretrained tag of open_clip such as 'openai', or 'hf-hub:NAME', "
        "which brings its own model. Must be given.",
    )
    similarity: Literal["negated", "direct"] = Field(
        default="negated",
        description="negated: the least similar patches stay, as in the released code; direct: the most similar ones.",
    )
    aggregate: bool = Field(default=True, description="Whether one of the kept tokens is the mean of all that leave.")
    layer: int = Field(
        default=-2,
        lt=0,
        description="Block of CLIP's image tower whose output is read, counted from the end; -1 is the last.",
    )


class TRIM(Stage[TRIMConfig]):
    """Keeps the patches that a CLIP relates to the instruction, and merges the rest into one token."""

    Config = TRIMConfig
    _clip: Clip

    def bind(self, info: BackboneInfo) -> None:
        """Load the CLIP, so that a wrong model or checkpoint is refused before the first query.

        Raises:
            MissingError: If no checkpoint is configured, or open_clip is not installed.
            ValueError: If model and checkpoint cannot be loaded.
        """
        if self.config.checkpoint is None:
            raise MissingError(
                "checkpoint: patches are compared with the instruction by a CLIP, and no CLIP comes with tokenprune; "
                "give its weights: a file, a tag of open_clip's such as openai, or hf-hub:NAME"
            )
        self._clip = load(self.config.model, self.config.checkpoint, self.config.layer)

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cut before layer 0; with `aggregate`, tokens that leave are merged."""
        removal = Removal.MERGE if self.config.aggregate else Removal.DROP
        return replace(super().requirements(info), removal=removal)

    def host_state(self, slot: Slot) -> str:
        """The instruction, whose text embedding is cached on the host."""
        return slot.instruction

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the image tower for all views; the text tower, which runs once for each instruction, is left out."""
        return len(plan.layout.views) * self._clip.flops

    def caveats(self, info: BackboneInfo) -> str:
        """Cost of the CLIP that runs beside the policy."""
        return (
            f"a CLIP runs beside the policy: {self._clip.flops / 1e9:.4g} GFLOP for each view in every query, counted "
            "among the probes; its text tower runs once for each instruction and is counted in the time only"
        )

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Score patches by CLIP; the lowest-ranked kept token becomes the mean of all that leave."""
        self._clip.move_to(ctx.hidden)
        score, outlier = self._scores(ctx)
        protect = None
        if self.config.budget(ctx.mode, -1).amount == UNION:
            # An outlier of one picture may score below an ordinary patch of another picture.
            score = score + outlier
            mean = int(self.config.aggregate)
            protect = rank_within(score) < outlier.sum(1, keepdim=True) + mean
        if not self.config.aggregate:
            return Proposal(score=score, protect=protect)
        return Proposal(score=score, protect=protect, merge=lambda chosen: mean_weights(score, chosen))

    def _scores(self, ctx: SelectContext) -> tuple[Tensor, Tensor]:
        """Score of each prunable token held now, float64 `[B, P]`, and whether it is an outlier of its picture."""
        texts = torch.stack([self._clip.embed_text(instruction) for instruction in ctx.instructions])
        views = ctx.layout.views
        scores = torch.zeros(len(texts), ctx.layout.n_tokens, dtype=torch.float64, device=texts.device)
        outlier = torch.zeros_like(scores, dtype=torch.bool)
        features = self._clip.embed_patches([ctx.images[view] for view in views])
        for (view, segment), patches in zip(views.items(), features, strict=True):
            if segment.grid is None:
                raise ValueError(
                    f"the patches of view '{view}' form no grid, to which CLIP's patches could be interpolated; "
                    "use a backbone whose views have grids"
                )
            similarity = (patches @ texts[..., None])[..., 0]
            similarity = resample_grid(similarity, self._clip.grid, segment.grid).double()
            own = torch.softmax(-similarity if self.config.similarity == "negated" else similarity, dim=1)
            scores[:, segment.start : segment.start + segment.length] = own
            outlier[:, segment.start : segment.start + segment.length] = upper_outliers(own)
        return scores.gather(1, ctx.prunable), outlier.gather(1, ctx.prunable)


def resample_grid(values: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Values of patches `[B, rows * cols]`, interpolated bilinearly to the rows and columns of a target grid."""
    if grid == target:
        return values
    return interpolate(values.view(-1, 1, *grid), target, mode="bilinear", antialias=True).flatten(1)


def upper_outliers(scores: Tensor) -> Tensor:
    """Which scores `[B, N]` exceed Q3 + 1.5 (Q3 - Q1) of their batch row, boolean `[B, N]`."""
    low, high = (torch.quantile(scores, share, dim=1, keepdim=True) for share in (0.25, 0.75))
    return scores > high + 1.5 * (high - low)


def mean_weights(score: Tensor, chosen: Tensor) -> Tensor:
    """Weights `[B, K, P]`: kept tokens stay, but the lowest-ranked one becomes the mean of itself and all that leave.

    Args:
        score: Scores `[B, P]`; of equal ones the lower index ranks first.
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
