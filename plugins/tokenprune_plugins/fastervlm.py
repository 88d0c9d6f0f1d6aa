"""FasterVLM (arXiv 2412.01818): keep the patches that the vision tower's class token attends to most.

The score is the attention from the class token to each patch, mean over heads, at the block whose output is the
feature. Text is not used, so the kept patches are the same for every instruction. OpenVLA's DINOv2 has a class token.
Where no tower has one (pi0's SigLIP), the attention that a patch gets from all tokens is used instead.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Keep, SelectContext, StageNeeds
from tokenprune_plugins.shared.bases import ScoreStage
from tokenprune_plugins.shared.tower_attention import AttentionOrAuto, attention_caveat, attention_kind


class FasterVLMConfig(CutConfig):
    """How many patches stay, and which attention scores them."""

    keep: Keep = 0.25
    attention: AttentionOrAuto = "auto"


class FasterVLM(ScoreStage[FasterVLMConfig]):
    """Keeps the patches that the vision tower attends to most."""

    Config = FasterVLMConfig

    def bind(self, info: BackboneInfo) -> None:
        """Resolve which attention is read on this backbone."""
        self._kind = attention_kind(self.config.attention, info)

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, and the attention of the vision tower."""
        return replace(super().requirements(info), encoder_attention=(self._kind,))

    def caveats(self, info: BackboneInfo) -> str:
        """Which attention is read on this backbone."""
        return attention_caveat(self.config.attention, info)

    def score(self, ctx: SelectContext) -> Tensor:
        """Attention of the vision tower to each patch."""
        return ctx.encoder_attention(self._kind)
