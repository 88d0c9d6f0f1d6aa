"""FLOPs of a query in closed form, 2 per multiply-add; matrix products only, as is usual."""

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
        layers: Each decoder layer, all its passes over the layout's tokens.
        probe: Attention computed for stages, tokens merged by them, and what they multiply themselves.
        follow_up: Passes behind the layout.
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
    """Attention that was computed for a stage.

    Attributes:
        layer: Of which layer.
        rows: How many rows.
        ahead: Whether that layer was still to run.
        behind: Keys besides those of the layout's tokens: what came after them.
    """

    layer: int
    rows: int
    ahead: bool = False
    behind: int = 0


def layer_flops(shape: DecoderShape, tokens: int, keys: int | None = None, read: int | None = None) -> int:
    """FLOPs of one decoder layer.

    A causal layer counts its full square, which is what kernels are usually credited with.

    Args:
        shape: The decoder.
        tokens: Rows that enter.
        keys: Entries they attend to, as many as rows when left out.
        read: Rows whose output is made, all when left out.
    """
    keys, read = (tokens if keys is None else keys), (tokens if read is None else read)
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    entering = shape.hidden * (q_width + 2 * kv_width)
    leaving = shape.hidden * q_width + 3 * shape.hidden * shape.mlp
    return 2 * (tokens * entering + read * leaving) + 4 * read * keys * q_width


def probe_flops(shape: DecoderShape, rows: int, keys: int, ahead: bool = False) -> int:
    """FLOPs of the attention probabilities of `rows` queries over `keys` keys.

    A layer that is still to run has made neither: where it is looked `ahead` to, both are projected.
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
    """FLOPs of a query that runs to plan.

    Args:
        info: The backbone.
        plan: Token counts per layer.
        probes: Every attention probe.
        encoder: Attention of the vision towers that stages were told.
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
    """Keys where a layer is probed: those it attends to, or the tokens that the cut before it finds."""
    if not ahead:
        return plan.keys[layer]
    return plan.entering[layer - 1] + len(plan.layout.fixed) if layer else plan.layout.n_tokens


def layer_weights(shape: DecoderShape) -> int:
    """Numbers in the matrices of one decoder layer."""
    attention = 2 * shape.heads + 2 * shape.kv_heads
    return shape.hidden * (attention * shape.head_dim + 3 * shape.mlp)


def ceiling(info: BackboneInfo, layout: TokenLayout, after: int) -> float:
    """Dense FLOPs over those of a query from which every prunable token is gone after a layer (-1: before layer 0).

    No pruning of tokens after that layer can save more.
    """
    dense = Plan.dense(layout, info.decoder.depth)
    bare = Plan(layout, dense.mode, dense.depth, (Cut(after, (), len(layout.prunable), 0),))
    return query_flops(info, dense).total / query_flops(info, bare).total
