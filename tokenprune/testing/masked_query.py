"""The reference for pruning: every token goes through every layer, and those that pruning dropped are masked.

Written without the decoder loop and its cuts, which it judges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.model.decoder import Decoder
from tokenprune.model.kv_cache import KVCache, LayerKV, Memory
from tokenprune.model.phase import Phase
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.selection import OriginalIds


class MaskedQuery:
    """Stands in for the `Query` of a pass that is asked again.

    Args:
        layout: The tokens of the query.
        kept: Original ids of the prunable tokens each cut left `[B, P]`, by the layer it follows.
        noise: What the query drew, in order.
    """

    encoder_kinds: frozenset[str] = frozenset()

    def __init__(self, layout: TokenLayout, kept: Mapping[int, Tensor], noise: Iterable[Tensor]) -> None:
        self.hidden: list[Tensor] = []
        self._layout = layout
        self._kept = kept
        self._noise: Iterator[Tensor] = iter(noise)

    def phase(self, phase: Phase) -> AbstractContextManager[None]:
        """Nothing is timed."""
        return nullcontext()

    def transform(self, view: str, features: Tensor) -> Tensor:
        """No stage changes features."""
        return features

    def note_encoder(self, views: Sequence[str], seen: Mapping[str, Tensor]) -> None:
        """No stage asks for the towers' attention."""

    def noise(self, *shape: int) -> Tensor:
        """What the query drew at this point."""
        return next(self._noise)

    def decode(self, decoder: Decoder, embeddings: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states at the readout rows, as of `Query.decode`; the cache gets every token."""
        readout = self._layout.readout
        ids = torch.arange(embeddings.shape[1]).expand(embeddings.shape[:2])
        hidden = self._run(decoder, embeddings, ids, KVCache() if cache is None else cache, None)
        return self._noted(hidden[:, readout.start : readout.stop])

    def repeat(self, decoder: Decoder, embeddings: Tensor) -> Tensor:
        """The same, as of `Query.repeat`."""
        return self.decode(decoder, embeddings)

    def follow(
        self,
        decoder: Decoder,
        embeddings: Tensor,
        behind: int,
        memory: Memory,
        condition: Tensor | None = None,
        *,
        actions: bool = True,
    ) -> Tensor:
        """Hidden states of tokens behind the layout's, as of `Query.follow`."""
        first = self._layout.n_tokens + behind
        ids = torch.arange(first, first + embeddings.shape[1]).expand(embeddings.shape[:2])
        return self._noted(self._run(decoder, embeddings, ids, memory, condition))

    def _noted(self, hidden: Tensor) -> Tensor:
        if hidden.numel():
            self.hidden.append(hidden)
        return hidden

    def _run(self, decoder: Decoder, x: Tensor, ids: Tensor, memory: Memory, condition: Tensor | None) -> Tensor:
        for index, layer in enumerate(decoder.layers):
            x = self._layer(decoder, index, layer, x, ids, memory, condition)
        return _normed(decoder.norm, x, condition)[0]

    def _layer(
        self,
        decoder: Decoder,
        index: int,
        layer: Any,  # noqa: ANN401 - an nn.Module, whose parts mypy does not know
        x: Tensor,
        ids: Tensor,
        memory: Memory,
        condition: Tensor | None,
    ) -> Tensor:
        attention, dim = layer.self_attn, decoder.head_dim
        normed, gate = _normed(layer.input_layernorm, x, condition)
        q, k, v = (
            part(normed).unflatten(2, (-1, dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (_turned(part, ids, decoder.rope_theta) for part in (q, k))
        seen = memory.extend(index, LayerKV(k, v, OriginalIds(ids)))
        keys, values = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (seen.k, seen.v))
        hidden_from = ~self._visible(decoder, index, ids, seen.ids)[:, None]
        weights = (q @ keys.mT * dim**-0.5).masked_fill(hidden_from, -torch.inf).softmax(-1)
        mixed = (weights @ values).transpose(1, 2).flatten(2)
        x = x + _gated(attention.o_proj(mixed), gate)
        normed, gate = _normed(layer.post_attention_layernorm, x, condition)
        return x + _gated(layer.mlp(normed), gate)

    def _visible(self, decoder: Decoder, index: int, ids: Tensor, keys: Tensor) -> Tensor:
        """Which keys each token sees in a layer `[B, n, m]`; a dropped one sees itself, so that it stays finite."""
        held = torch.ones(len(ids), max(self._layout.n_tokens, int(keys.max()) + 1), dtype=torch.bool)
        for after, kept in self._kept.items():
            if after < index:
                stays = torch.ones_like(held)
                stays[:, list(self._layout.prunable)] = False
                held &= stays.scatter(1, kept, True)
        own = ids[:, :, None] == keys[:, None, :]
        visible = held.gather(1, keys)[:, None, :] | own
        return visible & (keys[:, None, :] <= ids[:, :, None]) if decoder.causal else visible


def _normed(norm: nn.Module, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (norm(x), None) if condition is None else norm(x, condition)


def _gated(output: Tensor, gate: Tensor | None) -> Tensor:
    return output if gate is None else output * gate


def _turned(x: Tensor, ids: Tensor, theta: float) -> Tensor:
    """Rotate `[B, H, n, d]` by the tokens' original ids, component pairs as complex numbers."""
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, dtype=torch.float32) * 2 / x.shape[-1])
    angle = (ids.to(torch.float32)[:, None, :, None] * frequency).double()
    spin = torch.complex(angle.cos(), angle.sin())
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * spin
    return torch.cat([z.real, z.imag], dim=-1).to(x.dtype)
