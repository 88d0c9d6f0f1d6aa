"""The decoder loop: transformers' linear layers and norms, torch SDPA, and cuts between layers.

It calls no `forward`, cache or mask code of transformers' models. So tokens can leave between any two layers, every
kept token can keep its rotary position, and attention stays on a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.model.kv_cache import LayerKV, Memory
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection, head_rows_at, rows_at


class Pruner(Protocol):
    """What the decoder loop calls between layers."""

    def acts_after(self, layer: int) -> bool:
        """Whether `after_layer` is to be called after this layer; host only."""
        ...

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, kv: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Return the hidden states `[B, K, D]` and tokens that enter the next layer.

        Args:
            layer: Index of the layer that ran.
            hidden: Its output `[B, n, D]`.
            tokens: The tokens it held.
            q: Its queries `[B, H, n, d]`.
            kv: Everything it attended to.
        """
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """The result of a pass through the decoder.

    Attributes:
        hidden: Normalised hidden states `[B, K, D]` of the last layer's tokens, or of the tokens to read.
        stream: The residual stream: the same before the final norm.
        tokens: The tokens of the last layer.
        held: Number of tokens in each layer.
    """

    hidden: Tensor
    stream: Tensor
    tokens: TokenSelection
    held: tuple[int, ...]


class DecoderRunner(Protocol):
    """Runs a decoder's layers; `run_decoder` unless a backbone has its own."""

    def __call__(
        self,
        decoder: Decoder,
        hidden: Tensor,
        tokens: TokenSelection,
        pruner: Pruner | None = None,
        cache: Memory | None = None,
        /,
        *,
        positions: Positions = Positions.PRESERVE,
        read: OriginalIds | None = None,
        condition: Tensor | None = None,
        skip: Container[int] = (),
    ) -> Decoded:
        """Run every layer over `hidden` `[B, n, D]`; arguments as in `Decoder.run`."""
        ...


class Decoder:
    """Decoder layers of a Llama-like or Gemma-like model and how to run them.

    Args:
        layers: transformers decoder layers with `input_layernorm`, `self_attn.{q,k,v,o}_proj`,
            `post_attention_layernorm` and `mlp`. In a conditioned pass the norms are adaptive: they take the condition
            as second argument and return the normalised tokens and a gate for the branch.
        norm: The final norm.
        head_dim: Width of one attention head.
        rope_theta: Base of the rotary frequencies.
        causal: Whether attention is causal; otherwise every token attends to every token.
    """

    def __init__(
        self, layers: Sequence[nn.Module], norm: nn.Module, *, head_dim: int, rope_theta: float, causal: bool
    ) -> None:
        """Hold references to the modules; no weight is copied."""
        self.layers = layers
        self.norm = norm
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.causal = causal

    def run(
        self,
        hidden: Tensor,
        tokens: TokenSelection,
        pruner: Pruner | None = None,
        cache: Memory | None = None,
        *,
        positions: Positions = Positions.PRESERVE,
        read: OriginalIds | None = None,
        condition: Tensor | None = None,
        skip: Container[int] = (),
        compiled: bool = False,
    ) -> Decoded:
        """Run every layer over `hidden` `[B, n, D]`, whose rows are the tokens `tokens`.

        With a cache, each layer also attends to its cached keys and values; the ids of new tokens must lie above the
        cached ones. With compact positions, each layer numbers new tokens from the length of its cache.

        Args:
            hidden: Embeddings.
            tokens: Which tokens they are.
            pruner: Called between layers. After the last layer it is given that layer's input if `read` is set, since
                the output is computed only for the rows to read.
            cache: Keys and values of earlier tokens.
            positions: Whether kept tokens keep their original positions.
            read: Tokens `[B, R]` to return hidden states of; all by default. In a causal decoder, only the last one.
            condition: Input of adaptive norms `[B, C]`.
            skip: Layers not to run, never the last; hidden states pass them unchanged.
            compiled: Whether the parts of a layer before and after its attention run under torch.compile.

        Raises:
            ValueError: If a causal decoder has several new tokens behind a filled cache, or several to read; both would
                need a mask.
        """
        before_attention, after_attention = compiled_parts() if compiled else (project, finish)
        cached = cache.lengths if cache is not None else ()
        if cached and self.causal and hidden.shape[1] > 1:
            raise ValueError(f"a causal decoder continues its cache one token at a time, not {hidden.shape[1]}")
        if self.causal and read is not None and read.shape[1] > 1:
            raise ValueError(f"a causal decoder is read at its last token, not at {read.shape[1]}")
        cos, sin = rotary(tokens, positions, self.head_dim, self.rope_theta, hidden.dtype, *cached[:1])
        held = []
        for index, layer in enumerate(self.layers):
            if index in skip:
                held.append(0)
                if cache is not None and not cached:
                    cache.extend(index, LayerKV.empty(hidden))
                continue
            held.append(hidden.shape[1])
            if cached and positions is Positions.COMPACT and cached[index] != cached[index - 1]:
                cos, sin = rotary(tokens, positions, self.head_dim, self.rope_theta, hidden.dtype, cached[index])
            q, k, v, gate = before_attention(layer, hidden, cos, sin, self.head_dim, condition)
            kv = LayerKV(k, v, tokens.ids)
            kv = kv if cache is None else cache.extend(index, kv)
            observed = pruner is not None and pruner.acts_after(index)
            if read is not None and index + 1 == len(self.layers):
                if pruner is not None and observed:
                    pruner.after_layer(index, hidden, tokens, q, kv)
                # Nobody reads the other rows of the last layer.
                hidden = self._finish_read(layer, hidden, q, tokens.to_current(read), kv, gate, condition)
                break
            # Kept ids ascend, so SDPA's causal flag is correct after any cut; no mask tensor is needed.
            attended = attend(q, kv, tokens.ids if self.causal and not cached else None)
            hidden = after_attention(layer, hidden, attended, gate, condition)
            if pruner is not None and observed:
                hidden, tokens = pruner.after_layer(index, hidden, tokens, q, kv)
                cos, sin = rotary(tokens, positions, self.head_dim, self.rope_theta, hidden.dtype)
        return Decoded(self.finish(hidden, condition), hidden, tokens, tuple(held))

    def finish(self, stream: Tensor, condition: Tensor | None = None) -> Tensor:
        """Apply the final norm to the residual stream `[B, n, D]`."""
        return normalise(self.norm, stream, condition)[0]

    def _finish_read(
        self,
        layer: nn.Module,
        hidden: Tensor,
        q: Tensor,
        rows: CurrentIds,
        kv: LayerKV,
        gate: Tensor | None,
        condition: Tensor | None,
    ) -> Tensor:
        hidden = rows_at(hidden, rows)
        if not rows.shape[1]:
            return hidden
        return finish(layer, hidden, attend(head_rows_at(q, rows), kv), gate, condition)


def run_decoder(
    decoder: Decoder,
    hidden: Tensor,
    tokens: TokenSelection,
    pruner: Pruner | None = None,
    cache: Memory | None = None,
    /,
    *,
    positions: Positions = Positions.PRESERVE,
    read: OriginalIds | None = None,
    condition: Tensor | None = None,
    skip: Container[int] = (),
    compiled: bool = False,
) -> Decoded:
    """Call `Decoder.run`, looked up on the decoder, so that subclasses count; the default `DecoderRunner`."""
    return decoder.run(
        hidden,
        tokens,
        pruner,
        cache,
        positions=positions,
        read=read,
        condition=condition,
        skip=skip,
        compiled=compiled,
    )


def project(
    layer: Any,  # noqa: ANN401
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    condition: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values `[B, heads, n, d]` of one layer, rotated, and the gate of its attention branch."""
    attention = layer.self_attn
    normed, gate = normalise(layer.input_layernorm, hidden, condition)
    shape = (*hidden.shape[:2], -1, head_dim)
    q, k, v = (
        proj(normed).view(shape).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return rotate(q, cos, sin), rotate(k, cos, sin), v, gate


def project_rows(
    layer: Any,  # noqa: ANN401
    hidden: Tensor,
    rows: CurrentIds,
    head_dim: int,
    rotation: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Queries `[B, H, R, d]` of some rows and keys `[B, G, n, d]` of all rows, projected from `hidden` `[B, n, D]`.

    `rotation` holds the cosines and sines `[B, 1, n, d]` of all rows; with None, nothing is rotated.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k = (
        part.unflatten(2, (-1, head_dim)).transpose(1, 2)
        for part in (attention.q_proj(rows_at(normed, rows)), attention.k_proj(normed))
    )
    if rotation is None:
        return q, k
    own = tuple(part[:, 0].expand(len(hidden), -1, -1) for part in rotation)
    cos, sin = (rows_at(part, rows)[:, None] for part in own)
    return rotate(q, cos, sin), rotate(k, *rotation)


@cache
def compiled_parts() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`project` and `finish`, compiled once for all layers and any number of tokens."""
    return torch.compile(project, dynamic=True), torch.compile(finish, dynamic=True)


def attend(q: Tensor, kv: LayerKV, ids: OriginalIds | None = None) -> Tensor:
    """Attention output `[B, H, n, d]` of queries over keys of as many or fewer heads.

    `ids` `[B, n]` are the queries' original ids; with them, attention is causal.
    """
    shared = q.shape[1] != kv.k.shape[1]
    if ids is None or kv.k.shape[2] == q.shape[2]:
        return F.scaled_dot_product_attention(q, kv.k, kv.v, is_causal=ids is not None, enable_gqa=shared)
    # The keys include tokens that have left, so SDPA's causal flag does not fit.
    mask = kv.ids[:, None, None] <= ids[:, None, :, None]
    return F.scaled_dot_product_attention(q, kv.k, kv.v, attn_mask=mask, enable_gqa=shared)


def finish(
    layer: Any,  # noqa: ANN401
    hidden: Tensor,
    attended: Tensor,
    gate: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """The layer's output from its input `[B, n, D]` and its attention output `[B, H, n, d]`."""
    hidden = branch(hidden, layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2)), gate)
    normed, gate = normalise(layer.post_attention_layernorm, hidden, condition)
    return branch(hidden, layer.mlp(normed), gate)


def normalise(norm: nn.Module, hidden: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Normalised tokens, and the gate of an adaptive norm; None for a plain one."""
    return (norm(hidden), None) if condition is None else norm(hidden, condition)


def branch(hidden: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
    """Add a branch's output to the residual stream, gated where the branch's norm is adaptive."""
    return hidden + (output if gate is None else output * gate)


def rotary(
    tokens: TokenSelection, positions: Positions, head_dim: int, theta: float, dtype: torch.dtype, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, 1, n, d]` at the tokens' original ids; with compact positions, counted from `first`.

    Computed in float32 whatever the dtype, as transformers does.
    """
    at = tokens.ids
    if positions is Positions.COMPACT:
        at = OriginalIds(torch.arange(first, first + tokens.n_kept, device=tokens.ids.device)[None])
    exponent = torch.arange(0, head_dim, 2, device=at.device).float() / head_dim
    angles = at[..., None].float() * (1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[B, heads, n, d]`, halves paired as in Llama."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
