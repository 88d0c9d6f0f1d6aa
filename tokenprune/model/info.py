"""What is known about a backbone without its weights: dimensions, cameras, actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenprune.model.phase import Phase


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The decoder's dimensions, enough to count its FLOPs."""

    depth: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    causal: bool


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """The actions a policy returns.

    Attributes:
        horizon: Actions per chunk.
        groups: Dimensions of each action by what they move, such as `translation: (0, 1, 2)`.
        gripper: Dimension of the gripper command, and the threshold between open and closed; None without a gripper.
        metric: What 1.0 in a group commands per control step, in metres (`translation`) or radians (`rotation`); empty
            if unknown.
    """

    horizon: int
    groups: Mapping[str, tuple[int, ...]]
    gripper: tuple[int, float] | None = None
    metric: Mapping[str, float] = field(default_factory=dict)

    @property
    def dims(self) -> int:
        """Numbers per action."""
        return sum(len(dims) for dims in self.groups.values())


@dataclass(frozen=True, slots=True)
class FollowUp:
    """Passes after the prefill, over tokens that attend to the keys and values left in each layer.

    Attributes:
        phase: `DECODE` for autoregressive steps, `FLOW` for flow steps of an action expert.
        decoder: Dimensions of the layers they run through, as many as the main decoder's.
        passes: Per pass, its tokens, and the tokens already cached after the layout's.
        steps: Number of flow steps, which come last; a head cache may skip some.
        norms: FLOPs of a layer's adaptive norms in each flow step.
    """

    phase: Phase
    decoder: DecoderShape
    passes: tuple[tuple[int, int], ...]
    steps: int = 0
    norms: int = 0

    def ran(self, interval: int) -> tuple[tuple[int, int, int], ...]:
        """Passes that run, as (tokens, cached tokens, FLOPs of norms), if one of every `interval` flow steps does."""
        once = len(self.passes) - self.steps
        kept = (*((*size, 0) for size in self.passes[:once]), *((*size, self.norms) for size in self.passes[once:]))
        return kept[:once] + kept[once::interval]


class EncoderAnswer(NamedTuple):
    """One kind of the vision towers' attention: its FLOPs per query, and its values per patch."""

    flops: int
    width: int


@dataclass(frozen=True)
class BackboneInfo:
    """What is known about a backbone without its weights.

    Attributes:
        name: Registered name.
        source: Preset name or checkpoint path.
        untrained: Whether the weights are random; shown with every result.
        decoder: Its dimensions.
        views: Cameras in sequence order.
        action: Its actions.
        state_size: Size of the robot state it reads; None if it reads none.
        state_in_prompt: Whether the prompt contains the robot state, and so is tokenised in every query.
        capabilities: Names from `specs.CAPABILITIES` it offers.
        encoder_attention: Kinds of the vision towers' attention it offers to stages, such as `cls`.
        other_flops: FLOPs per query outside the decoder, by part (2 per multiply-add).
        other_weights: Matrix parameters that each of these parts reads in one query, counted once per read.
        unread_logits: Vocabulary rows of the logits that upstream computes for every token and no query reads; 0 if
            upstream does not.
        repeats: Passes of the layout's tokens through the decoder in one query.
        follow_up: Passes after the prefill, if any.
    """

    name: str
    source: str
    untrained: bool
    decoder: DecoderShape
    views: tuple[str, ...]
    action: ActionSpec
    state_size: int | None = None
    state_in_prompt: bool = False
    capabilities: frozenset[str] = frozenset()
    encoder_attention: Mapping[str, EncoderAnswer] = field(default_factory=dict)
    other_flops: Mapping[str, int] = field(default_factory=dict)
    other_weights: Mapping[str, int] = field(default_factory=dict)
    unread_logits: int = 0
    repeats: int = 1
    follow_up: FollowUp | None = None
