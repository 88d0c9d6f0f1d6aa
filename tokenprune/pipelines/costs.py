"""Tokens and FLOPs of pipelines, and the FLOPs of choosing tokens, counted without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from tokenprune.errors import ConfigError, LayoutError
from tokenprune.model.flops import Probed, QueryFlops, query_flops
from tokenprune.model.info import BackboneInfo
from tokenprune.pipelines.binding import BoundPipeline, bind
from tokenprune.pipelines.loader import LoadedPipeline
from tokenprune.registry.discovery import Registry
from tokenprune.stages.stage import Probe
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.plan import Plan


@dataclass(frozen=True)
class Cost:
    """Tokens and FLOPs of one pipeline in one mode.

    Attributes:
        pipeline: Label of the pipeline.
        mode: The mode.
        tokens_mean: Visual tokens per layer, mean over layers.
        tokens_last: Visual tokens in the last layer.
        at_most: Whether counts depend on data, so that tokens and FLOPs are upper bounds.
        flop_ratio: FLOPs of the dense query divided by those of this one.
        choosing: FLOPs of choosing tokens: attention for stages, merging, and the stages' own matrix products.
        share: `choosing` divided by the FLOPs of the dense query.
    """

    pipeline: str
    mode: str
    tokens_mean: float
    tokens_last: int
    at_most: bool
    flop_ratio: float
    choosing: int
    share: float


def planned_flops(bound: BoundPipeline, layout: TokenLayout, mode: str) -> QueryFlops:
    """FLOPs of a query as planned, with the attention that stages declare in `probes`."""
    plan = bound.plan(layout, mode)
    asked = {probe for stage in bound.stages for probe in stage.probes(bound.info, layout, mode)}
    probes = [Probed(probe.layer, rows_probed(probe, layout, plan.tokens), probe.ahead) for probe in asked]
    return query_flops(bound.info, plan, probes, bound.encoder_attention)


def rows_probed(probe: Probe, layout: TokenLayout, held: Sequence[int]) -> int:
    """Number of rows of a probe; `held` are the tokens of each layer."""
    if probe.rows == "all":
        return held[probe.layer]
    return len(layout.span(probe.rows) if isinstance(probe.rows, str) else probe.rows)


def costs(
    pipelines: Sequence[LoadedPipeline], info: BackboneInfo, layout: TokenLayout, registry: Registry
) -> tuple[list[Cost], dict[str, str]]:
    """Return the costs of every pipeline in every mode, and by label why others cannot run on this backbone."""
    dense = query_flops(info, Plan.dense(layout, info.decoder.depth)).total
    rows, refused = [], {}
    for loaded in pipelines:
        try:
            bound = bind(loaded.config, info, registry)
            plans = {mode: bound.plan(layout, mode) for mode in loaded.config.modes}
        except (ConfigError, LayoutError) as error:
            refused[loaded.label] = str(error)
            continue
        for mode, plan in plans.items():
            own = planned_flops(bound, layout, mode)
            tokens = mean(plan.prunable), plan.prunable[-1]
            rows.append(
                Cost(loaded.label, mode, *tokens, not plan.graph_safe, dense / own.total, own.probe, own.probe / dense)
            )
    return rows, refused
