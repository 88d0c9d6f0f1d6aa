"""Binds a pipeline to a backbone: which hook is called where, what stages need, and one plan per layout and mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pluggy
import torch

from tokenprune.errors import CapabilityError, ConfigError, MissingError, PluginError, StageError, nearest
from tokenprune.model.info import BackboneInfo
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.pipelines.planning import make_plan
from tokenprune.registry.discovery import Registry
from tokenprune.registry.hookspecs import HOT_HOOKS, PROJECT, StageHooks
from tokenprune.stages.config import CutConfig
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.stage import Stage
from tokenprune.tokens.budget import UNION
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables
from tokenprune.tokens.plan import Plan, Removal
from tokenprune.tokens.positions import Positions


@dataclass(frozen=True, slots=True)
class HookCall:
    """One stage's implementation of a hook.

    Attributes:
        hook: Name of the hook.
        stage: Index of the stage.
        function: The bound implementation.
        layers: For `score_layer`, the layers after which it is called.
    """

    hook: str
    stage: int
    function: Callable[..., Any]
    layers: tuple[int, ...] = ()


@dataclass
class BoundPipeline:
    """A pipeline bound to one backbone by `bind`; never shared between policies.

    Attributes:
        config: The resolved pipeline.
        info: The backbone.
        names: `use` of each stage.
        stages: The stage objects in pipeline order.
        needs: What each stage needs from a query.
        hooks: The calls of each hook, in order, without those never made on this backbone.
    """

    config: PipelineConfig
    info: BackboneInfo
    names: tuple[str, ...]
    stages: tuple[Stage[Any], ...]
    needs: tuple[StageNeeds, ...]
    hooks: Mapping[str, tuple[HookCall, ...]]
    _plans: dict[tuple[TokenLayout, str, tuple[int, ...]], Plan] = field(default_factory=dict)
    _tables: dict[tuple[TokenLayout, torch.device], LayoutTables] = field(default_factory=dict)

    def plan(self, layout: TokenLayout, mode: str | None = None, unions: tuple[int, ...] = ()) -> Plan:
        """Return the cached plan of a layout in a mode, by default the pipeline's first."""
        key = (layout, mode or self.config.modes[0], unions)
        if key not in self._plans:
            plan = make_plan(self.stages, self.needs, self.names, layout, key[1], self.info.decoder.depth, unions)
            self._plans[key] = replace(plan, own_flops=sum(stage.own_flops(self.info, plan) for stage in self.stages))
        return self._plans[key]

    def tables(self, layout: TokenLayout, device: torch.device) -> LayoutTables:
        """Return the cached layout tables on a device."""
        key = (layout, device)
        if key not in self._tables:
            self._tables[key] = LayoutTables(layout, device)
        return self._tables[key]

    def call(self, call: HookCall, argument: object, where: str = "") -> Any:  # noqa: ANN401 - what the hook returns
        """Call one implementation of a hook.

        Raises:
            StageError: If it raises; names the stage, the hook and where in the query it was called.
        """
        try:
            return call.function(argument)
        except Exception as error:
            at = f"{call.hook} {where}".rstrip()
            name = self.names[call.stage]
            raise StageError(f"stage '{name}' failed in {at}: {type(error).__name__}: {error}") from error

    @cached_property
    def scorers(self) -> Mapping[int, tuple[HookCall, ...]]:
        """Calls of `score_layer` by the layer they follow."""
        layers = {layer for call in self.hooks["score_layer"] for layer in call.layers}
        return {layer: tuple(c for c in self.hooks["score_layer"] if layer in c.layers) for layer in sorted(layers)}

    @cached_property
    def encoder_attention(self) -> frozenset[str]:
        """Kinds of the vision towers' attention that some stage needs."""
        return frozenset(kind for needs in self.needs for kind in needs.encoder_attention)

    @cached_property
    def action_attention(self) -> frozenset[int]:
        """Layers at which some stage observes the action tokens' attention."""
        return frozenset(layer for needs in self.needs for layer in needs.action_attention)

    @cached_property
    def look_back_frames(self) -> int:
        """Past control steps whose frames some stage may look back at."""
        return max((needs.look_back_frames for needs in self.needs), default=0)

    def weights(self, stages: Sequence[int]) -> list[float]:
        """Weights of some stages' scores."""
        return [getattr(self.stages[index].config, "weight", 1.0) for index in stages]


def bind(config: PipelineConfig, info: BackboneInfo, registry: Registry) -> BoundPipeline:
    """Make new stage objects, check them against the backbone, and decide which hooks are called where.

    Raises:
        CapabilityError: If a stage requires something the backbone does not offer.
        ConfigError: If a cut does not fit the decoder's depth, or stages contradict each other.
        MissingError: If a stage needs something that only the user can provide.
        PluginError: If a stage cannot be made.
    """
    names = tuple(stage.use for stage in config.stages)
    stages: list[Stage[Any]] = []
    needs: list[StageNeeds] = []
    for index, stage_config in enumerate(config.stages):
        registered = registry.stage(stage_config.use)
        missing = sorted(registered.spec.requires - info.capabilities)
        if missing:
            offered = ", ".join(sorted(info.capabilities)) or "none of the optional ones"
            raise CapabilityError(
                f"pipeline '{config.name}', stages.{index}: '{stage_config.use}' requires {', '.join(missing)}, "
                f"which backbone '{info.name}' does not offer (it offers {offered})"
            )
        try:
            stage = registry.stage_class(stage_config.use)(stage_config)
            stage.bind(info)
            own = stage.requirements(info)
            _check_needs(stage, own, info)
        except (ValueError, MissingError) as error:
            wrong = MissingError if isinstance(error, MissingError) else ConfigError
            raise wrong(f"pipeline '{config.name}', stages.{index} ('{stage_config.use}'): {error}") from error
        stages.append(stage)
        needs.append(own)
    _check_skips(config.name, needs, names, info.decoder.depth)
    _check_reuse(config, stages, needs, names)
    return BoundPipeline(config, info, names, tuple(stages), tuple(needs), _hooks(stages, needs, names))


def _check_needs(stage: Stage[Any], needs: StageNeeds, info: BackboneInfo) -> None:
    """Refuse needs that the backbone cannot meet, and cuts where the stage would never be called."""
    for kind in needs.encoder_attention:
        if kind not in info.encoder_attention:
            raise ValueError(
                f"attention: {kind}: the towers of '{info.name}' do not have it{nearest(kind, info.encoder_attention)}"
            )
    if -1 in needs.cuts and not hasattr(stage, "select_tokens"):
        raise ValueError("it cannot cut at 'embedding': it has no select_tokens; give layers in `after`")
    for layer in needs.cuts:
        if layer >= 0 and not (hasattr(stage, "score_layer") and layer in needs.layers):
            raise ValueError(f"it cannot cut after layer {layer}: it has no score_layer there; use `after: embedding`")


def _check_skips(pipeline: str, needs: Sequence[StageNeeds], names: Sequence[str], depth: int) -> None:
    """Refuse to skip the last layer or a layer that a stage uses, and two stages that set the flow interval.

    Raises:
        ConfigError: If a stage does; names the stages.
    """
    skipped = {layer: name for own, name in zip(needs, names, strict=True) for layer in own.skipped_layers}
    if depth - 1 in skipped:
        raise ConfigError(f"pipeline '{pipeline}': '{skipped[depth - 1]}' leaves out the last layer, which is read")
    for own, name in zip(needs, names, strict=True):
        for layer in sorted({*own.cuts, *own.layers, *own.action_attention} & skipped.keys()):
            raise ConfigError(
                f"pipeline '{pipeline}': '{name}' looks at layer {layer}, which '{skipped[layer]}' leaves out"
            )
    owners = [name for own, name in zip(needs, names, strict=True) if own.flow_interval > 1]
    if len(owners) > 1:
        raise ConfigError(f"pipeline '{pipeline}': {' and '.join(owners)} both decide which flow steps run; keep one")


def _check_reuse(
    config: PipelineConfig, stages: Sequence[Stage[Any]], needs: Sequence[StageNeeds], names: Sequence[str]
) -> None:
    """Refuse settings under which a token could leave without valid keys and values of the last query.

    Raises:
        ConfigError: If there is one; names the stage.
    """
    owners = [name for own, name in zip(needs, names, strict=True) if own.removal is Removal.REUSE]
    if not owners:
        return
    where = f"pipeline '{config.name}': '{owners[0]}' reuses keys and values of the last query"
    if config.positions is not Positions.PRESERVE:
        raise ConfigError(f"{where}, which stay at their positions; use positions: preserve")
    for stage, own, name in zip(stages, needs, names, strict=True):
        if not isinstance(stage.config, CutConfig):
            continue
        if own.removal is not Removal.REUSE:
            raise ConfigError(f"{where}, so no token may be dropped; leave out '{name}'")
        kept = {
            stage.config.budget(mode, entry).amount for mode in config.modes for entry in range(len(stage.config.after))
        }
        if stage.config.views or not kept <= {UNION, 1.0}:
            raise ConfigError(f"{where}, where there are any; give it keep: union, which is known only then")


def _hooks(
    stages: Sequence[Stage[Any]], needs: Sequence[StageNeeds], names: Sequence[str]
) -> dict[str, tuple[HookCall, ...]]:
    """Every call that will be made, by hook; the only place that decides this."""
    hooks: dict[str, tuple[HookCall, ...]] = {}
    for name, found in freeze(stages, names).items():
        calls = [HookCall(name, index, function) for index, function in found]
        if name == "select_tokens":
            calls = [call for call in calls if -1 in {*needs[call.stage].cuts, *needs[call.stage].layers}]
        if name == "score_layer":
            calls = [replace(call, layers=tuple(n for n in needs[call.stage].layers if n >= 0)) for call in calls]
            calls = [call for call in calls if call.layers]
        hooks[name] = tuple(calls)
    return hooks


def freeze(stages: Sequence[Stage[Any]], names: Sequence[str]) -> dict[str, list[tuple[int, Callable[..., Any]]]]:
    """Implementations of each hook with the index of their stage, in the order of the calls.

    Read from pluggy once. Stages are registered in reverse, because pluggy calls the last one registered first;
    `tryfirst` and `trylast` keep their meaning.

    Raises:
        PluginError: If an implementation does not fit its specification or wraps a hot hook.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(StageHooks)
    place = {id(stage): index for index, stage in enumerate(stages)}
    for index in reversed(range(len(stages))):
        try:
            manager.register(stages[index], name=f"{index}:{names[index]}")
        except pluggy.PluginValidationError as error:
            raise PluginError(f"stage '{names[index]}': {error}") from error
    hooks: dict[str, list[tuple[int, Callable[..., Any]]]] = {}
    for name in (*HOT_HOOKS, "reset"):
        hooks[name] = []
        for impl in reversed(getattr(manager.hook, name).get_hookimpls()):
            stage = names[place[id(impl.plugin)]]
            if impl.hookwrapper or impl.wrapper:
                raise PluginError(f"stage '{stage}': '{name}' is called in every query and cannot be wrapped")
            if len(impl.argnames) != 1:
                raise PluginError(f"stage '{stage}': '{name}' takes exactly one argument besides self")
            hooks[name].append((place[id(impl.plugin)], impl.function))
    return hooks
