"""Which attention of the vision towers scores patches: that of the class token, or that of all tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tokenprune import BackboneInfo

AttentionOrAuto = Annotated[
    Literal["auto", "cls", "received"],
    Field(
        description="Attention of the vision tower that scores patches: from its class token (`cls`) or from all its "
        "tokens (`received`); auto: `cls` where a tower has a class token.",
    ),
]


def attention_kind(attention: AttentionOrAuto, info: BackboneInfo, class_token: str = "cls") -> str:
    """Kind of encoder attention to request.

    Args:
        attention: The configured choice.
        info: The backbone; `auto` depends on the kinds that its towers offer.
        class_token: Kind that `cls` stands for in this strategy.
    """
    if attention == "auto":
        attention = "cls" if class_token in info.encoder_attention else "received"
    return class_token if attention == "cls" else attention


def attention_caveat(attention: AttentionOrAuto, info: BackboneInfo, class_token: str = "cls") -> str:
    """Text for `Stage.caveats`: which attention is read; arguments as for `attention_kind`."""
    if attention_kind(attention, info, class_token) == class_token:
        return "attention of the vision tower's class token"
    absent = "" if class_token in info.encoder_attention else ", which has no class token"
    return f"attention from all tokens of the vision tower{absent}"
