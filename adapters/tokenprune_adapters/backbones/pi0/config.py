"""Configuration, token layout, presets and options of pi0 and pi0.5; no weights, no model code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tokenprune.errors import ConfigError
from tokenprune.model.info import ActionSpec, BackboneInfo, DecoderShape, FollowUp
from tokenprune.model.phase import Phase
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune_adapters.backbones.common.actions import LIBERO_ACTION
from tokenprune_adapters.backbones.common.options import (
    apply_options,
    check_unnorm_key,
    preset_config,
    view_names,
    whole_number,
)
from tokenprune_adapters.backbones.pi0.image_transform import ResizePad
from tokenprune_adapters.backbones.pi0.prompt import PI0_MAX_TOKENS, PI05_MAX_TOKENS, GemmaTokenizer
from tokenprune_adapters.inputs.tokenizer import Prompt
from tokenprune_adapters.vision.attention import encoder_attention
from tokenprune_adapters.vision.transformer import SIGLIP_SO400M_224_PALIGEMMA, ViTConfig
from tokenprune_adapters.vision.transformer import flops as tower_flops
from tokenprune_adapters.vision.transformer import weights as tower_weights

Variant = Literal["pi0", "pi05"]

WIDTH = 32
"""Numbers per action and of robot state inside every release; those that a robot does not use are padding."""

# These releases command the gripper like robosuite, between -1 and 1.
_LIBERO = replace(LIBERO_ACTION, horizon=50, gripper=(6, 0.0))


@dataclass(frozen=True)
class PI0Config:
    """A policy of pi0's family: a vision-language prefix, and an action expert that attends to it and denoises a chunk.

    Attributes:
        variant: `pi0` has a token for the robot state and concatenates actions and time; `pi05` conditions the
            expert's norms on the time and spells the state in the prompt.
        tower: The vision tower of every view.
        decoder: The prefix decoder's shape.
        expert: The action expert's shape, with the same depth and attention heads.
        vocab: Rows of the embedding table.
        action: Chunk length and what the dimensions move.
        views: The cameras, in the order of the release's slots; empty slots have no tokens.
        state_size: Numbers of robot state that are read, None if the policy reads none (pi0.5 only).
        prompt_state: Numbers of state that the prompt spells: `state_size`, or `width` for lerobot before 0.5.0, which
            appended zeros; 0 if the prompt spells no state.
        relative: How many leading numbers of each action are relative to the state of the observation.
        steps: Flow steps per query.
        width: Numbers per action and of state inside the model.
        eps: Epsilon of the decoders' norms.
        rope_theta: Base of the rotary frequencies.
    """

    variant: Variant
    tower: ViTConfig
    decoder: DecoderShape
    expert: DecoderShape
    vocab: int
    action: ActionSpec
    views: tuple[str, ...]
    state_size: int | None
    prompt_state: int = 0
    relative: int = 0
    steps: int = 10
    width: int = WIDTH
    eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def transform(self) -> ResizePad:
        """Image preprocessing."""
        return ResizePad(self.tower.image_size)

    @property
    def has_state_token(self) -> bool:
        """Whether there is a state token before the actions."""
        return self.variant == "pi0"

    @property
    def max_text(self) -> int:
        """Most prompt tokens the release was trained with."""
        return PI0_MAX_TOKENS if self.variant == "pi0" else PI05_MAX_TOKENS

    def encode(self, tokenizer: GemmaTokenizer, instruction: str, state: np.ndarray | None = None) -> Prompt:
        """The prompt of an instruction and, if the prompt spells it, of a normalised state `[S]`; zeros by default."""
        if not self.prompt_state:
            return tokenizer.encode(instruction, self.max_text)
        numbers = np.zeros(self.prompt_state)
        if state is not None:
            numbers[: len(state)] = state
        return tokenizer.encode(instruction, self.max_text, numbers)

    def layout(self, prompt: Prompt) -> TokenLayout:
        """Tokens of the prefix (upstream openpi): the patches of each view, then the prompt.

        Upstream also has tokens for empty camera slots and for padding of the prompt. It masks both, and they do not
        advance the positions, so leaving them out changes nothing. No hidden state of the prefix is read: the expert
        attends to its keys and values.
        """
        rows, cols = self.tower.grid
        patches = [Segment(Role.VISION, 0, rows * cols, view, (rows, cols), prunable=True) for view in self.views]
        first = rows * cols * len(self.views)

        def placed(span: range) -> range:
            return range(first + span.start, first + span.stop)

        spans = {
            "text": placed(range(len(prompt.ids))),
            "instruction": placed(prompt.instruction),
            "readout": range(0),
        }
        if self.prompt_state:
            spans["state"] = placed(prompt.state)
        return TokenLayout.build([*patches, Segment(Role.TEXT, 0, len(prompt.ids))], spans)

    def info(self, source: str, untrained: bool) -> BackboneInfo:
        """The description of the backbone for the core."""
        rows, cols = self.tower.grid
        views, width, horizon = len(self.views), self.expert.hidden, self.action.horizon
        numbers = 2 * 2 * horizon * self.width * width
        if self.has_state_token:
            time, norm = 2 * horizon * 3 * width * width, 0
        else:
            norm = 2 * width * 3 * width
            time = 2 * 2 * width * width + norm
        other = {
            "vision": views * tower_flops(self.tower),
            "projector": views * 2 * rows * cols * self.tower.hidden_size * self.decoder.hidden,
            "actions": self.steps * numbers,
            "time": self.steps * time,
        }
        behind = 0
        if self.has_state_token:
            other["state"] = 2 * self.width * width
            behind = 1
        # Rows per step of each part's matrices; their weights are read once for all rows.
        rows_of = {"actions": horizon, "time": horizon if self.has_state_token else 1, "state": 1}
        weights = {part: n // (2 * rows_of[part]) for part, n in other.items() if part in rows_of}
        weights["vision"] = tower_weights(self.tower)
        weights["projector"] = self.tower.hidden_size * self.decoder.hidden
        passes = ((1, 0),) * behind + ((horizon, behind),) * self.steps
        return BackboneInfo(
            name=self.variant,
            source=source,
            untrained=untrained,
            decoder=self.decoder,
            views=self.views,
            action=self.action,
            state_size=self.state_size,
            state_in_prompt=self.variant == "pi05",
            capabilities=frozenset({"batch", "encoder_attention", "head_cache", "kv_reuse", "layer_skip", "merge"}),
            encoder_attention=encoder_attention((self.tower,), views),
            other_flops=other,
            other_weights=weights,
            follow_up=FollowUp(Phase.FLOW, self.expert, passes, self.steps, 2 * norm),
        )


def _gemma(depth: int, hidden: int, mlp: int, heads: int = 8, head_dim: int = 256) -> DecoderShape:
    return DecoderShape(depth, hidden, heads, 1, head_dim, mlp, causal=False)


BASE = PI0Config(
    variant="pi0",
    tower=SIGLIP_SO400M_224_PALIGEMMA,
    decoder=_gemma(18, 2048, 16384),
    expert=_gemma(18, 1024, 4096),
    vocab=257152,
    action=_LIBERO,
    views=("primary", "wrist"),
    state_size=8,
)

# The release's tokens and proportions, at a size that two CPU cores run in about a second.
SMALL = replace(
    BASE,
    tower=replace(SIGLIP_SO400M_224_PALIGEMMA, hidden_size=288, depth=13, heads=4, mlp_size=1076, tap=12),
    decoder=_gemma(9, 512, 4096, head_dim=64),
    expert=_gemma(9, 256, 1024, head_dim=64),
    vocab=2048,
)

TINY = replace(
    BASE,
    tower=replace(SIGLIP_SO400M_224_PALIGEMMA, image_size=56, hidden_size=24, depth=2, heads=3, mlp_size=40, tap=1),
    decoder=_gemma(3, 32, 64, heads=4, head_dim=8),
    expert=_gemma(3, 16, 32, heads=4, head_dim=8),
    vocab=2048,
)

PRESETS: Mapping[str, PI0Config] = {"base": BASE, "small": SMALL, "tiny": TINY}


def preset(variant: Variant, name: str) -> PI0Config:
    """A preset by name.

    Raises:
        ConfigError: If there is no such preset.
    """
    config = preset_config(variant, name, PRESETS)
    return config if variant == "pi0" else replace(config, variant=variant, prompt_state=8)


def with_options(config: PI0Config, options: Mapping[str, Any]) -> PI0Config:
    """Apply a user's options.

    `views`: one to three camera names in slot order. `horizon`: actions per chunk. `steps`: flow steps. `state_size`:
    numbers of robot state, or null for pi0.5 without any. `dims`: numbers per action. `relative`: how many of them,
    from the first, are relative to the state, which openpi's delta transforms make them. `unnorm_key`, the dataset
    whose statistics a checkpoint uses, is only checked.

    Raises:
        ConfigError: If an option is unknown or its value is not valid.
    """
    config = apply_options(config.variant, config, options, OPTIONS)
    most = min(config.action.dims, config.state_size or 0)
    if config.relative > most:
        raise ConfigError(f"relative is {config.relative}; this policy's actions and state share {most} numbers")
    return config


def _with_views(config: PI0Config, value: object) -> PI0Config:
    return replace(config, views=view_names(value, "slot"))


def _with_horizon(config: PI0Config, value: object) -> PI0Config:
    return replace(config, action=replace(config.action, horizon=whole_number("horizon", value)))


def _with_steps(config: PI0Config, value: object) -> PI0Config:
    return replace(config, steps=whole_number("steps", value))


def _with_state_size(config: PI0Config, value: object) -> PI0Config:
    if value is None and config.variant == "pi05":
        return replace(config, state_size=None, prompt_state=0)
    size = whole_number("state_size", value, most=config.width)
    return replace(config, state_size=size, prompt_state=0 if config.variant == "pi0" else size)


def _with_dims(config: PI0Config, value: object) -> PI0Config:
    dims = whole_number("dims", value, most=config.width)
    if dims == config.action.dims:
        return config
    if dims == _LIBERO.dims:
        return replace(config, action=replace(_LIBERO, horizon=config.action.horizon))
    groups = {"joints": tuple(range(dims))}
    return replace(config, action=ActionSpec(horizon=config.action.horizon, groups=groups))


def _with_relative(config: PI0Config, value: object) -> PI0Config:
    return replace(config, relative=whole_number("relative", value, least=0))


OPTIONS: Mapping[str, Callable[[PI0Config, object], PI0Config]] = {
    "views": _with_views,
    "horizon": _with_horizon,
    "steps": _with_steps,
    "state_size": _with_state_size,
    "dims": _with_dims,
    "relative": _with_relative,
    "unnorm_key": check_unnorm_key,
}
"""What `with_options` accepts."""
