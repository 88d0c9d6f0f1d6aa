"""FLOPs of a query in closed form, 2 per multiply-add; matrix products only, as is usual."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.backbone import BackboneInfo, DecoderShape
from tokenprune.plan import Plan


@dataclass(frozen=True, slots=True)
class QueryFlops:
    """FLOPs of one query by part.

    Attributes:
        other: Outside the decoder, by part.
        layers: Each decoder layer.
        probe: Attention rows computed for stages.
    """

    other: dict[str, int]
    layers: tuple[int, ...]
    probe: int = 0

    @property
    def decoder(self) -> int:
        """All decoder layers."""
        return sum(self.layers)

    @property
    def total(self) -> int:
        """The whole query."""
        return sum(self.other.values()) + self.decoder + self.probe


def layer_flops(shape: DecoderShape, tokens: int, keys: int | None = None) -> int:
    """FLOPs of one decoder layer over `tokens` rows that attend to `keys` entries (as many as rows when left out).

    A causal layer counts its full square, which is what kernels are usually credited with.
    """
    keys = tokens if keys is None else keys
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear = 2 * shape.hidden * q_width + 2 * shape.hidden * kv_width + 3 * shape.hidden * shape.mlp
    return 2 * tokens * linear + 4 * tokens * keys * q_width


def probe_flops(shape: DecoderShape, rows: int, keys: int) -> int:
    """FLOPs of the attention probabilities of `rows` queries over `keys` keys."""
    return 2 * rows * keys * shape.heads * shape.head_dim


def query_flops(info: BackboneInfo, plan: Plan, probes: tuple[tuple[int, int], ...] = ()) -> QueryFlops:
    """FLOPs of a query that runs to plan.

    Args:
        info: The backbone.
        plan: Token counts per layer.
        probes: `(layer, rows)` of each attention probe.
    """
    shape = info.decoder
    return QueryFlops(
        other=dict(info.other_flops),
        layers=tuple(layer_flops(shape, tokens) for tokens in plan.tokens),
        probe=sum(probe_flops(shape, rows, plan.tokens[layer]) for layer, rows in probes),
    )
