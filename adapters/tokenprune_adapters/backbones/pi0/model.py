"""The weights of pi0 and pi0.5, and the parts of the forward pass outside the decoder loop."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.compat import mend_torchvision
from tokenprune.model.decoder import Decoder
from tokenprune.model.info import DecoderShape
from tokenprune_adapters.backbones.pi0.config import PI0Config
from tokenprune_adapters.vision.transformer import VisionTower

_SHORTEST, _LONGEST = 4e-3, 4.0


class AdaptiveNorm(nn.Module):
    """RMS norm whose scale, shift and gate depend on a condition (upstream openpi, adaRMS); it has no weight."""

    def __init__(self, width: int, condition: int, eps: float) -> None:
        """Make the projection of the condition, which begins at zero like upstream's."""
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(condition, 3 * width)
        nn.init.zeros_(self.dense.weight)

    def forward(self, hidden: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise `[B, n, D]` under a condition `[B, C]`; also return the gate `[B, 1, D]` of the residual branch."""
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, dim=-1)
        variance = hidden.float().square().mean(-1, keepdim=True)
        normed = hidden * torch.rsqrt(variance + self.eps)
        # One plus a small scale needs at least float32, like upstream's.
        normed = normed * (1 + scale.to(normed.dtype)) + shift
        return normed.to(hidden.dtype), gate


class Gemma(nn.Module):
    """transformers' Gemma layers under the names of its `GemmaModel`, without a forward pass of their own.

    Args:
        shape: Dimensions.
        config: The policy, for the epsilon and the rotary base.
        vocab: Rows of the embedding table, None for no table.
        condition: Width of the condition of adaptive norms, None for plain ones.
    """

    def __init__(
        self, shape: DecoderShape, config: PI0Config, vocab: int | None = None, condition: int | None = None
    ) -> None:
        # Imported here, because it takes seconds, which `explain` and `validate` avoid; on the CPU, because the
        # caller builds on the meta device.
        with torch.device("cpu"):
            mend_torchvision()
            from transformers import GemmaConfig
            from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm

        super().__init__()
        gemma = GemmaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=config.eps,
        )
        self.shape, self.rope_theta = shape, config.rope_theta
        if vocab is not None:
            self.embed_tokens = nn.Embedding(vocab, shape.hidden)
        self.layers = nn.ModuleList(GemmaDecoderLayer(gemma, index) for index in range(shape.depth))
        self.norm: nn.Module = GemmaRMSNorm(shape.hidden, config.eps)
        if condition is not None:
            for layer in self.layers:
                layer.input_layernorm = AdaptiveNorm(shape.hidden, condition, config.eps)
                layer.post_attention_layernorm = AdaptiveNorm(shape.hidden, condition, config.eps)
            self.norm = AdaptiveNorm(shape.hidden, condition, config.eps)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings `[..., D]` of token ids with Gemma's scale, which image tokens do not have."""
        return functional.embedding(ids, self.embed_tokens.weight) * math.sqrt(self.shape.hidden)

    def decoder(self) -> Decoder:
        """The decoder loop over these modules."""
        return Decoder(
            list(self.layers), self.norm, head_dim=self.shape.head_dim, rope_theta=self.rope_theta, causal=False
        )


class PI0Model(nn.Module):
    """The weights; `vision`, `language` and `expert` are the parts of the release's `paligemma_with_expert`."""

    def __init__(self, config: PI0Config) -> None:
        """Build the modules; build on the meta device to take no memory."""
        super().__init__()
        width, numbers = config.expert.hidden, config.width
        adaptive = config.variant == "pi05"
        self.vision = VisionTower(config.tower)
        self.projector = nn.Linear(config.tower.hidden_size, config.decoder.hidden)
        self.language = Gemma(config.decoder, config, vocab=config.vocab)
        self.expert = Gemma(config.expert, config, condition=width if adaptive else None)
        self.action_in_proj = nn.Linear(numbers, width)
        self.action_out_proj = nn.Linear(width, numbers)
        if adaptive:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(numbers, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)

    @torch.no_grad()
    def rescale_untrained(self) -> None:
        """Adapt untrained weights to Gemma, which multiplies embeddings by the root of the width and norms by 1 + w."""
        self.language.embed_tokens.weight.mul_(self.language.shape.hidden**-0.5)
        for part in (self.language, self.expert):
            for name, parameter in part.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.zero_()

    def condition(self, time: Tensor) -> Tensor:
        """pi0.5: the condition of the expert's norms `[C]`, from a time embedding `[C]`."""
        return functional.silu(self.time_mlp_out(functional.silu(self.time_mlp_in(time))))

    def action_time_tokens(self, actions: Tensor, time: Tensor) -> Tensor:
        """pi0: the expert's tokens `[B, T, D]`, from embedded actions `[B, T, D]` and a time embedding `[D]`."""
        both = torch.cat([actions, time.expand_as(actions)], dim=-1)
        return cast(Tensor, self.action_time_mlp_out(functional.silu(self.action_time_mlp_in(both))))


def time_embeddings(steps: int, width: int) -> Tensor:
    """Sines and cosines `[steps, width]`, float64, of the times at which the flow is evaluated: from 1 down to 1/steps.

    Times are float32 numbers and everything else is float64, like upstream's (openpi, lerobot): the shortest period is
    so short that float32 would show in the actions.
    """
    times = torch.tensor([1 - step / steps for step in range(steps)], dtype=torch.float32).double()
    periods = _SHORTEST * (_LONGEST / _SHORTEST) ** torch.linspace(0, 1, width // 2, dtype=torch.float64)
    angles = times[:, None] * (2 * math.pi / periods)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
