"""Pruning in a decoder written out as a masked dense model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaModel

from tests.helpers.drawing import decoder_of, keep_sets
from tokenprune.model.decoder import Decoded
from tokenprune.model.kv_cache import KVCache, LayerKV
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.selection import OriginalIds, TokenSelection

NEVER = 10**6
Kept = list[list[int]]
"""Original ids kept, per batch row."""


@dataclass
class FakePruner:
    """Keeps the given original ids after the given layers."""

    keep: dict[int, Kept] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def acts_after(self, layer: int) -> bool:
        return layer in self.keep

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, seen: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        self.asked.append(layer)
        rows = []
        for row, kept in enumerate(self.keep[layer]):
            place = {token: at for at, token in enumerate(tokens.ids[row].tolist())}
            rows.append(torch.stack([hidden[row, place[token]] for token in kept]))
        return torch.stack(rows), TokenSelection(OriginalIds(torch.tensor(self.keep[layer])), tokens.n_source)


@dataclass
class Cuts:
    """Nested keep sets: `keep[-1]` before layer 0, `keep[l]` after layer l."""

    n: int
    batch: int
    keep: dict[int, Kept]

    def last_layer_that_sees(self) -> Tensor:
        """The last layer in which each token `[B, n]` is a key; NEVER for one that is never dropped."""
        last = torch.full((self.batch, self.n), NEVER)
        for layer in sorted(self.keep, reverse=True):
            for row, kept in enumerate(self.keep[layer]):
                gone = [token for token in range(self.n) if token not in kept]
                last[row, gone] = layer
        return last

    def survivors(self) -> Kept:
        return self.keep[max(self.keep)] if self.keep else [list(range(self.n))] * self.batch

    def run(
        self, model: LlamaModel, embeddings: Tensor, causal: bool, positions: Positions = Positions.PRESERVE,
        cache: KVCache | None = None,
    ) -> Decoded:  # fmt: skip
        first = self.keep.get(-1, [list(range(self.n))] * self.batch)
        hidden = torch.stack([embeddings[row, kept] for row, kept in enumerate(first)])
        tokens = TokenSelection(OriginalIds(torch.tensor(first)), self.n)
        later = {layer: kept for layer, kept in self.keep.items() if layer >= 0}
        return decoder_of(model, causal).run(hidden, tokens, FakePruner(later), cache, positions=positions)


@st.composite
def cuts(draw: st.DrawFn, depth: int, n: int, batch: int) -> Cuts:
    held, keep = [list(range(n))] * batch, {}
    for layer in sorted(draw(st.sets(st.integers(-1, depth - 2), max_size=depth))):
        keep[layer] = held = draw(keep_sets(held))
    return Cuts(n, batch, keep)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as complex numbers: component j is rotated by position / theta^(2j/d); the table is float32 in Llama."""
    half = x.shape[-1] // 2
    frequency = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) * 2 / x.shape[-1])
    angle = positions.to(torch.float32)[..., None] * frequency
    spin = torch.complex(torch.cos(angle).double(), torch.sin(angle).double())
    z = torch.complex(x[..., :half], x[..., half:]) * spin
    return torch.cat([z.real, z.imag], dim=-1)


def masked_dense(model: LlamaModel, x: Tensor, last: Tensor, sees: Tensor, renumber: bool = False) -> Tensor:
    """Every token through every layer, with an N x N additive mask that hides dropped tokens.

    `last` `[B, N]` is the last layer in which a token is a key, `sees` `[N, N]` the pattern without pruning. The row of
    a dropped token goes on seeing the token itself, so that it stays finite; nobody reads it.
    """
    config = model.config
    dim, theta = config.head_dim, config.rope_parameters["rope_theta"]
    n = x.shape[1]
    for index, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        alive = last >= index
        allowed = (sees & alive[:, None, :]) | torch.eye(n, dtype=torch.bool)
        mask = torch.where(allowed, 0.0, -math.inf).double()
        positions = torch.where(alive, alive.cumsum(1) - 1, 0) if renumber else torch.arange(n).expand(x.shape[:2])
        normed = rms_norm(x, layer.input_layernorm.weight)
        q, k, v = (normed @ part.weight.T for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = []
        for head in range(config.num_attention_heads):
            group = head * config.num_key_value_heads // config.num_attention_heads
            own = slice(head * dim, (head + 1) * dim)
            shared = slice(group * dim, (group + 1) * dim)
            logits = (
                turned(q[..., own], positions, theta) @ turned(k[..., shared], positions, theta).mT / math.sqrt(dim)
            )
            raised = torch.exp(logits + mask - (logits + mask).amax(-1, keepdim=True))
            mixed.append(raised / raised.sum(-1, keepdim=True) @ v[..., shared])
        x = x + torch.cat(mixed, dim=-1) @ attention.o_proj.weight.T
        normed = rms_norm(x, layer.post_attention_layernorm.weight)
        gate = normed @ mlp.gate_proj.weight.T
        x = x + (gate * torch.sigmoid(gate) * (normed @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return rms_norm(x, model.norm.weight)


def pattern(n: int, causal: bool) -> Tensor:
    every = torch.ones(n, n, dtype=torch.bool)
    return every.tril() if causal else every


def at(x: Tensor, kept: Kept) -> Tensor:
    return torch.stack([x[row, ids] for row, ids in enumerate(kept)])


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
