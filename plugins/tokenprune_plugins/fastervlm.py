"""FasterVLM (arXiv 2412.01818): keep the patches that the vision tower's class token attends to.

The score is the attention from the class token to each patch, mean over heads, at the block whose output is the
feature. Text is not looked at, so what is kept is the same for every instruction. OpenVLA's DINOv2 has a class token;
where no tower has one (pi0's SigLIP), the attention a patch gets from all tokens takes its place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Keep, SelectContext, StageNeeds
from tokenprune_plugins.shared.bases import Scored


class FasterVLMConfig(CutConfig):
    """How many patches stay, and whose attention counts."""

    keep: Keep = 0.25
    attention: Literal["auto", "cls", "received"] = Field(
        default="auto", description="From the class token or from all tokens; auto: the former where there is one."
    )


class FasterVLM(Scored[FasterVLMConfig]):
    """Keeps what the vision tower itself finds important."""

    Config = FasterVLMConfig

    def bind(self, info: BackboneInfo) -> None:
        """Choose the attention."""
        self._kind = self._attention(info)

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """One kind of the towers' attention."""
        return replace(super().requirements(info), encoder_attention=(self._attention(info),))

    def _attention(self, info: BackboneInfo) -> str:
        if self.config.attention != "auto":
            return self.config.attention
        return "cls" if "cls" in info.encoder_attention else "received"

    def caveats(self, info: BackboneInfo) -> str:
        """Which attention this is."""
        if self._attention(info) == "cls":
            return "attention of the vision tower's class token"
        return "attention from all tokens of the vision tower" + (
            ", which has no class token" if "cls" not in info.encoder_attention else ""
        )

    def score(self, ctx: SelectContext) -> Tensor:
        """What the tower attended to."""
        return ctx.encoder_attention(self._kind)
