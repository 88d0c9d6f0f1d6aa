"""FLOPs of a query in closed form: matrix products only, 2 FLOPs per multiply-add."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenprune.model.info import BackboneInfo, DecoderShape
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.plan import Cut, Plan, Removal


@dataclass(frozen=True, slots=True)
class QueryFlops:
    """FLOPs of one query by part.

    Attributes:
        other: Outside the decoder, by part.
        layers: Each decoder layer, over all its passes with the layout's tokens.
        probe: Attention computed for stages, merging, and the stages' own matrix products.
        follow_up: Passes after the prefill.
    """

    other: dict[str, int]
    layers: tuple[int, ...]
    probe: int = 0
    follow_up: int = 0

    @property
    def decoder(self) -> int:
        """All decoder layers over the layout's tokens."""
        return sum(self.layers)

    @property
    def total(self) -> int:
        """The whole query."""
        return sum(self.other.values()) + self.decoder + self.probe + self.follow_up


class Probed(NamedTuple):
    """Attention rows computed for a stage.

    Attributes:
        layer: Index of the layer.
        rows: Number of rows.
        ahead: Whether the layer had not run yet.
        behind: Keys of tokens after the layout's.
    """

    layer: int
    rows: int
    ahead: bool = False
    behind: int = 0


def layer_flops(shape: DecoderShape, tokens: int, keys: int | None = None, read: int | None = None) -> int:
    """FLOPs of one decoder layer.

    Causal attention counts the full square, by the usual convention.

    Args:
        shape: The decoder.
        tokens: Rows that enter.
        keys: Keys they attend to; `tokens` by default.
        read: Rows whose output is computed; all by default.
    """
    keys, read = (tokens if keys is None else keys), (tokens if read is None else read)
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    entering = shape.hidden * (q_width + 2 * kv_width)
    leaving = shape.hidden * q_width + 3 * shape.hidden * shape.mlp
    return 2 * (tokens * entering + read * leaving) + 4 * read * keys * q_width


def probe_flops(shape: DecoderShape, rows: int, keys: int, ahead: bool = False) -> int:
    """FLOPs of the attention probabilities of `rows` queries over `keys` keys.

    With `ahead`, the layer has not run yet, and projecting queries and keys is counted too.
    """
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projected = 2 * shape.hidden * (rows * q_width + keys * kv_width) if ahead else 0
    return projected + 2 * rows * keys * q_width


def query_flops(
    info: BackboneInfo,
    plan: Plan,
    probes: Sequence[Probed] = (),
    encoder: Iterable[str] = (),
) -> QueryFlops:
    """FLOPs of a query that runs as planned.

    Args:
        info: The backbone.
        plan: Token counts per layer.
        probes: Attention rows computed for stages.
        encoder: Kinds of the vision towers' attention that stages use.
    """
    shape, held, keys = info.decoder, plan.tokens, plan.keys
    layers = [layer_flops(shape, n, m) for n, m in zip(held[:-1], keys[:-1], strict=True)]
    layers.append(layer_flops(shape, held[-1], keys[-1], read=len(plan.layout.readout)))
    follow_up = 0
    if info.follow_up is not None:
        follow_up = sum(
            layer_flops(info.follow_up.decoder, rows, n + before + rows) + norms
            for rows, before, norms in info.follow_up.ran(plan.flow_interval)
            for n in keys
            if n
        )
    return QueryFlops(
        other=dict(info.other_flops),
        layers=tuple(info.repeats * n for n in layers),
        follow_up=follow_up,
        probe=sum(probe_flops(shape, p.rows, keys_probed(plan, p.layer, p.ahead) + p.behind, p.ahead) for p in probes)
        + sum(info.encoder_attention[kind].flops for kind in encoder)
        + plan.own_flops
        + sum(
            2 * cut.keep * cut.found * shape.hidden
            for cut in plan.cuts
            if cut.removal is Removal.MERGE and cut.keep < cut.found
        ),
    )


def keys_probed(plan: Plan, layer: int, ahead: bool) -> int:
    """Keys of a probe at a layer: those the layer attends to; with `ahead`, the tokens before the preceding cut."""
    if not ahead:
        return plan.keys[layer]
    return plan.entering[layer - 1] + len(plan.layout.fixed) if layer else plan.layout.n_tokens


def layer_weights(shape: DecoderShape) -> int:
    """Matrix parameters of one decoder layer."""
    attention = 2 * shape.heads + 2 * shape.kv_heads
    return shape.hidden * (attention * shape.head_dim + 3 * shape.mlp)


def ceiling(info: BackboneInfo, layout: TokenLayout, after: int) -> float:
    """Upper bound of the FLOP ratio of pruning after a layer (-1: before layer 0).

    Dense FLOPs over those of a query that drops every prunable token there.
    """
    dense = Plan.dense(layout, info.decoder.depth)
    bare = Plan(layout, dense.mode, dense.depth, (Cut(after, (), len(layout.prunable), 0),))
    return query_flops(info, dense).total / query_flops(info, bare).total
