"""Every hook point in one place: when it is called, how often, what it returns, what None means, what it may cost.

Plugins implement the first class in the module their entry point names; stages implement any part of the second.
The hot hooks (`control` to `observe`) are frozen into plain calls when a pipeline is bound: they accept no hook
wrappers, and none of them is called where no stage implements it. Imports no torch.
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
    """What a plugin module implements."""

    @hookspec
    def tokenprune_register(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Name the stages, pipelines, backbones and environments of this plugin.

        Called once per process, when the registry is built (cold). The module must not import torch: specs name
        their classes as `"module:Class"` strings.

        Returns:
            Specs; a name that is taken is refused, naming both owners.
        """


class StageHooks:
    """What a stage implements, each with `@hookimpl`."""

    @hookspec
    def reset(self, episode: EpisodeStart) -> None:
        """Forget the last episode.

        Called at each `Policy.reset`, for one slot (cold). State that belongs to an episode is better kept through
        `ctx.remember`, which the runtime clears by itself. All implementations are called.
        """

    @hookspec(firstresult=True)
    def control(self, ctx: ControlContext) -> ControlDecision | None:
        """Choose the mode of the next query from what was executed.

        Called before each query and after each executed action, per slot, on host data only (cost: per control step,
        microseconds). None means no opinion; the first stage with one wins, and the pipeline's first mode is the
        default. `replan` counts after an executed action: `Policy.executed` hands it to the host.
        """

    @hookspec
    def look_back(self, ctx: ControlContext) -> int | None:
        """Say how many control steps ago the frame was taken that the stage compares with the current one.

        Called once per query and slot before images are uploaded, on host data only (cost: per query, and one frame
        to crop and upload). The stage then sees, through `ctx.past_images`, the newest frame at least that old, or
        the oldest past one; 0 is the current frame. `StageNeeds.look_back_frames` says how many past frames are kept.
        None: no frame.
        """

    @hookspec
    def transform_features(self, ctx: FeatureContext) -> Tensor | None:
        """Replace the features of one view after the vision towers.

        Called once per view and query, on the device (cost: per query). Returns `[B, N, D]` as given, or None to
        leave them; implementations are chained in pipeline order.
        """

    @hookspec
    def select_tokens(self, ctx: SelectContext) -> Proposal | None:
        """Say which tokens should enter the decoder.

        Called once per query before layer 0, on the device, for stages whose cut is at `embedding` and for those that
        declared layer -1 (cost: per query). None abstains; the other stages at the cut then decide, and if all abstain
        the query fails. Without a cut there the call is for looking, and returns None.
        """

    @hookspec
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Say which tokens should go on to the next layer.

        Called once per query after each layer in `StageNeeds.layers`, on the device (cost: per layer). A proposal
        counts where the stage has a cut; elsewhere the call is for looking, and returns None.
        """

    @hookspec
    def observe(self, record: QueryRecord | ExecutedAction) -> None:
        """Look at a finished query, or at an action the robot executed.

        Called after each query, and for each `Policy.executed` (cost: per query, per control step). All are called.
        The record of a query holds the action tokens' attention at the layers in `StageNeeds.action_attention`; what it
        remembers, the stage recalls in the next query.
        """


HOT_HOOKS = ("control", "look_back", "transform_features", "select_tokens", "score_layer", "observe")
