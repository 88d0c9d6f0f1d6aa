"""What is known about a backbone before any weight exists: dimensions, cameras, actions."""

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
        gripper: Dimension of the gripper command, and the value at which it changes sign of meaning; None without one.
        metric: What 1.0 in a group commands per control step, in metres (`translation`) or radians (`rotation`); empty
            where that is not known.
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
    """Passes over tokens behind the layout, which attend to the keys and values that pruning left in each layer.

    Attributes:
        phase: What they are timed as: `DECODE` for autoregressive steps, `FLOW` for those of an action expert.
        decoder: Dimensions of the layers they run through, as many as the main decoder's.
        passes: Tokens of each pass, and how many tokens behind the layout were there before it.
        steps: How many of the last passes are flow steps, which a head cache may spare.
        norms: FLOPs of a layer's adaptive norms in each flow step.
    """

    phase: Phase
    decoder: DecoderShape
    passes: tuple[tuple[int, int], ...]
    steps: int = 0
    norms: int = 0

    def ran(self, interval: int) -> tuple[tuple[int, int, int], ...]:
        """The passes that run if only the first of each `interval` flow steps does, each with its `norms`."""
        once = len(self.passes) - self.steps
        kept = (*((*size, 0) for size in self.passes[:once]), *((*size, self.norms) for size in self.passes[once:]))
        return kept[:once] + kept[once::interval]


class EncoderAnswer(NamedTuple):
    """What stages may learn of the vision towers' attention: FLOPs per query, and numbers it tells of each patch."""

    flops: int
    width: int


@dataclass(frozen=True)
class BackboneInfo:
    """Everything known about a backbone before any weight exists.

    Attributes:
        name: Registered name.
        source: Preset name or checkpoint path.
        untrained: True where the weights are random; shown wherever results are.
        decoder: Its dimensions.
        views: Cameras in sequence order.
        action: What it returns.
        state_size: Numbers of robot state it reads, None where it reads none.
        state_in_prompt: Whether the prompt spells the robot state, so that it is tokenised anew in every query.
        capabilities: Names from `specs.CAPABILITIES` it offers.
        encoder_attention: What stages may ask of the vision towers' attention, such as `cls`.
        other_flops: FLOPs per query outside the decoder, by part (2 per multiply-add).
        other_weights: Numbers in the matrices that each of these parts reads, as often as it reads them in one query.
        unread_logits: Rows of the output layer to which upstream's code multiplies every token of the layout, although
            no query reads those scores; 0 where it does not.
        repeats: Times the layout's tokens go through the decoder in one query.
        follow_up: What comes after them, if anything does.
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
