"""The base class of stages."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar

from tokenprune.stages.config import CutConfig, StageConfig, cut_layer
from tokenprune.stages.needs import StageNeeds

if TYPE_CHECKING:
    from tokenprune.model.info import BackboneInfo
    from tokenprune.stages.memory import Slot
    from tokenprune.tokens.layout import TokenLayout
    from tokenprune.tokens.plan import Cut, Plan

ConfigT = TypeVar("ConfigT", bound=StageConfig)
"""Configuration class of a base that several stages share: `class Base(Stage[ConfigT])`."""


class Probe(NamedTuple):
    """Attention rows a stage computes at a layer; `ahead` if the layer has not run yet, `all` for all its tokens."""

    layer: int
    rows: str | range
    ahead: bool = False


class Stage(Generic[ConfigT]):
    """One plugin object in a pipeline; a fresh instance for every bound pipeline.

    A subclass names its configuration class in `Config` and implements hooks of
    `tokenprune.registry.hookspecs.StageHooks` with `@hookimpl`. It keeps no state of an episode in attributes:
    `ctx.remember` and `ctx.recall` keep it per environment, and `Policy.reset` clears it.

    Attributes:
        Config: Pydantic class of the stage's entry in a pipeline file.
        config: The validated configuration.
    """

    Config: ClassVar[type[StageConfig]] = StageConfig

    def __init__(self, config: ConfigT) -> None:
        """Store the configuration."""
        self.config = config
        self._drops: dict[tuple[int, str], tuple[int, ...]] = {}

    def cuts(self, depth: int) -> tuple[int, ...]:
        """Layers after which this stage cuts, -1 for before layer 0; one for each entry of `after`."""
        if not isinstance(self.config, CutConfig):
            return ()
        return tuple(cut_layer(cut, depth) for cut in self.config.after)

    def drops(self, depth: int, mode: str) -> tuple[int, ...]:
        """Layers of the cuts that may drop tokens in a mode."""
        if not isinstance(self.config, CutConfig):
            return ()
        # Stages ask in every query; a configuration never changes.
        if (depth, mode) not in self._drops:
            config = self.config
            budgets = {layer: config.budget(mode, number) for number, layer in enumerate(self.cuts(depth))}
            dropping = (layer for layer, budget in budgets.items() if config.views or budget.amount != 1.0)
            self._drops[depth, mode] = tuple(dropping)
        return self._drops[depth, mode]

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """What this stage needs from every query; read once, after `bind`.

        By default only its cuts. Override it with `replace(super().requirements(info), ...)`.
        """
        cuts = self.cuts(info.decoder.depth)
        return StageNeeds(cuts).also_called_after(layer for layer in cuts if layer >= 0)

    def host_state(self, slot: Slot) -> Hashable:
        """Host values that this stage's hooks depend on besides the mode; None by default.

        A CUDA graph is replayed only in queries with equal values.
        """
        return None

    def bind(self, info: BackboneInfo) -> None:
        """Prepare for a backbone; called once, before any hook.

        Raises:
            ValueError: If the stage cannot work on it.
            MissingError: If the stage needs something that only the user can provide, such as weights.
        """

    def caveats(self, info: BackboneInfo) -> str:
        """What this stage does differently on a backbone, for `explain` and results; may be empty."""
        return ""

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the stage's own matrix products and models in a query that runs as planned; 0 by default.

        The framework counts merging and attention computed by the context.
        """
        return 0

    def own_cuts(self, plan: Plan) -> list[Cut]:
        """Cuts of the plan at which this stage cuts."""
        return [cut for cut in plan.cuts if cut.after in self.cuts(plan.depth)]

    def findings(self) -> Mapping[str, object]:
        """What a measuring stage found over all queries so far, as plain data for `run`; may be empty."""
        return {}

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """Attention rows this stage computes in a mode, whose FLOPs `explain` counts; none by default."""
        return ()


def require_rows(rows: str, info: BackboneInfo) -> None:
    """Refuse `rows: action` on a backbone without action tokens in the prefill.

    Raises:
        ValueError: If the backbone has none; names the rows to read instead.
    """
    if rows == "action" and "action_rows" not in info.capabilities:
        raise ValueError(
            f"rows: action: backbone '{info.name}' has no action tokens in the pass that scores tokens; read "
            "'instruction' or 'text', or watch the action tokens in `observe` for the next query"
        )
