"""The base class of stages."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar

from tokenprune.stages.config import CutConfig, StageConfig, layer_of

if TYPE_CHECKING:
    from tokenprune.model.info import BackboneInfo
    from tokenprune.stages.memory import Slot
    from tokenprune.tokens.layout import TokenLayout
    from tokenprune.tokens.plan import Cut, Plan

ConfigT = TypeVar("ConfigT", bound=StageConfig)


class Probe(NamedTuple):
    """Attention rows of a layer that has run, or `ahead` of one that is still to run; `all` are the tokens it holds."""

    layer: int
    rows: str | range
    ahead: bool = False


class Stage(Generic[ConfigT]):
    """One plugin object in a pipeline; a fresh instance for every bound pipeline.

    A subclass names its configuration class in `Config` and implements hooks of
    `tokenprune.registry.hookspecs.StageHooks` with `@hookimpl`. It keeps no state of an episode in attributes:
    `ctx.remember` and `ctx.recall` do that per environment, and the runtime clears them.

    Attributes:
        Config: Pydantic class of the stage's part of a pipeline file.
        config: The validated configuration.
    """

    Config: ClassVar[type[StageConfig]] = StageConfig

    def __init__(self, config: ConfigT) -> None:
        """Keep the configuration."""
        self.config = config

    def cuts(self, depth: int) -> tuple[int, ...]:
        """Layers after which this stage has a cut, -1 for before layer 0."""
        if not isinstance(self.config, CutConfig):
            return ()
        return tuple(layer_of(cut, depth) for cut in self.config.after)

    def drops(self, depth: int, mode: str) -> tuple[int, ...]:
        """Those of the cuts that drop anything in a mode."""
        if not isinstance(self.config, CutConfig):
            return ()
        config = self.config
        budgets = {layer: config.budget(mode, number) for number, layer in enumerate(self.cuts(depth))}
        return tuple(layer for layer, budget in budgets.items() if config.views or budget.amount != 1.0)

    def layers(self, depth: int) -> tuple[int, ...]:
        """Layers after which `score_layer` is called; override to look at layers without a cut.

        With -1 among them `select_tokens` is called before layer 0, also without a cut there.
        """
        return tuple(layer for layer in self.cuts(depth) if layer >= 0)

    def watches(self, depth: int) -> tuple[int, ...]:
        """Layers at which `observe` is to be given the action tokens' attention; none unless overridden."""
        return ()

    def encoder(self, info: BackboneInfo) -> tuple[str, ...]:
        """Attention of the vision towers that `ctx.encoder_attention` is to tell; needs `encoder_attention`."""
        return ()

    def skips(self, depth: int) -> tuple[int, ...]:
        """Layers that are left out; none unless overridden, and never the last. Needs `layer_skip`."""
        return ()

    def reuses(self) -> bool:
        """Whether what leaves at this stage's cuts stays visible, with its keys and values of the last query.

        Needs `kv_reuse` and `keep: union`, and no other stage may drop tokens.
        """
        return False

    def merges(self) -> bool:
        """Whether this stage merges tokens at its cuts instead of dropping them; needs `merge`."""
        return False

    def head_interval(self) -> int:
        """Of the action head's flow steps, the first of each so many runs through its layers; every one by default.

        At the others, what the layers added at the last step that ran is added again. Needs `head_cache`.
        """
        return 1

    def host_state(self, slot: Slot) -> Hashable:
        """What a query of this stage depends on besides its mode and tensors: values it reads on the host.

        A query recorded as a CUDA graph is replayed only where they are the same again. Nothing unless overridden.
        """
        return None

    def recordable(self) -> bool:
        """Whether the hooks called in a query do all their work on the device, so that a CUDA graph can replay it."""
        return True

    def bind(self, info: BackboneInfo) -> None:
        """Learn the backbone; called once, before any hook.

        Raises:
            ValueError: If the stage cannot work on it.
            MissingError: If the stage lacks what only the user can give, such as weights of its own.
        """

    def frames(self) -> int:
        """Control steps before the current one whose camera frames are kept for `look_back`; none unless overridden."""
        return 0

    def notes(self, info: BackboneInfo) -> str:
        """What this stage does differently on a backbone, for `explain` and results; may be empty."""
        return ""

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of its own in a query that runs to plan: matrix products of tokens, models beside the policy.

        Attention that it asks the context for, and merging, are counted by the framework. None unless overridden.
        """
        return 0

    def own_cuts(self, plan: Plan) -> list[Cut]:
        """Those of the plan's cuts that are this stage's."""
        return [cut for cut in plan.cuts if cut.after in self.cuts(plan.depth)]

    def findings(self) -> Mapping[str, object]:
        """What a stage that measures has found over all queries so far, plain data for `run`; may be empty."""
        return {}

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """Attention rows this stage computes in a mode; what `explain` counts."""
        return ()


def require_rows(rows: str, info: BackboneInfo) -> None:
    """Refuse to read the attention of action tokens where the decoder has none beside the image.

    Raises:
        ValueError: Saying what to read instead.
    """
    if rows == "action" and "action_rows" not in info.capabilities:
        raise ValueError(
            f"rows: action: backbone '{info.name}' has no action tokens in the pass that scores tokens; read "
            "'instruction' or 'text', or watch the action tokens in `observe` for the next query"
        )
