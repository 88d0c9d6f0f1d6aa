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
from tokenprune.engine.inputs import ModelInputs
from tokenprune.engine.query import Query
from tokenprune.model.decoder import Decoded, Decoder, Pruner, finish, project, rotary
from tokenprune.model.kv_cache import LayerKV, Memory
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.prompt import EncodedPrompt
from tokenprune.tokens.selection import OriginalIds, TokenSelection, rows_at

UPSTREAM = "upstream reconstruction (ours)"


class UpstreamRunner:
    """Runs a decoder's layers as upstream does: no fused kernel, every row computed, nothing pruned.

    Attributes:
        maps: Attention maps `[B, H, n, m]` of every layer and pass, held as upstream's outputs hold them.
        logits: Logits `[B, n, V]` of the layout's tokens, held as upstream's outputs hold them.
    """

    def __init__(self, vocabulary: Tensor | None) -> None:
        """Multiply every token of the layout by the output layer `vocabulary` `[V, D]` where there is one."""
        self.maps: list[Tensor] = []
        self.logits: list[Tensor] = []
        self._vocabulary = vocabulary

    def __call__(
        self,
        decoder: Decoder,
        hidden: Tensor,
        tokens: TokenSelection,
        pruner: Pruner | None = None,
        cache: Memory | None = None,
        *,
        positions: Positions = Positions.PRESERVE,
        read: OriginalIds | None = None,
        condition: Tensor | None = None,
        skip: Container[int] = (),
    ) -> Decoded:
        """Run every layer over all tokens `[B, n, D]`; arguments and result as in `Decoder.run`."""
        behind = cache.lengths if cache is not None else ()
        cos, sin = rotary(tokens, positions, decoder.head_dim, decoder.rope_theta, hidden.dtype, *behind[:1])
        for index, layer in enumerate(decoder.layers):
            q, k, v, gate = project(layer, hidden, cos, sin, decoder.head_dim, condition)
            kv = LayerKV(k, v, tokens.ids)
            kv = kv if cache is None else cache.extend(index, kv)
            hidden = finish(layer, hidden, self._attend(decoder, q, kv, tokens.ids), gate, condition)
        normed = decoder.finish(hidden, condition)
        if self._vocabulary is not None and not behind:
            self.logits.append((normed @ self._vocabulary.T).float())
        rows = normed if read is None else rows_at(normed, tokens.to_current(read))
        return Decoded(rows, hidden, tokens, (hidden.shape[1],) * len(decoder.layers))

    def _attend(self, decoder: Decoder, q: Tensor, kv: LayerKV, ids: OriginalIds) -> Tensor:
        """Return attention output `[B, H, n, d]`; keys and values repeat per query head, softmax is in float32."""
        repeats = q.shape[1] // kv.k.shape[1]
        k, v = (part.repeat_interleave(repeats, dim=1) if repeats > 1 else part for part in (kv.k, kv.v))
        logits = q @ k.transpose(2, 3) * decoder.head_dim**-0.5
        if decoder.causal:
            future = kv.ids[:, None, None] > ids[:, None, :, None]
            logits = logits + torch.zeros_like(logits).masked_fill(future, torch.finfo(q.dtype).min)
        weights = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        self.maps.append(weights)
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

    def encode(self, instruction: str, state: object = None) -> EncodedPrompt:
        """Return the tokens of a query."""
        return self._backbone.encode(instruction, state)

    def check(self, observation: Observation) -> None:
        """Refuse an observation that does not fit the policy."""
        self._backbone.check(observation)

    def pixels(self, images: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, Tensor]:
        """Crop frames and upload them."""
        return self._backbone.pixels(images)

    def prepare(self, observations: Sequence[Observation], prompts: Sequence[EncodedPrompt]) -> ModelInputs:
        """Preprocess observations and upload them."""
        return self._backbone.prepare(observations, prompts)

    def infer(self, inputs: Any, query: Query) -> Tensor:  # noqa: ANN401 - the adapter's own Inputs
        """Run the model; all attention maps are held until the query ends, as upstream's outputs hold them."""
        runner = UpstreamRunner(self._vocabulary)
        query.runner = runner
        actions = self._backbone.infer(inputs, query)
        query.trace.kernel = f"eager, {self.info.decoder.depth} maps kept ({self.device.type})"
        return actions

    def unnormalise(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """Return normalised actions in the environment's units."""
        return self._backbone.unnormalise(actions, observations)
