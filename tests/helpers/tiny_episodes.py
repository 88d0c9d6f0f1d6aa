"""Episodes on a tiny OpenVLA-OFT: its real decoder, pipelines shrunk to its few patches, and a host that acts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.helpers import stages
from tests.helpers.registries import with_stages
from tests.helpers.tiny_oft import INSTRUCTION, tiny_config, tiny_policy_parts
from tokenprune.model.info import BackboneInfo
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.pipelines.loader import load_pipeline, parse_pipeline
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry.discovery import Registry
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.stages.config import StageConfig
from tokenprune.stages.control_context import ControlContext, ControlDecision
from tokenprune.stages.memory import ExecutedAction
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.query_record import QueryRecord
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import LayerContext
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT

VIEWS = ("primary", "wrist", "left")
DEPTH = 8
OTHER_TASK = "open the top drawer of the cabinet"

# Of the 16 patches of a view, each signal is to want some and not others.
_TOPS = ("local_top=4", "previous_top=5", "changed_top=3")
_C3 = ("local_top={coarse: [4, 3], fine: [2, 1]}", "unchanged_cap={coarse: [12, 11], fine: [14, 13]}")

_SHRUNK = {
    "specprune": (*(f"stages.1.{top}" for top in _TOPS), "stages.2.floor=3", "stages.2.per_view=1"),
    "specprune-paper": tuple(f"stages.1.{top}" for top in _TOPS),
    "specprune-c3": (*(f"stages.1.{constant}" for constant in _C3), "stages.2.floor=3"),
    "specprune.static": tuple(f"stages.0.{top}" for top in _TOPS),
    "specprune.dynamic": ("stages.0.per_view=1", "stages.0.keep=0.7"),
    "specprune.controller": (),
}

PRESETS = ("specprune", "specprune-paper", "specprune-c3")
PIPELINES = (*_SHRUNK, "specprune.static_c3")


class ScriptedConfig(StageConfig):
    choices: tuple[str, ...]


class Scripted(Stage[ScriptedConfig]):
    """Chooses the modes it is told, query by query; the last one repeats."""

    Config = ScriptedConfig

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision:
        return ControlDecision(self.config.choices[min(ctx.queries, len(self.config.choices) - 1)])


class Diary(Stage[StageConfig]):
    """Writes down what it observes, and what it is told when a mode is chosen."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__(config)
        self.executed: list[ExecutedAction] = []
        self.queries: list[QueryRecord] = []
        self.controls: list[tuple[str, int, int]] = []

    @hookimpl
    def observe(self, record: ExecutedAction | QueryRecord) -> None:
        (self.executed if isinstance(record, ExecutedAction) else self.queries).append(record)

    @hookimpl
    def control(self, ctx: ControlContext) -> None:
        self.controls.append((ctx.event, len(ctx.executed), len(ctx.since_query)))


class FailingConfig(StageConfig):
    query: int
    layer: int


class Failing(Stage[FailingConfig]):
    """Raises in one query of each episode, after one layer."""

    Config = FailingConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        return super().requirements(info).also_called_after([self.config.layer])

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> None:
        if ctx.slots[0].queries == self.config.query:
            raise ZeroDivisionError("not now")


@cache
def registry() -> Registry:
    """Everything installed, and the stages above under `test.` and their lower-case name."""
    return with_stages(stages.registry(), (Scripted, Diary, Failing), "test", "scorer")


def shrunk(name: str, *overrides: str) -> PipelineConfig:
    """A shipped pipeline, or `specprune.static_c3` alone, with constants that fit 16 patches a view."""
    if name == "specprune.static_c3":
        constants = {"local_top": {"coarse": [4, 3], "fine": [2, 1]}, "unchanged_cap": {"coarse": [12], "fine": [14]}}
        return inline({"use": name, **constants}, modes=["coarse", "fine"])
    return load_pipeline(name, registry(), (*_SHRUNK[name], *overrides)).config


def inline(*entries: dict[str, Any], **settings: Any) -> PipelineConfig:
    """A pipeline of stages given as plain data."""
    data = {"version": 1, "name": "inline", **settings, "stages": list(entries)}
    return parse_pipeline(data, registry(), "inline").config


def changed(config: PipelineConfig, *first: StageConfig, drop: int = 0, **settings: Any) -> PipelineConfig:
    """The same pipeline with stages put before its own, of which the first `drop` are left out."""
    return config.model_copy(update={"stages": (*first, *config.stages[drop:]), **settings})


def scripted(config: PipelineConfig, *choices: str) -> PipelineConfig:
    """The same preset with its controller replaced by one that chooses these modes."""
    return changed(config, ScriptedConfig(use="test.scripted", choices=choices), drop=1)


@cache
def backbone(views: tuple[str, ...] = VIEWS[:2], side: int = 4) -> OpenVLAOFT:
    """Views of `side` x `side` patches; attention is far from uniform, and weights do not depend on the views."""
    config = tiny_config(views, depth=DEPTH)
    towers = tuple(replace(tower, image_size=14 * side) for tower in config.body.towers)
    body = replace(config.body, towers=towers, max_positions=1024)
    made = tiny_policy_parts(replace(config, body=body, transform=replace(config.transform, size=14 * side)))
    for layer in made.model.language_model.model.layers:
        layer.self_attn.q_proj.weight.mul_(8)
    return made


def policy_of(config: PipelineConfig, views: int = 2, side: int = 4) -> Policy:
    return Policy(backbone(VIEWS[:views], side), config, registry())


MOVES = {
    "slow": np.array([0.05, 0.02, -0.1, 0.01, 0, 0, 1]),
    "middling": np.array([0.36, 0, 0.05, 0.25, 0, 0, 0]),
    "fast": np.array([0.6, 0, 0.3, 0.4, 0, 0, 1]),
}
"""Actions that enter `fine`, that change nothing, and that leave it."""

SPEED = {name: float(np.linalg.norm(action[:3])) for name, action in MOVES.items()}


@dataclass(frozen=True)
class Turn:
    """A query, what is executed before the next, and whether the host shows the frames in between."""

    moves: tuple[str, ...] = ("middling",) * 8
    shown: bool = True


@dataclass(frozen=True)
class Episode:
    """What a host lives through; `scene` seeds all it sees."""

    scene: int
    turns: tuple[Turn, ...]
    instruction: str = INSTRUCTION


def episodes(min_turns: int = 1, max_turns: int = 3) -> st.SearchStrategy[Episode]:
    move = st.sampled_from(sorted(MOVES))
    # Lists are mostly short by themselves, and look-back differs in long ones.
    moves = st.sampled_from([8, 8, 5, 1, 0]).flatmap(lambda n: st.lists(move, min_size=n, max_size=n)).map(tuple)
    turns = st.lists(st.builds(Turn, moves, st.booleans()), min_size=min_turns, max_size=max_turns)
    return st.builds(Episode, st.integers(0, 9999), turns.map(tuple), st.sampled_from([INSTRUCTION, OTHER_TASK]))


@cache
def sight(views: tuple[str, ...], scene: int, step: int) -> dict[str, Any]:
    """A scene of which a few places look different at every step."""
    images = {}
    for view in views:
        number = VIEWS.index(view)
        images[view] = np.random.default_rng((scene, number)).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        rng = np.random.default_rng((scene, number, step))
        for top, left in rng.integers(0, 60, (3, 2)):
            images[view][top : top + 20, left : left + 20] = rng.integers(0, 256, (20, 20, 3))
    return {"images": images, "state": np.random.default_rng((scene, step)).normal(size=8)}


class Host:
    """Lives an episode with one slot of a policy."""

    def __init__(self, policy: Policy, episode: Episode, slot: int = 0) -> None:
        self.policy, self.episode, self.slot, self.step = policy, episode, slot, 0
        policy.reset(episode.instruction, slot)

    @property
    def sight(self) -> dict[str, Any]:
        return sight(self.policy.backbone.info.views, self.episode.scene, self.step)

    def act(self) -> ActionChunk:
        return self.policy.act(self.sight, self.slot)

    def execute(self, *moves: str, shown: bool = True) -> list[bool]:
        """Execute actions; whether the policy asks for a new query after each."""
        asked = []
        for move in moves:
            self.step += 1
            seen = self.sight if shown else None
            asked.append(self.policy.executed(MOVES[move], observation=seen, slot=self.slot))
        return asked


def play(policy: Policy, episode: Episode, slot: int = 0) -> Iterator[ActionChunk]:
    """Reset, then query turn by turn; what follows a query is executed when the next one is asked for."""
    host = Host(policy, episode, slot)
    for turn in episode.turns:
        yield host.act()
        host.execute(*turn.moves, shown=turn.shown)


def chosen(chunk: ActionChunk, row: int = 0) -> dict[str, Any]:
    """What a query decided for one batch row, as plain data."""
    trace = chunk.trace
    return {
        "mode": trace.mode,
        "back": {stage: steps[row] for stage, steps in trace.looked_back.items()},
        "kept": kept(chunk, row),
        "why": {after: {n: member[row].tolist() for n, member in why.items()} for after, why in trace.reasons.items()},
        "fallback": trace.fallback,
    }


def everything(chunk: ActionChunk) -> dict[str, Any]:
    """The same with the actions, to the last bit."""
    return {**chosen(chunk), "actions": chunk.normalised.tolist()}


def kept(chunk: ActionChunk, row: int = 0) -> dict[int, list[int]]:
    """Ids kept at each cut."""
    return {after: ids[row].tolist() for after, ids in chunk.trace.kept.items()}


def wanted(chunk: ActionChunk, reason: str) -> int:
    """Tokens kept for a reason, over all cuts and rows."""
    return sum(int(why[reason].sum()) for why in chunk.trace.reasons.values() if reason in why)
