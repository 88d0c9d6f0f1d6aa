"""The weights of the body that OpenVLA and OpenVLA-OFT share: one or two towers, projector and a Llama decoder.

Parameter names are those of the released checkpoints, so a state dict loads without a key map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tokenprune.compat import mend_torchvision
from tokenprune.model.decoder import Decoder
from tokenprune_adapters.backbones.prismatic.config import TOWERS, PrismaticConfig
from tokenprune_adapters.backbones.prismatic.image_transform import ImageTransform
from tokenprune_adapters.vision.attention import AttentionCapture
from tokenprune_adapters.vision.transformer import VisionTower, ViTConfig


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
        capture: AttentionCapture | None = None,
    ) -> Tensor:
        """Features `[B, N, sum of widths]` of uint8 pixels `[B, 3, S, S]`, which are normalised for each tower.

        Towers with FiLM also take `language`, `[B, L]`; see `VisionTower.forward`.
        """
        features = []
        for index, tower in enumerate(self.children()):
            on_attention = None if capture is None else capture.callback(index)
            features.append(tower(transform.normalise(pixels, index, dtype), language, on_attention))
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
    """transformers' Llama modules under the checkpoint's prefix; `Decoder` runs them, their `forward` is not called."""

    def __init__(self, config: PrismaticConfig, lm_head: bool = False) -> None:
        """Build the modules, with `lm_head` also an output layer over the vocabulary; the caller loads the weights."""
        # Imported here, because it takes seconds, which `explain` and `validate` avoid; on the CPU, because the
        # caller builds on the meta device.
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
        # The decoder loop computes rotary angles itself, and this module's buffers are in no file.
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
