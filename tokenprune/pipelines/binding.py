"""A pipeline bound to a backbone: frozen stage callables and one plan per layout and mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from tokenprune.stages.stage import Stage
from tokenprune.tokens.budget import UNION
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables
from tokenprune.tokens.plan import Plan

Hook = tuple[int, Callable[..., Any]]
"""Index of the stage and its implementation, bound."""


@dataclass
class BoundPipeline:
    """What runs: made by `bind`, shared by nothing else.

    Attributes:
        config: The pipeline file, resolved.
        info: The backbone it was bound to.
        names: `use` of each stage.
        stages: The stage objects in pipeline order.
        encoder: Attention of the vision towers that some stage asks for.
        hooks: Per hook point, implementations in pipeline order.
    """

    config: PipelineConfig
    info: BackboneInfo
    names: tuple[str, ...]
    stages: tuple[Stage[Any], ...]
    encoder: frozenset[str]
    hooks: dict[str, tuple[Hook, ...]]
    _plans: dict[tuple[TokenLayout, str, tuple[int, ...]], Plan] = field(default_factory=dict)
    _tables: dict[tuple[TokenLayout, torch.device], LayoutTables] = field(default_factory=dict)

    def plan(self, layout: TokenLayout, mode: str | None = None, unions: tuple[int, ...] = ()) -> Plan:
        """The plan of a layout in a mode (the default one when left out), made once and kept."""
        key = (layout, mode or self.config.modes[0], unions)
        if key not in self._plans:
            plan = make_plan(self.stages, self.names, layout, key[1], self.info.decoder.depth, unions)
            self._plans[key] = replace(plan, own_flops=sum(stage.own_flops(self.info, plan) for stage in self.stages))
        return self._plans[key]

    def tables(self, layout: TokenLayout, device: torch.device) -> LayoutTables:
        """The layout as tensors on a device, made once and kept."""
        key = (layout, device)
        if key not in self._tables:
            self._tables[key] = LayoutTables(layout, device)
        return self._tables[key]

    def call(self, index: int, hook_name: str, hook: Callable[..., Any], argument: object, where: str = "") -> Any:  # noqa: ANN401
        """Call one implementation.

        Raises:
            StageError: If it raises, naming the stage, the hook and where in the query it was called.
        """
        try:
            return hook(argument)
        except Exception as error:
            at = f"{hook_name} {where}".rstrip()
            raise StageError(f"stage '{self.names[index]}' failed in {at}: {type(error).__name__}: {error}") from error

    @property
    def frames(self) -> int:
        """Control steps before the current one whose frames some stage may look back at."""
        return max((stage.frames() for stage in self.stages), default=0)

    def weights(self, stages: Sequence[int]) -> list[float]:
        """Weights of some stages' scores."""
        return [getattr(self.stages[index].config, "weight", 1.0) for index in stages]


def bind(config: PipelineConfig, info: BackboneInfo, registry: Registry) -> BoundPipeline:
    """Make fresh stage objects, check them against the backbone, and freeze their hooks.

    Raises:
        CapabilityError: If a stage requires something the backbone does not offer.
        ConfigError: If a cut does not fit the decoder's depth.
        MissingError: If a stage lacks what only the user can give.
        PluginError: If a stage cannot be made.
    """
    names = tuple(stage.use for stage in config.stages)
    stages = []
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
            for kind in stage.encoder(info):
                if kind not in info.encoder_attention:
                    raise ValueError(
                        f"attention: {kind}: the towers of '{info.name}' do not have it"
                        f"{nearest(kind, info.encoder_attention)}"
                    )
            _check_cuts(stage, info.decoder.depth)
        except (ValueError, MissingError) as error:
            wrong = MissingError if isinstance(error, MissingError) else ConfigError
            raise wrong(f"pipeline '{config.name}', stages.{index} ('{stage_config.use}'): {error}") from error
        stages.append(stage)
    _check_skips(config.name, stages, names, info.decoder.depth)
    _check_reuse(config, stages, names)
    asked = frozenset(kind for stage in stages for kind in stage.encoder(info))
    return BoundPipeline(config, info, names, tuple(stages), asked, freeze(stages, names))


def _check_skips(pipeline: str, stages: Sequence[Stage[Any]], names: Sequence[str], depth: int) -> None:
    """Refuse to leave out the last layer, or one at which a stage acts; and two owners of the head's steps.

    Raises:
        ConfigError: Naming the stages.
    """
    skipped = {layer: name for stage, name in zip(stages, names, strict=True) for layer in stage.skips(depth)}
    if depth - 1 in skipped:
        raise ConfigError(f"pipeline '{pipeline}': '{skipped[depth - 1]}' leaves out the last layer, which is read")
    for stage, name in zip(stages, names, strict=True):
        for layer in sorted({*stage.cuts(depth), *stage.layers(depth), *stage.watches(depth)} & skipped.keys()):
            raise ConfigError(
                f"pipeline '{pipeline}': '{name}' looks at layer {layer}, which '{skipped[layer]}' leaves out"
            )
    owners = [name for stage, name in zip(stages, names, strict=True) if stage.head_interval() > 1]
    if len(owners) > 1:
        raise ConfigError(f"pipeline '{pipeline}': {' and '.join(owners)} both decide which flow steps run; keep one")


def _check_reuse(config: PipelineConfig, stages: Sequence[Stage[Any]], names: Sequence[str]) -> None:
    """Refuse what would let a token leave whose keys and values of the last query nobody has, or has elsewhere.

    Raises:
        ConfigError: Naming the stage.
    """
    owners = [name for stage, name in zip(stages, names, strict=True) if stage.reuses()]
    if not owners:
        return
    where = f"pipeline '{config.name}': '{owners[0]}' reuses keys and values of the last query"
    if config.positions != "preserve":
        raise ConfigError(f"{where}, which stay at their positions; use positions: preserve")
    for stage, name in zip(stages, names, strict=True):
        if not isinstance(stage.config, CutConfig):
            continue
        if not stage.reuses():
            raise ConfigError(f"{where}, so no token may be dropped; leave out '{name}'")
        kept = {
            stage.config.budget(mode, entry).amount for mode in config.modes for entry in range(len(stage.config.after))
        }
        if stage.config.views or not kept <= {UNION, 1.0}:
            raise ConfigError(f"{where}, where there are any; give it keep: union, which is known only then")


def _check_cuts(stage: Stage[Any], depth: int) -> None:
    """Refuse cuts at layers the decoder lacks, and cuts at which the stage could never be asked."""
    cuts, asked = stage.cuts(depth), stage.layers(depth)
    if -1 in cuts and not hasattr(stage, "select_tokens"):
        raise ValueError("it cannot cut at 'embedding': it has no select_tokens; give layers in `after`")
    for layer in cuts:
        if layer >= 0 and not (hasattr(stage, "score_layer") and layer in asked):
            raise ValueError(f"it cannot cut after layer {layer}: it has no score_layer there; use `after: embedding`")


def freeze(stages: Sequence[Stage[Any]], names: Sequence[str]) -> dict[str, tuple[Hook, ...]]:
    """Read pluggy's order once and keep plain callables.

    Stages are registered in reverse, because pluggy calls the last one registered first and the file's order is the
    contract; `tryfirst` and `trylast` keep their meaning.

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
    hooks: dict[str, tuple[Hook, ...]] = {}
    for name in (*HOT_HOOKS, "reset"):
        found = []
        for impl in reversed(getattr(manager.hook, name).get_hookimpls()):
            if impl.hookwrapper or impl.wrapper:
                raise PluginError(
                    f"stage '{names[place[id(impl.plugin)]]}': '{name}' is called in every query and cannot be wrapped"
                )
            if len(impl.argnames) != 1:
                raise PluginError(
                    f"stage '{names[place[id(impl.plugin)]]}': '{name}' takes exactly one argument besides self"
                )
            found.append((place[id(impl.plugin)], impl.function))
        hooks[name] = tuple(found)
    return hooks
