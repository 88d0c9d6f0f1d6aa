"""Runs a backbone as upstream repositories do: eager attention, every attention map kept, unread logits computed.

This is our reconstruction of how upstream runs, without its code. It keeps the lossless savings of the layout (no pads,
no absent cameras) and everything outside the decoder, so it is not slower than upstream.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.adapter import Backbone, Observation
from tokenprune.engine.inputs import Inputs
from tokenprune.engine.query import Query
from tokenprune.model.decoder import Decoded, Decoder, Positions, Pruner, finish, project, rotary
from tokenprune.model.kv_cache import KVCache, LayerKV, Memory
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.selection import OriginalIds, TokenSelection, rows_at

UPSTREAM = "upstream reconstruction (ours)"


class EagerDecoder(Decoder):
    """The same layers without a fused kernel, with every row computed, and nothing pruned.

    Attributes:
        kept: Attention maps `[B, H, n, m]` of all layers, and the logits `[B, n, V]`.
    """

    def __init__(self, decoder: Decoder, kept: list[Tensor], vocabulary: Tensor | None = None) -> None:
        """Share the modules of a decoder; every token is multiplied by `vocabulary` `[V, D]` if it is given."""
        super().__init__(
            decoder.layers,
            decoder.norm,
            head_dim=decoder.head_dim,
            rope_theta=decoder.rope_theta,
            causal=decoder.causal,
        )
        self.kept = kept
        self._vocabulary = vocabulary

    def run(
        self,
        hidden: Tensor,
        tokens: TokenSelection,
        pruner: Pruner | None = None,
        cache: Memory | None = None,
        *,
        positions: Positions = "preserve",
        read: OriginalIds | None = None,
        condition: Tensor | None = None,
        skip: Container[int] = (),
        compiled: bool = False,
    ) -> Decoded:
        """Run every layer over all tokens `[B, n, D]`; arguments as in `Decoder.run`, whose result this equals."""
        behind = cache.lengths if cache is not None else ()
        cos, sin = rotary(tokens, positions, self.head_dim, self.rope_theta, hidden.dtype, *behind[:1])
        for index, layer in enumerate(self.layers):
            q, k, v, gate = project(layer, hidden, cos, sin, self.head_dim, condition)
            kv = LayerKV(k, v, tokens.ids)
            kv = kv if cache is None else cache.extend(index, kv)
            hidden = finish(layer, hidden, self._attend(q, kv, tokens.ids), gate, condition)
        normed = self.finish(hidden, condition)
        if self._vocabulary is not None:
            self.kept.append((normed @ self._vocabulary.T).float())
        rows = normed if read is None else rows_at(normed, tokens.to_current(read))
        return Decoded(rows, hidden, tokens, (hidden.shape[1],) * len(self.layers))

    def _attend(self, q: Tensor, kv: LayerKV, ids: OriginalIds) -> Tensor:
        """Return attention output `[B, H, n, d]`; keys and values repeat per query head, softmax is in float32."""
        repeats = q.shape[1] // kv.k.shape[1]
        k, v = (part.repeat_interleave(repeats, dim=1) if repeats > 1 else part for part in (kv.k, kv.v))
        logits = q @ k.transpose(2, 3) * self.head_dim**-0.5
        if self.causal:
            future = kv.ids[:, None, None] > ids[:, None, :, None]
            logits = logits + torch.zeros_like(logits).masked_fill(future, torch.finfo(q.dtype).min)
        weights = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        self.kept.append(weights)
        return cast(Tensor, weights @ v)


class UpstreamBackbone:
    """A backbone that runs its decoder as upstream does; implements `tokenprune.engine.adapter.Backbone`.

    Where upstream computes logits of every token that no query reads, an output layer of random numbers takes the place
    of its own: the cost is the same, and the result is not used.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Share the weights of another backbone."""
        self.info, self.device, self.dtype = backbone.info, backbone.device, backbone.dtype
        self._backbone = backbone
        shape = (backbone.info.unread_logits, backbone.info.decoder.hidden)
        self._vocabulary = torch.randn(shape, device=self.device, dtype=self.dtype) if shape[0] else None

    def layout(self, instruction: str, state: object = None) -> TokenLayout:
        """Return the tokens of a query."""
        return self._backbone.layout(instruction, state)

    def check(self, observation: Observation) -> None:
        """Refuse an observation that does not fit the policy."""
        self._backbone.check(observation)

    def pixels(self, images: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, Tensor]:
        """Crop frames and upload them."""
        return self._backbone.pixels(images)

    def prepare(self, observations: Sequence[Observation], instructions: Sequence[str]) -> Inputs:
        """Preprocess observations and upload them."""
        return self._backbone.prepare(observations, instructions)

    def infer(self, inputs: Any, query: Query) -> Tensor:  # noqa: ANN401 - the adapter's own Inputs
        """Run the model; all attention maps are held until the query ends, as upstream's outputs hold them."""
        return self._backbone.infer(inputs, cast(Query, _EagerQuery(query, self._vocabulary)))

    def unnormalise(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """Return normalised actions in the environment's units."""
        return self._backbone.unnormalise(actions, observations)


class _EagerQuery:
    """A query that runs an eager decoder in place of the decoder that the adapter passes."""

    def __init__(self, query: Query, vocabulary: Tensor | None) -> None:
        self._query = query
        self._vocabulary = vocabulary
        self._kept: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a query has
        return getattr(self._query, name)

    def decode(self, decoder: Decoder, embeddings: Tensor, cache: KVCache | None = None) -> Tensor:
        hidden = self._query.decode(EagerDecoder(decoder, self._kept, self._vocabulary), embeddings, cache)
        self._query.trace.kernel = f"eager, {len(self.maps)} maps kept ({embeddings.device.type})"
        return hidden

    def repeat(self, decoder: Decoder, embeddings: Tensor) -> Tensor:
        return self._query.repeat(EagerDecoder(decoder, self._kept, self._vocabulary), embeddings)

    def follow(self, decoder: Decoder, *given: Any, **named: Any) -> Tensor:  # noqa: ANN401 - as in `Query.follow`
        return self._query.follow(EagerDecoder(decoder, self._kept), *given, **named)

    @property
    def maps(self) -> list[Tensor]:
        return [kept for kept in self._kept if kept.dim() == 4]
