"""Every hook: when it is called, what it returns, what None means, and what it may cost.

A plugin module implements `PluginHooks`; a stage implements the hooks of `StageHooks` that it uses, each decorated with
`@hookimpl`. The hot hooks (`control` to `observe`) become plain function calls when a pipeline is bound, so hook
wrappers are refused. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from tokenprune.registry.specs import Spec
    from tokenprune.stages.control_context import ControlContext, ControlDecision
    from tokenprune.stages.feature_context import FeatureContext
    from tokenprune.stages.memory import EpisodeStart, ExecutedAction
    from tokenprune.stages.query_record import QueryRecord
    from tokenprune.stages.token_context import LayerContext, SelectContext
    from tokenprune.tokens.proposal import Proposal

PROJECT = "tokenprune"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Decorator of a method, or of a plugin module's function, that implements a hook point."""


class PluginHooks:
    """Hooks of a plugin module, the module that its entry point names."""

    @hookspec
    def tokenprune_register(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Return the specs of this plugin's stages, pipelines, backbones and environments.

        Called once, when plugins are discovered. The module must not import torch: specs name classes as strings,
        `"module:Class"`. A name that is already taken is an error that names both owners.
        """


class StageHooks:
    """Hooks of a stage; every hook is optional.

    Hooks of several stages are called in pipeline order, unless `@hookimpl(tryfirst=True)` or `trylast=True` says
    otherwise.
    """

    @hookspec
    def reset(self, episode: EpisodeStart) -> None:
        """Prepare for a new episode in one slot.

        Called: at each `Policy.reset`.
        Cost: not limited.

        Most stages do not need it: values kept with `ctx.remember` are cleared by `Policy.reset`.
        """

    @hookspec(firstresult=True)
    def control(self, ctx: ControlContext) -> ControlDecision | None:
        """Choose the mode of the next query.

        Called: once per slot before each query, and after each executed action (`ctx.event`).
        Cost: microseconds, on host data only.

        Returns:
            A decision, or None to abstain. The first decision counts; if all stages abstain, the pipeline's first mode
            is used. After an executed action, `Policy.executed` returns `replan` to the host.
        """

    @hookspec
    def look_back(self, ctx: ControlContext) -> int | None:
        """Return the age, in control steps, of the past frame that the stage compares with the current one.

        Called: once per query and slot, before the model runs.
        Cost: microseconds, on host data only; the framework then crops and uploads one frame.

        Returns:
            The age, 0 for the current frame, or None for no frame. `ctx.past_images` is the newest frame at least that
            old, else the oldest past frame. `StageNeeds.look_back_frames` is the largest age to keep.
        """

    @hookspec
    def transform_features(self, ctx: FeatureContext) -> Tensor | None:
        """Change the features of one view between the vision towers and the projector.

        Called: once per view and query.
        Cost: part of every query; must not wait for the device.

        Returns:
            Features of the same shape `[B, N, D]`, or None to leave them unchanged. The next stage gets the result.
        """

    @hookspec
    def select_tokens(self, ctx: SelectContext) -> Proposal | None:
        """Propose which tokens enter the decoder.

        Called: once per query before layer 0, if the stage cuts at `embedding` or `StageNeeds.layers` has -1.
        Cost: part of every query; must not wait for the device.

        Returns:
            A proposal, or None to abstain. The proposals of all stages at a cut are resolved together; if all abstain,
            the query fails. Without a cut here, the stage only reads and returns None.
        """

    @hookspec
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Propose which tokens enter the next layer.

        Called: once per query after each layer in `StageNeeds.layers`.
        Cost: part of every query, once per layer; must not wait for the device.

        Returns:
            As `select_tokens`. At layers without a cut of the stage, it only reads and returns None.
        """

    @hookspec
    def observe(self, record: QueryRecord | ExecutedAction) -> None:
        """Read a finished query, or an action that the robot executed.

        Called: after each query with a `QueryRecord`, and at each `Policy.executed` with an `ExecutedAction`.
        Cost: part of every query and control step; must not wait for the device.

        A `QueryRecord` has the action tokens' attention at the layers in `StageNeeds.action_attention`. Values kept
        with `record.remember` are read with `ctx.recall` in the next query.
        """


HOT_HOOKS = ("control", "look_back", "transform_features", "select_tokens", "score_layer", "observe")
