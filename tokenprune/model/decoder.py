"""The one decoder loop: transformers' weight-bearing leaf modules, torch SDPA, and cuts between layers.

It never calls transformers' own `forward`, cache or mask code, so tokens can leave between any two layers while
every kept token keeps its rotary position, and the attention kernel stays the fast one throughout.
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
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection, rows_at


class Pruner(Protocol):
    """What the loop asks between layers."""

    def acts_after(self, layer: int) -> bool:
        """Whether anything happens after this layer; host only."""
        ...

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, seen: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Look at a layer, its queries and all it attended to, and perhaps cut after it; returns what goes on."""
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a pass through the decoder leaves.

    Attributes:
        hidden: Normalised hidden states `[B, K, D]` of the tokens that reached the end, or of those to be read.
        stream: The same before the last norm.
        tokens: Which tokens reached the end.
        held: Tokens each layer really held.
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
            `post_attention_layernorm` and `mlp`. Where a pass is conditioned, the norms take the condition as second
            argument and return the normalised tokens and a gate for the branch they feed (adaptive norms).
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

        With a cache, each layer also attends to what the cache holds for it; the ids of new tokens must lie above the
        cached ones. Where positions are compact, tokens behind a cache are numbered on from what each layer holds.

        Args:
            hidden: Embeddings.
            tokens: Which tokens they are.
            pruner: Asked between layers. After the last one it sees that layer's input, for its output is only made
                where it is read.
            cache: Keys and values of earlier tokens.
            positions: Whether kept tokens keep their original positions.
            read: Tokens `[B, R]` whose hidden states are wanted, all when left out. In a causal decoder, the last one.
            condition: What adaptive norms depend on `[B, C]`.
            skip: Layers to leave out, never the last; tokens go past them as they are.
            compiled: Whether what a layer does before and after its attention runs compiled.

        Raises:
            ValueError: If a causal decoder is to continue a filled cache, or to be read, with several tokens, which
                would need a mask.
        """
        before, after = compiled_parts() if compiled else (project, finish)
        behind = cache.lengths if cache is not None else ()
        if behind and self.causal and hidden.shape[1] > 1:
            raise ValueError(f"a causal decoder continues its cache one token at a time, not {hidden.shape[1]}")
        if self.causal and read is not None and read.shape[1] > 1:
            raise ValueError(f"a causal decoder is read at its last token, not at {read.shape[1]}")
        cos, sin = rotary(tokens, positions, self.head_dim, self.rope_theta, hidden.dtype, *behind[:1])
        held = []
        for index, layer in enumerate(self.layers):
            if index in skip:
                held.append(0)
                if cache is not None and not behind:
                    cache.extend(index, LayerKV.empty(hidden))
                continue
            held.append(hidden.shape[1])
            if behind and positions is Positions.COMPACT and behind[index] != behind[index - 1]:
                cos, sin = rotary(tokens, positions, self.head_dim, self.rope_theta, hidden.dtype, behind[index])
            q, k, v, gate = before(layer, hidden, cos, sin, self.head_dim, condition)
            seen = LayerKV(k, v, tokens.ids)
            seen = seen if cache is None else cache.extend(index, seen)
            asked = pruner is not None and pruner.acts_after(index)
            if read is not None and index + 1 == len(self.layers):
                if pruner is not None and asked:
                    pruner.after_layer(index, hidden, tokens, q, seen)
                # Whatever else this layer would still make of the other rows, nobody reads.
                hidden = self._finish_read(layer, hidden, q, tokens.to_current(read), seen, gate, condition)
                break
            # Kept ids ascend, so the plain causal pattern stays right after any cut and no mask tensor is needed.
            mixed = attend(q, seen, tokens.ids if self.causal and not behind else None)
            hidden = after(layer, hidden, mixed, gate, condition)
            if pruner is not None and asked:
                hidden, tokens = pruner.after_layer(index, hidden, tokens, q, seen)
                cos, sin = rotary(tokens, positions, self.head_dim, self.rope_theta, hidden.dtype)
        return Decoded(self.finish(hidden, condition), hidden, tokens, tuple(held))

    def finish(self, stream: Tensor, condition: Tensor | None = None) -> Tensor:
        """Normalised hidden states of what the last layer leaves `[B, n, D]`."""
        return normalise(self.norm, stream, condition)[0]

    def _finish_read(
        self,
        layer: nn.Module,
        hidden: Tensor,
        q: Tensor,
        rows: CurrentIds,
        seen: LayerKV,
        gate: Tensor | None,
        condition: Tensor | None,
    ) -> Tensor:
        hidden = rows_at(hidden, rows)
        if not rows.shape[1]:
            return hidden
        q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        return finish(layer, hidden, attend(q, seen), gate, condition)


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
    """Run a decoder as it runs itself; the default `DecoderRunner`."""
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
    turn: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Queries `[B, H, R, d]` of some rows and keys `[B, G, n, d]` of all, as a layer would make them of `hidden`.

    `turn` are the cosines and sines `[B, 1, n, d]` of all rows; where there are none, nothing is rotated.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k = (
        part.unflatten(2, (-1, head_dim)).transpose(1, 2)
        for part in (attention.q_proj(rows_at(normed, rows)), attention.k_proj(normed))
    )
    if turn is None:
        return q, k
    own = tuple(part[:, 0].expand(len(hidden), -1, -1) for part in turn)
    cos, sin = (rows_at(part, rows)[:, None] for part in own)
    return rotate(q, cos, sin), rotate(k, *turn)


@cache
def compiled_parts() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`project` and `finish`, compiled once for all layers and any number of tokens."""
    return torch.compile(project, dynamic=True), torch.compile(finish, dynamic=True)


def attend(q: Tensor, seen: LayerKV, ids: OriginalIds | None = None) -> Tensor:
    """Attention output `[B, H, n, d]` of queries over keys of as many or fewer heads.

    Where the queries' original ids `[B, n]` are given, each sees only keys up to its own.
    """
    shared = q.shape[1] != seen.k.shape[1]
    if ids is None or seen.k.shape[2] == q.shape[2]:
        return F.scaled_dot_product_attention(q, seen.k, seen.v, is_causal=ids is not None, enable_gqa=shared)
    # Among the keys are tokens that have left, so the plain causal pattern does not fit.
    mask = seen.ids[:, None, None] <= ids[:, None, :, None]
    return F.scaled_dot_product_attention(q, seen.k, seen.v, attn_mask=mask, enable_gqa=shared)


def finish(
    layer: Any,  # noqa: ANN401
    hidden: Tensor,
    mixed: Tensor,
    gate: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """The layer's output from its input `[B, n, D]` and its attention output `[B, H, n, d]`."""
    hidden = branch(hidden, layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2)), gate)
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
    """Cosines and sines `[B, 1, n, d]` at the tokens' original ids, or counted from `first` where they are compact.

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
