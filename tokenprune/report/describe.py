"""What every result says of a policy: its backbone, its tokens, and the FLOPs of a query."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tokenprune.engine.adapter import Backbone
from tokenprune.engine.trace import QueryTrace
from tokenprune.model.flops import Probed, QueryFlops, query_flops
from tokenprune.model.info import BackboneInfo
from tokenprune.policy import Policy
from tokenprune.tokens.layout import TokenLayout

UNTRAINED = (
    "The weights are untrained random numbers: action error says how far pruning\n"
    "moves the output, and nothing about success."
)


def trace_flops(info: BackboneInfo, trace: QueryTrace) -> QueryFlops:
    """FLOPs of a query as it ran, attention probes included; none where a controller answered."""
    if trace.answered:
        return QueryFlops(other={}, layers=(0,) * trace.plan.depth, follow_up=0, probe=0)
    probes = [Probed(probe.layer, probe.count, probe.ahead, probe.behind) for probe in trace.probes]
    return query_flops(info, trace.plan, probes, trace.encoder)


def describe(backbone: Backbone) -> dict[str, Any]:
    """The backbone as plain data."""
    info = backbone.info
    return {
        "name": info.name,
        "source": info.source,
        "untrained": info.untrained,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "decoder": asdict(info.decoder),
        "views": list(info.views),
        "action": asdict(info.action),
        "capabilities": sorted(info.capabilities),
    }


def describe_layout(layout: TokenLayout) -> dict[str, Any]:
    """The tokens of a query as plain data."""
    return {"segments": [asdict(segment) for segment in layout.segments]}


def notes(policy: Policy) -> list[str]:
    """What each stage says of itself on this backbone."""
    bound = policy.pipeline
    said = [(name, stage.caveats(bound.info)) for name, stage in zip(bound.names, bound.stages, strict=True)]
    return [f"{name}: {text}" for name, text in said if text]
