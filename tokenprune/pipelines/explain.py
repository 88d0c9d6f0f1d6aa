"""Explains a pipeline on a backbone before any weight exists: hooks, cuts, tokens and FLOPs of every layer, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tokenprune.model.flops import QueryFlops, ceiling, keys_probed, layer_weights, probe_flops, query_flops
from tokenprune.model.info import BackboneInfo
from tokenprune.pipelines.binding import BoundPipeline, bind
from tokenprune.pipelines.costs import planned_flops, rows_probed
from tokenprune.pipelines.loader import LoadedPipeline
from tokenprune.registry.discovery import Registry
from tokenprune.stages.token_context import rows_name
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.plan import Plan, cut_name


@dataclass(frozen=True)
class ExplainedHook:
    """A hook that is called.

    Attributes:
        hook: Its name.
        stage: The stage that implements it.
        owner: Distribution and version that the stage comes from.
        layers: For `score_layer`, the layers after which it is called.
    """

    hook: str
    stage: str
    owner: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ExplainedCut:
    """A place where tokens leave.

    Attributes:
        after: The layer it follows, or `embedding`.
        found: Prunable tokens that come to it.
        keep: Prunable tokens that it keeps.
        at_most: Whether `keep` is an upper bound, because the count depends on the input.
        views: Budgets of single views, or of several joined by `+`.
        stages: The stages whose proposals it combines.
    """

    after: str
    found: int
    keep: int
    at_most: bool
    views: Mapping[str, int]
    stages: tuple[str, ...]


@dataclass(frozen=True)
class ExplainedLayer:
    """What one decoder layer holds and computes: tokens, the prunable ones among them, GFLOP."""

    layer: int
    tokens: int
    prunable: int
    gflops: float


@dataclass(frozen=True)
class ExplainedProbe:
    """Attention that is computed for stages.

    Attributes:
        layer: The layer whose attention it is.
        rows: Which rows, by name or range.
        count: How many.
        ahead: Whether it is computed before that layer has run.
        gflops: What it costs.
    """

    layer: int
    rows: str
    count: int
    ahead: bool
    gflops: float


@dataclass(frozen=True)
class ExplainedMode:
    """A query in one mode.

    Attributes:
        cuts: In the order of the layers.
        layers: Every decoder layer.
        probes: In the order of the layers.
        graph_safe: Whether every count is known before the query; otherwise tokens and FLOPs are upper bounds.
        gflops: GFLOP by part, then the `total` and that of a `dense` query.
        flop_ratio: Dense FLOPs over the total.
    """

    cuts: tuple[ExplainedCut, ...]
    layers: tuple[ExplainedLayer, ...]
    probes: tuple[ExplainedProbe, ...]
    graph_safe: bool
    gflops: Mapping[str, float]
    flop_ratio: float


@dataclass(frozen=True)
class Unprunable:
    """The phase behind the layout's tokens, which pruning makes cheaper only in its attention to them.

    Attributes:
        phase: Its name.
        passes: How often its layers run.
        most_tokens: Most tokens in one pass.
        share_of_dense_flops: Its share of the FLOPs of a dense query.
        weights_read_each: Numbers in the matrices that each pass reads.
    """

    phase: str
    passes: int
    most_tokens: int
    share_of_dense_flops: float
    weights_read_each: int


@dataclass(frozen=True)
class Explanation:
    """What a pipeline does on a backbone.

    Attributes:
        pipeline: The pipeline as resolved.
        backbone: Name and source, and whether it is untrained.
        instruction: The instruction whose tokens were laid out.
        layout: The tokens of a query.
        hooks: Every hook that is called, in the order of the calls.
        caveats: What stages do differently on this backbone.
        modes: A query in each mode of the pipeline.
        ceiling: Times fewer FLOPs with no prunable token at all, by the cut after which they are gone.
        unprunable: The phase that pruning does not shorten; None where the backbone has none.
    """

    pipeline: Mapping[str, Any]
    backbone: str
    instruction: str
    layout: TokenLayout
    hooks: tuple[ExplainedHook, ...]
    caveats: tuple[str, ...]
    modes: Mapping[str, ExplainedMode]
    ceiling: Mapping[str, float]
    unprunable: Unprunable | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `unprunable` is left out where there is none."""
        segments = [
            {"role": s.role.value, "view": s.view, "start": s.start, "length": s.length, "prunable": s.prunable}
            for s in self.layout.segments
        ]
        plain = {
            "pipeline": dict(self.pipeline),
            "backbone": self.backbone,
            "instruction": self.instruction,
            "tokens": self.layout.n_tokens,
            "segments": segments,
            "hooks": [
                {"hook": call.hook, "stage": call.stage, "from": call.owner, "layers": list(call.layers)}
                for call in self.hooks
            ],
            "notes": list(self.caveats),
            "modes": {name: asdict(mode) for name, mode in self.modes.items()},
            "ceiling": dict(self.ceiling),
        }
        return plain if self.unprunable is None else {**plain, "unprunable": asdict(self.unprunable)}


def explain(
    pipeline: LoadedPipeline, info: BackboneInfo, layout: TokenLayout, instruction: str, registry: Registry
) -> Explanation:
    """Explain a pipeline on a backbone; no weights are made or read.

    Args:
        pipeline: What to explain.
        info: The backbone.
        layout: Its tokens for `instruction`.
        instruction: What the layout was made for.
        registry: Discovered plugins.

    Raises:
        CapabilityError: If a stage requires something that the backbone does not offer.
        ConfigError: If the pipeline does not fit the backbone.
        MissingError: If a stage lacks what only the user can give.
        PluginError: If a stage cannot be made.
    """
    bound = bind(pipeline.config, info, registry)
    return Explanation(
        pipeline=pipeline.resolved,
        backbone=f"{info.name} {info.source}" + (", untrained" if info.untrained else ""),
        instruction=instruction,
        layout=layout,
        hooks=tuple(
            ExplainedHook(call.hook, name := bound.names[call.stage], str(registry.stage(name).owner), call.layers)
            for calls in bound.hooks.values()
            for call in calls
        ),
        caveats=tuple(
            f"{name}: {caveat}"
            for name, stage in zip(bound.names, bound.stages, strict=True)
            if (caveat := stage.caveats(info))
        ),
        modes={mode: _explain_mode(bound, layout, mode) for mode in pipeline.config.modes},
        ceiling={cut_name(after): ceiling(info, layout, after) for after in (-1, 1)},
        unprunable=_unprunable(info, layout),
    )


def with_depth(info: BackboneInfo, depth: int) -> BackboneInfo:
    """Return the backbone as if its decoder had another number of layers; `source` says so."""
    decoder = replace(info.decoder, depth=depth)
    return replace(info, decoder=decoder, source=f"{info.source}, as if of {depth} layers")


def _explain_mode(bound: BoundPipeline, layout: TokenLayout, mode: str) -> ExplainedMode:
    plan, info = bound.plan(layout, mode), bound.info
    own = planned_flops(bound, layout, mode)
    dense = query_flops(info, Plan.dense(layout, info.decoder.depth, mode)).total
    return ExplainedMode(
        cuts=tuple(
            ExplainedCut(
                after=cut_name(cut.after),
                found=cut.found,
                keep=cut.keep,
                at_most=cut.union,
                views={"+".join(group.views): group.keep for group in cut.groups},
                stages=tuple(bound.names[i] for i in cut.stages),
            )
            for cut in plan.cuts
        ),
        layers=tuple(
            ExplainedLayer(layer, tokens, prunable, flops / 1e9)
            for layer, (tokens, prunable, flops) in enumerate(zip(plan.tokens, plan.prunable, own.layers, strict=True))
        ),
        probes=_probes(bound, plan),
        graph_safe=plan.graph_safe,
        gflops={part: flops / 1e9 for part, flops in {**_parts(own, info), "dense": dense}.items()},
        flop_ratio=dense / own.total,
    )


def _probes(bound: BoundPipeline, plan: Plan) -> tuple[ExplainedProbe, ...]:
    info, layout = bound.info, plan.layout
    declared = {probe for stage in bound.stages for probe in stage.probes(info, layout, plan.mode)}
    probes = sorted((p.layer, rows_name(p.rows), rows_probed(p, layout, plan.tokens), p.ahead) for p in declared)
    return tuple(
        ExplainedProbe(
            layer, rows, count, ahead, probe_flops(info.decoder, count, keys_probed(plan, layer, ahead), ahead) / 1e9
        )
        for layer, rows, count, ahead in probes
    )


def _parts(flops: QueryFlops, info: BackboneInfo) -> dict[str, int]:
    """FLOPs by part, in the order in which a query computes them, then the total."""
    follow_up = {} if info.follow_up is None else {str(info.follow_up.phase): flops.follow_up}
    return {**flops.other, "decoder": flops.decoder, **follow_up, "probes": flops.probe, "total": flops.total}


def _unprunable(info: BackboneInfo, layout: TokenLayout) -> Unprunable | None:
    if info.follow_up is None:
        return None
    dense = query_flops(info, Plan.dense(layout, info.decoder.depth))
    shape, passes = info.follow_up.decoder, info.follow_up.passes
    return Unprunable(
        phase=info.follow_up.phase,
        passes=len(passes),
        most_tokens=max(rows for rows, _ in passes),
        share_of_dense_flops=dense.follow_up / dense.total,
        weights_read_each=shape.depth * layer_weights(shape),
    )
