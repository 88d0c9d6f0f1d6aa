"""The one decoder loop: transformers' weight-bearing leaf modules, torch SDPA, and cuts between layers.

It never calls transformers' own `forward`, cache or mask code, so tokens can leave between any two layers while
every kept token keeps its rotary position, and the attention kernel stays the fast one throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.kv import KVCache, LayerKV
from tokenprune.selection import TokenSelection

Positions = Literal["preserve", "compact"]


class Pruner(Protocol):
    """What the loop asks between layers."""

    positions: Positions

    def acts_after(self, layer: int) -> bool:
        """Whether anything happens after this layer; host only."""
        ...

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, k: Tensor
    ) -> tuple[Tensor, TokenSelection]:
        """Look at a layer and perhaps cut after it; returns what goes on."""
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a pass through the decoder leaves.

    Attributes:
        hidden: Normalised hidden states `[B, K, D]` of the tokens that reached the end.
        tokens: Which tokens those are.
        held: Tokens each layer really held.
    """

    hidden: Tensor
    tokens: TokenSelection
    held: tuple[int, ...]


class Decoder:
    """Decoder layers of a Llama-like model and how to run them.

    Args:
        layers: transformers decoder layers with `input_layernorm`, `self_attn.{q,k,v,o}_proj`,
            `post_attention_layernorm` and `mlp`.
        norm: The final norm.
        head_dim: Width of one attention head.
        rope_theta: Base of the rotary frequencies.
        causal: Whether a token sees only tokens up to itself; otherwise every token sees every token.
    """

    def __init__(
        self, layers: Sequence[nn.Module], norm: nn.Module, *, head_dim: int, rope_theta: float, causal: bool
    ) -> None:
        """Keep references; no weight is copied."""
        self.layers = layers
        self.norm = norm
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.causal = causal

    def run(
        self, hidden: Tensor, tokens: TokenSelection, pruner: Pruner | None = None, cache: KVCache | None = None
    ) -> Decoded:
        """Run every layer over `hidden` `[B, n, D]`, whose rows are the tokens `tokens`.

        With a cache, each layer also attends to what the cache holds for it, and its own keys and values are appended;
        the ids of new tokens must lie above the cached ones.

        Raises:
            ValueError: If several new tokens meet a filled cache in a causal decoder, which would need a mask, or if
                tokens are to be renumbered behind a cache, whose entries keep the positions they were made at.
        """
        continued = cache is not None and bool(cache.layers)
        if continued and self.causal and hidden.shape[1] > 1:
            raise ValueError(f"a causal decoder continues its cache one token at a time, not {hidden.shape[1]}")
        positions: Positions = "preserve" if pruner is None else pruner.positions
        if continued and positions == "compact":
            raise ValueError("positions: compact cannot continue a cache; use positions: preserve")
        cos, sin = rotary(tokens, positions, self.head_dim, self.rope_theta, hidden.dtype)
        held = []
        for index, layer in enumerate(self.layers):
            held.append(hidden.shape[1])
            q, k, v = project(layer, hidden, cos, sin, self.head_dim)
            keys, values = k, v
            if cache is not None:
                entry = cache.extend(index, LayerKV(k, v, tokens.ids))
                keys, values = entry.k, entry.v
            # Kept ids ascend, so the plain causal pattern stays right after any cut and no mask tensor is needed.
            mixed = F.scaled_dot_product_attention(
                q, keys, values, is_causal=self.causal and not continued, enable_gqa=q.shape[1] != k.shape[1]
            )
            hidden = finish(layer, hidden, mixed)
            if pruner is not None and pruner.acts_after(index):
                hidden, tokens = pruner.after_layer(index, hidden, tokens, q, k)
                cos, sin = rotary(tokens, positions, self.head_dim, self.rope_theta, hidden.dtype)
        return Decoded(self.norm(hidden), tokens, tuple(held))


def project(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    """Queries, keys and values `[B, heads, n, d]` of one layer, rotated."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, head_dim)
    q, k, v = (
        proj(normed).view(shape).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def finish(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:  # noqa: ANN401
    """The layer's output from its input `[B, n, D]` and its attention output `[B, H, n, d]`."""
    hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


def rotary(
    tokens: TokenSelection, positions: Positions, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, 1, n, d]` at the tokens' original ids, or renumbered from 0 where `positions` is compact.

    Computed in float32 whatever the dtype, as transformers does.
    """
    at = tokens.ids if positions == "preserve" else torch.arange(tokens.n_kept, device=tokens.ids.device)[None]
    exponent = torch.arange(0, head_dim, 2, device=at.device).float() / head_dim
    angles = at[..., None].float() * (1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[B, heads, n, d]`, halves paired as in Llama."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
