"""The Prismatic body that OpenVLA and OpenVLA-OFT share: one or two towers, projector and a Llama decoder.

Parameter names are those of the released checkpoints, so a state dict loads without a key map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from tokenprune.backbone import ActionSpec, DecoderShape
from tokenprune.decoder import Decoder
from tokenprune.torchvision_ops import mend_torchvision
from tokenprune_adapters.encoder_look import EncoderLook
from tokenprune_adapters.preprocess import ImageTransform
from tokenprune_adapters.vision import DINOV2_L_REG4_224, SIGLIP_SO400M_224, VisionTower, ViTConfig
from tokenprune_adapters.vision import flops as tower_flops
from tokenprune_adapters.vision import weights as tower_weights

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


class VisionBackbone(nn.Module):
    """The towers, side by side."""

    def __init__(self, towers: Sequence[ViTConfig]) -> None:
        """Make one tower per configuration, under the checkpoint's names."""
        super().__init__()
        for name, config in zip(TOWERS, towers, strict=False):
            self.add_module(name, VisionTower(config))

    def forward(
        self,
        pixels: Tensor,
        transform: ImageTransform,
        dtype: torch.dtype,
        language: Tensor | None = None,
        look: EncoderLook | None = None,
    ) -> Tensor:
        """Features `[B, N, sum of widths]` of uint8 pixels `[B, 3, S, S]`, normalised for each tower by itself.

        Towers with FiLM also take `language`, `[B, L]`; see `VisionTower.forward`.
        """
        features = [
            module(transform.normalise(pixels, tower, dtype), language, None if look is None else look.at(tower))
            for tower, module in enumerate(self.children())
        ]
        return torch.cat(features, dim=-1)


class Projector(nn.Module):
    """Patch features to the decoder's width, token by token."""

    def __init__(self, widths: Sequence[int]) -> None:
        """Two or three linear layers with exact GELUs between them; for `widths` see `projector_widths`."""
        super().__init__()
        self.fc1 = nn.Linear(widths[0], widths[1])
        self.fc2 = nn.Linear(widths[1], widths[2])
        self.fc3 = nn.Linear(widths[2], widths[3]) if len(widths) > 3 else None
        self.act = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        """Map `[..., vision_width]` to `[..., width]`."""
        projected = self.fc2(self.act(self.fc1(features)))
        return cast(Tensor, projected if self.fc3 is None else self.fc3(self.act(projected)))


class LanguageModel(nn.Module):
    """Holder of transformers' Llama modules under the checkpoint's prefix; its `forward` is never called."""

    def __init__(self, config: PrismaticConfig, lm_head: bool = False) -> None:
        """Build the modules, with an output layer over the vocabulary if asked for; the caller fills the weights."""
        # Here, because it takes seconds that `explain` and `validate` do not need; and not on the caller's meta device.
        with torch.device("cpu"):
            mend_torchvision()
            from transformers import LlamaConfig, LlamaModel

        super().__init__()
        shape = config.decoder
        self.model = LlamaModel(
            LlamaConfig(
                vocab_size=config.vocab,
                hidden_size=shape.hidden,
                intermediate_size=shape.mlp,
                num_hidden_layers=shape.depth,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                rms_norm_eps=config.eps,
                max_position_embeddings=config.max_positions,
            )
        )
        # The decoder loop computes rotary angles itself; this module's buffers are in no file.
        del self.model.rotary_emb
        if lm_head:
            self.lm_head = nn.Linear(shape.hidden, config.vocab, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings `[..., D]` of token ids."""
        return nn.functional.embedding(ids, self.model.embed_tokens.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores `[..., V]` of the next token, padding rows included, for hidden states `[..., D]`."""
        return cast(Tensor, self.lm_head(hidden))

    def decoder(self, config: PrismaticConfig) -> Decoder:
        """The decoder loop over these modules."""
        shape = config.decoder
        return Decoder(
            list(self.model.layers),
            self.model.norm,
            head_dim=shape.head_dim,
            rope_theta=config.rope_theta,
            causal=shape.causal,
        )


@torch.no_grad()
def fill_untrained(module: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on the meta device random weights.

    Matrices are scaled by the root of their inputs so that every part passes on signals of ordinary size; norms
    and layer scales are ones, biases zeros. The numbers are drawn in float32 on the device itself, one matrix after the
    other: they do not depend on the dtype, and next to the weights there is never more in memory than one matrix. They
    are no policy: whatever comes out is marked untrained.
    """
    # The type first, while nothing has memory yet.
    module.to(dtype)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if parameter.dim() < 2:
            parameter.fill_(0.0 if leaf == "bias" else 1.0)
            continue
        fan_in = 1 if "embed" in name and "proj" not in name else parameter[0].numel()
        values = torch.empty(parameter.shape, device=device).normal_(0.0, fan_in**-0.5, generator=generator)
        parameter.copy_(values)
