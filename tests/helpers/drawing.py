"""Hypothesis strategies that several test files share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st
from torch import nn

from tokenprune.model.decoder import Decoder
from tokenprune.testing.strategies import VIEWS, batches, layouts, random, seeds

if TYPE_CHECKING:
    from transformers import LlamaModel

__all__ = [
    "VIEWS",
    "batches",
    "decoder_of",
    "keep_counts",
    "keep_sets",
    "layouts",
    "llamas",
    "random",
    "seeds",
    "tiny_llama",
]


def keep_counts(prunable: int) -> st.SearchStrategy[int]:
    """Any number of tokens a cut may keep, nothing and everything included."""
    return st.integers(0, prunable)


@st.composite
def keep_sets(draw: st.DrawFn, held: list[list[int]], fixed: frozenset[int] = frozenset()) -> list[list[int]]:
    """Of the ids each batch row holds, as many to keep in every row, the fixed ones among them, ascending."""
    free = [[token for token in row if token not in fixed] for row in held]
    keep = draw(st.integers(0 if fixed else 1, len(free[0])))
    always = [token for token in held[0] if token in fixed]
    return [sorted([*always, *draw(st.permutations(row))[:keep]]) for row in free]


def tiny_llama(
    depth: int = 3, hidden: int = 16, heads: int = 4, kv_heads: int = 2, head_dim: int = 4, mlp: int = 24,
    theta: float = 500.0, seed: int = 0, own_norms: bool = False,
) -> LlamaModel:  # fmt: skip
    """transformers' Llama in float64, with weights large enough that attention is far from uniform.

    Its own norms round to float32 whatever the dtype. Unless `own_norms` is asked for, torch's take their place, so
    that the whole model is exact enough to be compared with one written from the equations.
    """
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, intermediate_size=mlp, vocab_size=4, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaModel(config)
    if not own_norms:
        for layer in model.layers:
            layer.input_layernorm = nn.RMSNorm(hidden, eps=1e-6)
            layer.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-6)
        model.norm = nn.RMSNorm(hidden, eps=1e-6)
    model = model.double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.copy_(1 + 0.3 * noise if weight.dim() == 1 else noise * 1.5 / weight.shape[1] ** 0.5)
    return model


@st.composite
def llamas(draw: st.DrawFn, own_norms: bool = False) -> LlamaModel:
    """Small Llamas of every head grouping."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    return tiny_llama(
        depth=draw(st.integers(1, 4)),
        hidden=heads * draw(st.sampled_from([4, 6])),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 8])),
        theta=draw(st.sampled_from([10.0, 500.0, 10000.0])),
        seed=draw(seeds),
        own_norms=own_norms,
    )


def decoder_of(model: LlamaModel, causal: bool) -> Decoder:
    """The project's loop over the layers of that model."""
    theta = model.config.rope_parameters["rope_theta"]
    return Decoder(model.layers, model.norm, head_dim=model.config.head_dim, rope_theta=theta, causal=causal)
