"""Visual-token pruning for vision-language-action policies, as plugins.

Everything that a strategy, a controller, a host or a spec needs comes from here in one import line; adapters of
backbones import from `tokenprune.engine.adapter`. A name loads on first use: importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenprune._version import __version__ as __version__

if TYPE_CHECKING:
    from tokenprune.compare.episode import load_episode as load_episode
    from tokenprune.compat import mend_torchvision as mend_torchvision
    from tokenprune.engine.executor import Execution as Execution
    from tokenprune.engine.trace import QueryTrace as QueryTrace
    from tokenprune.errors import CapabilityError as CapabilityError
    from tokenprune.errors import CheckpointError as CheckpointError
    from tokenprune.errors import ConfigError as ConfigError
    from tokenprune.errors import EpisodeError as EpisodeError
    from tokenprune.errors import LayoutError as LayoutError
    from tokenprune.errors import MissingError as MissingError
    from tokenprune.errors import ObservationError as ObservationError
    from tokenprune.errors import PluginError as PluginError
    from tokenprune.errors import ResultError as ResultError
    from tokenprune.errors import RolloutError as RolloutError
    from tokenprune.errors import SelectionError as SelectionError
    from tokenprune.errors import SimulatorError as SimulatorError
    from tokenprune.errors import StageError as StageError
    from tokenprune.errors import TokenPruneError as TokenPruneError
    from tokenprune.errors import TraceError as TraceError
    from tokenprune.errors import nearest as nearest
    from tokenprune.loading import from_module as from_module
    from tokenprune.loading import load as load
    from tokenprune.model.info import ActionSpec as ActionSpec
    from tokenprune.model.info import BackboneInfo as BackboneInfo
    from tokenprune.model.info import DecoderShape as DecoderShape
    from tokenprune.model.phase import Phase as Phase
    from tokenprune.policy import ActionChunk as ActionChunk
    from tokenprune.policy import Policy as Policy
    from tokenprune.registry.discovery import Registry as Registry
    from tokenprune.registry.hookspecs import hookimpl as hookimpl
    from tokenprune.registry.specs import BackboneSpec as BackboneSpec
    from tokenprune.registry.specs import EnvironmentSpec as EnvironmentSpec
    from tokenprune.registry.specs import PipelineSpec as PipelineSpec
    from tokenprune.registry.specs import Spec as Spec
    from tokenprune.registry.specs import StageSpec as StageSpec
    from tokenprune.stages.config import CutConfig as CutConfig
    from tokenprune.stages.config import Cuts as Cuts
    from tokenprune.stages.config import Keep as Keep
    from tokenprune.stages.config import Layer as Layer
    from tokenprune.stages.config import Layers as Layers
    from tokenprune.stages.config import StageConfig as StageConfig
    from tokenprune.stages.config import Strict as Strict
    from tokenprune.stages.config import ViewBudget as ViewBudget
    from tokenprune.stages.config import cut_layer as cut_layer
    from tokenprune.stages.config import layer_index as layer_index
    from tokenprune.stages.config import layer_indices as layer_indices
    from tokenprune.stages.control_context import ControlContext as ControlContext
    from tokenprune.stages.control_context import ControlDecision as ControlDecision
    from tokenprune.stages.feature_context import FeatureContext as FeatureContext
    from tokenprune.stages.memory import EpisodeStart as EpisodeStart
    from tokenprune.stages.memory import ExecutedAction as ExecutedAction
    from tokenprune.stages.memory import Slot as Slot
    from tokenprune.stages.memory import flags as flags
    from tokenprune.stages.needs import StageNeeds as StageNeeds
    from tokenprune.stages.query_record import ActionAttention as ActionAttention
    from tokenprune.stages.query_record import QueryRecord as QueryRecord
    from tokenprune.stages.stage import ConfigT as ConfigT
    from tokenprune.stages.stage import Probe as Probe
    from tokenprune.stages.stage import Stage as Stage
    from tokenprune.stages.stage import require_rows as require_rows
    from tokenprune.stages.token_context import LayerContext as LayerContext
    from tokenprune.stages.token_context import SelectContext as SelectContext
    from tokenprune.tokens.budget import UNION as UNION
    from tokenprune.tokens.layout import Role as Role
    from tokenprune.tokens.layout import Segment as Segment
    from tokenprune.tokens.layout import TokenLayout as TokenLayout
    from tokenprune.tokens.plan import Cut as Cut
    from tokenprune.tokens.plan import Plan as Plan
    from tokenprune.tokens.plan import Removal as Removal
    from tokenprune.tokens.positions import Positions as Positions
    from tokenprune.tokens.proposal import Proposal as Proposal
    from tokenprune.tokens.selection import OriginalIds as OriginalIds
    from tokenprune.tokens.selection import TokenSelection as TokenSelection
    from tokenprune.tokens.selection import rows_at as rows_at

_HOME = {
    name: module
    for module, names in {
        "compare.episode": "load_episode",
        "compat": "mend_torchvision",
        "engine.executor": "Execution",
        "engine.trace": "QueryTrace",
        "errors": (
            "CapabilityError CheckpointError ConfigError EpisodeError LayoutError MissingError "
            "ObservationError PluginError ResultError RolloutError SelectionError SimulatorError StageError "
            "TokenPruneError TraceError nearest"
        ),
        "loading": "from_module load",
        "tokens.positions": "Positions",
        "model.info": "ActionSpec BackboneInfo DecoderShape",
        "model.phase": "Phase",
        "policy": "ActionChunk Policy",
        "registry.discovery": "Registry",
        "registry.hookspecs": "hookimpl",
        "registry.specs": "BackboneSpec EnvironmentSpec PipelineSpec Spec StageSpec",
        "stages.config": (
            "CutConfig Cuts Keep Layer Layers StageConfig Strict ViewBudget cut_layer layer_index layer_indices"
        ),
        "stages.control_context": "ControlContext ControlDecision",
        "stages.feature_context": "FeatureContext",
        "stages.memory": "EpisodeStart ExecutedAction Slot flags",
        "stages.needs": "StageNeeds",
        "stages.query_record": "ActionAttention QueryRecord",
        "stages.stage": "ConfigT Probe Stage require_rows",
        "stages.token_context": "LayerContext SelectContext",
        "tokens.budget": "UNION",
        "tokens.layout": "Role Segment TokenLayout",
        "tokens.plan": "Cut Plan Removal",
        "tokens.proposal": "Proposal",
        "tokens.selection": "OriginalIds TokenSelection rows_at",
    }.items()
    for name in names.split()
}
"""Module of each name; the same as above, for when the program runs."""

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the module protocol
    if name not in _HOME:
        raise AttributeError(f"module 'tokenprune' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"tokenprune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
