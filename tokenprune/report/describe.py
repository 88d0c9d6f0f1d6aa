"""What every result file says of a policy: its backbone, its tokens, and the FLOPs of a query."""

from __future__ import annotations

from tokenprune.engine.adapter import Backbone
from tokenprune.engine.trace import QueryTrace
from tokenprune.model.flops import Probed, QueryFlops, query_flops
from tokenprune.model.info import BackboneInfo
from tokenprune.policy import Policy
from tokenprune.report.record import BackboneRecord, LayoutRecord
from tokenprune.tokens.layout import TokenLayout

UNTRAINED = (
    "The weights are untrained random numbers: action error says how far pruning\n"
    "moves the output, and nothing about success."
)


def trace_flops(info: BackboneInfo, trace: QueryTrace) -> QueryFlops:
    """Return the FLOPs of a query as it ran, attention probes included; 0 where a controller answered."""
    if trace.answered:
        return QueryFlops(other={}, layers=(0,) * trace.plan.depth, follow_up=0, probe=0)
    probes = [Probed(probe.layer, probe.count, probe.ahead, probe.behind) for probe in trace.probes]
    return query_flops(info, trace.plan, probes, trace.encoder)


def describe(backbone: Backbone) -> BackboneRecord:
    """Return what a result file says of the backbone."""
    info = backbone.info
    return BackboneRecord(
        name=info.name,
        source=info.source,
        untrained=info.untrained,
        dtype=str(backbone.dtype).removeprefix("torch."),
        decoder=info.decoder,
        views=list(info.views),
        action=info.action,
        capabilities=sorted(info.capabilities),
    )


def describe_layout(layout: TokenLayout) -> LayoutRecord:
    """Return what a result file says of the tokens of a query."""
    return LayoutRecord.model_validate(layout)


def notes(policy: Policy) -> list[str]:
    """Return what each stage says of itself on this backbone, `STAGE: TEXT`."""
    bound = policy.pipeline
    texts = [(name, stage.caveats(bound.info)) for name, stage in zip(bound.names, bound.stages, strict=True)]
    return [f"{name}: {text}" for name, text in texts if text]
