"""The body that OpenVLA and OpenVLA-OFT share, as sizes: towers, projector, decoder; no weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tokenprune.model.info import ActionSpec, DecoderShape
from tokenprune_adapters.vision.transformer import DINOV2_L_REG4_224, SIGLIP_SO400M_224, ViTConfig
from tokenprune_adapters.vision.transformer import flops as tower_flops
from tokenprune_adapters.vision.transformer import weights as tower_weights

TOWERS = ("featurizer", "fused_featurizer")
"""Names of the towers in the checkpoint, in the order in which their features are concatenated: DINOv2, SigLIP.

A tower alone has the first name, whichever it is.
"""

# LIBERO's robots are driven by robosuite's OSC_POSE controller, which scales its inputs to 5 cm and 0.5 rad.
LIBERO_ACTION = ActionSpec(
    horizon=1,
    groups={"translation": (0, 1, 2), "rotation": (3, 4, 5), "gripper": (6,)},
    gripper=(6, 0.5),
    metric={"translation": 0.05, "rotation": 0.5},
)

# The release's patches, from towers kept small beside a decoder that two CPU cores can run.
SMALL_TOWERS = (
    ViTConfig(
        image_size=224, patch_size=14, hidden_size=192, depth=4, heads=3, mlp_size=768,
        registers=4, cls=True, layer_scale=True, gelu="exact", tap=2,
    ),
    ViTConfig(
        image_size=224, patch_size=14, hidden_size=192, depth=4, heads=3, mlp_size=768,
        registers=0, cls=False, layer_scale=False, gelu="exact", tap=2,
    ),
)  # fmt: skip

# 4 x 4 patches in no time.
TINY_TOWERS = (
    ViTConfig(
        image_size=56, patch_size=14, hidden_size=24, depth=3, heads=3, mlp_size=48,
        registers=4, cls=True, layer_scale=True, gelu="exact", tap=1,
    ),
    ViTConfig(
        image_size=56, patch_size=14, hidden_size=16, depth=3, heads=2, mlp_size=32,
        registers=0, cls=False, layer_scale=False, gelu="exact", tap=1,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class PrismaticConfig:
    """Dimensions of the body.

    Attributes:
        towers: DINOv2's first, then SigLIP's; or one of them.
        decoder: The decoder's shape.
        vocab: Rows of the embedding table.
        max_positions: Longest sequence the decoder was made for.
        eps: Epsilon of the decoder's norms; 1e-6 in the releases, whose config leaves it to Llama's default.
        rope_theta: Base of the rotary frequencies.
    """

    towers: tuple[ViTConfig, ...]
    decoder: DecoderShape
    vocab: int
    max_positions: int = 2048
    eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def vision_width(self) -> int:
        """Channels of the features of all towers."""
        return sum(tower.hidden_size for tower in self.towers)

    @property
    def projector_widths(self) -> tuple[int, ...]:
        """Channels before, between and behind the projector's linear layers: three for fused towers, two for one."""
        vision, width = self.vision_width, self.decoder.hidden
        return (vision, 4 * vision, width, width) if len(self.towers) > 1 else (vision, width, width)

    def vision_weights(self) -> dict[str, int]:
        """Numbers in the matrices of towers and projector, which a query reads once."""
        projector = sum(before * behind for before, behind in pairwise(self.projector_widths))
        return {"vision": sum(tower_weights(tower) for tower in self.towers), "projector": projector}

    def vision_flops(self, views: int) -> dict[str, int]:
        """FLOPs of towers and projector per query."""
        rows, cols = self.towers[0].grid
        projector = 2 * rows * cols * sum(before * behind for before, behind in pairwise(self.projector_widths))
        return {"vision": views * sum(tower_flops(tower) for tower in self.towers), "projector": views * projector}


def body_of(size: Literal["7b", "small", "tiny"], causal: bool) -> PrismaticConfig:
    """The body of a preset: the release's; its tokens through a small decoder; or one for checks of what runs where.

    Two CPU cores run `small` in about a second; its towers are small beside its decoder, as in the release.
    """
    if size == "7b":
        shape = DecoderShape(depth=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, causal=causal)
        return PrismaticConfig((DINOV2_L_REG4_224, SIGLIP_SO400M_224), shape, vocab=32064)
    if size == "small":
        shape = DecoderShape(depth=8, hidden=1024, heads=16, kv_heads=16, head_dim=64, mlp=2560, causal=causal)
        return PrismaticConfig(SMALL_TOWERS, shape, vocab=2048)
    shape = DecoderShape(depth=8, hidden=32, heads=4, kv_heads=4, head_dim=8, mlp=48, causal=causal)
    return PrismaticConfig(TINY_TOWERS, shape, vocab=2048)


def lm_head_flops(horizon: int, dims: int, width: int, vocab: int) -> int:
    """FLOPs of the logits over the whole vocabulary at one row per number of the chunk."""
    return 2 * horizon * dims * width * vocab
