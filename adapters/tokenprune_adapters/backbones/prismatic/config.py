"""Sizes of the body that OpenVLA and OpenVLA-OFT share: towers, projector, decoder; no weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tokenprune.model.info import DecoderShape
from tokenprune_adapters.vision.transformer import DINOV2_L_REG4_224, SIGLIP_SO400M_224, ViTConfig
from tokenprune_adapters.vision.transformer import flops as tower_flops
from tokenprune_adapters.vision.transformer import weights as tower_weights

TOWERS = ("featurizer", "fused_featurizer")
"""Names of the towers in the checkpoint, in the order in which their features are concatenated: DINOv2, SigLIP.

A single tower has the first name, DINOv2 or SigLIP.
"""

# As many patches as the release; the towers are small beside the small decoder, in the release's proportions.
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

# 4 x 4 patches, for fast checks.
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
        towers: DINOv2, then SigLIP; or one of them.
        decoder: The decoder's shape.
        vocab: Rows of the embedding table.
        max_positions: Longest sequence the decoder was trained for.
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
        """Channels of the concatenated features of all towers."""
        return sum(tower.hidden_size for tower in self.towers)

    @property
    def projector_widths(self) -> tuple[int, ...]:
        """Channels before and after each linear layer of the projector: three layers for two towers, two for one."""
        vision, width = self.vision_width, self.decoder.hidden
        return (vision, 4 * vision, width, width) if len(self.towers) > 1 else (vision, width, width)

    def vision_weights(self) -> dict[str, int]:
        """Numbers in the matrices of towers and projector, which a query reads once."""
        projector = sum(before * after for before, after in pairwise(self.projector_widths))
        return {"vision": sum(tower_weights(tower) for tower in self.towers), "projector": projector}

    def vision_flops(self, views: int) -> dict[str, int]:
        """FLOPs of towers and projector per query."""
        rows, cols = self.towers[0].grid
        projector = 2 * rows * cols * sum(before * after for before, after in pairwise(self.projector_widths))
        return {"vision": views * sum(tower_flops(tower) for tower in self.towers), "projector": views * projector}


def preset_body(size: Literal["7b", "small", "tiny"], causal: bool) -> PrismaticConfig:
    """The body of a preset.

    `7b` has the release's sizes. `small` has its tokens and runs in about a second on two CPU cores. `tiny` is for
    fast checks.
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
    """FLOPs of the logits over the whole vocabulary, one row per number of the chunk."""
    return 2 * horizon * dims * width * vocab
