"""OpenVLA-OFT's configuration, token layout, presets and options; no weights, no model code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from tokenprune.errors import ConfigError, nearest
from tokenprune.model.info import ActionSpec, BackboneInfo, DecoderShape
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune_adapters import OFT_TRAINED
from tokenprune_adapters.backbones.common.actions import LIBERO_ACTION
from tokenprune_adapters.backbones.common.options import (
    apply_options,
    check_unnorm_key,
    choice,
    flag,
    preset_config,
    view_names,
    whole_number,
)
from tokenprune_adapters.backbones.openvla_oft.heads import head_flops, noisy_action_flops, proprio_flops
from tokenprune_adapters.backbones.prismatic.config import PrismaticConfig, lm_head_flops, preset_body
from tokenprune_adapters.backbones.prismatic.image_transform import (
    CENTER_CROP_AREA,
    SIGLIP_MEAN,
    SIGLIP_STD,
    ImageTransform,
)
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.tokenizer import Prompt
from tokenprune_adapters.vision.attention import encoder_attention
from tokenprune_adapters.vision.transformer import ViTConfig

Head = Literal["l1", "diffusion", "discrete"]

TRAIN_STEPS = 50
"""Timesteps that diffusion heads are trained with, and the default of sampling steps (upstream OpenVLA-OFT)."""


@dataclass(frozen=True)
class Constants:
    """Constants of a robot, which upstream OpenVLA-OFT keeps in its code and not in a checkpoint.

    Attributes:
        action: Chunk length and what the dimensions move.
        views: Cameras in sequence order.
        state_size: Numbers of robot state.
        bounds: Names of the statistics that are mapped to -1 and 1.
    """

    action: ActionSpec
    views: tuple[str, ...]
    state_size: int
    bounds: tuple[str, str]


CONSTANTS: Mapping[str, Constants] = {
    "libero": Constants(replace(LIBERO_ACTION, horizon=8), ("primary", "wrist"), 8, ("q01", "q99")),
    "aloha": Constants(
        ActionSpec(horizon=25, groups={"joints": tuple(range(14))}),
        ("high", "left_wrist", "right_wrist"),
        14,
        ("min", "max"),
    ),
    # The controller is not LIBERO's, so it is not known how far an action of 1.0 moves.
    "bridge": Constants(replace(LIBERO_ACTION, horizon=5, metric={}), ("primary",), 7, ("q01", "q99")),
}


@dataclass(frozen=True)
class OFTConfig:
    """An OpenVLA-OFT policy.

    Attributes:
        body: Towers, projector and decoder; the instruction modulates towers with FiLM.
        action: Chunk length and what the dimensions move.
        views: Cameras in sequence order, third-person first, one to three.
        state_size: Numbers of robot state in the proprio token, None without one.
        transform: Image preprocessing.
        bounds: Names of the statistics that are mapped to -1 and 1, for actions and state.
        head: The action head: `l1` regression; `diffusion`, one decoder pass per denoising step; or `discrete`, tokens
            of the vocabulary.
        steps: Denoising steps per query of a diffusion head.
        restrict: Choose discrete tokens among the action ids only. Upstream chooses among all ids, and any other gives
            an extreme action.
        padding: Padding rows of the embedding table; the action ids are the last ones before them.
        n_bins: Number of action ids.
    """

    body: PrismaticConfig
    action: ActionSpec
    views: tuple[str, ...]
    state_size: int | None
    transform: ImageTransform
    bounds: tuple[str, str] = ("q01", "q99")
    head: Head = "l1"
    steps: int = TRAIN_STEPS
    restrict: bool = False
    padding: int = 64
    n_bins: int = 256

    @property
    def film(self) -> bool:
        """Whether the instruction modulates the towers."""
        return self.body.towers[0].film is not None

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary, without the padding rows."""
        return self.body.vocab - self.padding

    def encode(self, tokenizer: PromptTokenizer, instruction: str) -> Prompt:
        """The prompt of an instruction."""
        return tokenizer.encode(instruction, self.max_text)

    def layout(self, prompt: Prompt) -> TokenLayout:
        """Tokens of a query (upstream OpenVLA-OFT).

        BOS, the patches of each view, the proprio token, the prompt, whose last token is the empty token, one
        placeholder per number of the chunk, and a stop token. Number i of the chunk is read one position early: the
        first at the empty token, the others at placeholder i-1.

        A diffusion head has a timestep token between proprio and prompt. Its role is `state`: it holds the state of the
        denoising and is no part of the prompt.
        """
        rows, cols = self.body.towers[0].grid
        patches = [Segment(Role.VISION, 0, rows * cols, view, (rows, cols), prunable=True) for view in self.views]
        single = [Role.PROPRIO] if self.state_size is not None else []
        single += [Role.STATE] if self.head == "diffusion" else []
        numbers = self.action.horizon * self.action.dims
        text = 1 + sum(p.length for p in patches) + len(single)
        action = text + len(prompt.ids)
        segments = [
            Segment(Role.BOS, 0, 1),
            *patches,
            *(Segment(role, 0, 1) for role in single),
            Segment(Role.TEXT, 0, len(prompt.ids)),
            Segment(Role.ACTION, 0, numbers),
            Segment(Role.STOP, 0, 1),
        ]
        instruction = range(text + prompt.instruction.start, text + prompt.instruction.stop)
        spans = {
            "text": range(text, action),
            "instruction": instruction,
            "action": range(action, action + numbers),
            "readout": range(action - 1, action - 1 + numbers),
        }
        return TokenLayout.build(segments, spans)

    @property
    def max_text(self) -> int:
        """Prompt tokens that still fit beside the other tokens."""
        rows, cols = self.body.towers[0].grid
        single = 2 + (self.state_size is not None) + (self.head == "diffusion")
        others = single + self.action.horizon * self.action.dims + rows * cols * len(self.views)
        return self.body.max_positions - others

    def info(self, source: str, untrained: bool) -> BackboneInfo:
        """The description of the backbone for the core."""
        width, horizon, dims = self.body.decoder.hidden, self.action.horizon, self.action.dims
        repeats = self.steps if self.head == "diffusion" else 1
        other = self.body.vision_flops(len(self.views))
        if self.state_size is not None:
            other["proprio"] = proprio_flops(self.state_size, width)
        if self.head == "discrete":
            other["lm_head"] = lm_head_flops(horizon, dims, width, self.body.vocab)
        else:
            other["head"] = repeats * head_flops(horizon, dims, width)
        if self.head == "diffusion":
            other["noisy_actions"] = repeats * noisy_action_flops(horizon, dims, width)
        weights = self.body.vision_weights()
        if self.state_size is not None:
            weights["proprio"] = proprio_flops(self.state_size, width) // 2
        if self.head == "discrete":
            weights["lm_head"] = width * self.body.vocab
        else:
            weights["head"] = repeats * head_flops(1, dims, width) // 2
        if self.head == "diffusion":
            weights["noisy_actions"] = repeats * noisy_action_flops(1, 1, width) // 2
        offered = {"action_rows", "batch", "encoder_attention", "layer_skip"}
        if self.head != "diffusion":
            # Diffusion runs the same tokens in every step, and would have to reuse or merge again in each.
            offered |= {"kv_reuse", "merge"}
        return BackboneInfo(
            name="openvla-oft",
            source=source,
            untrained=untrained,
            decoder=self.body.decoder,
            views=self.views,
            action=self.action,
            state_size=self.state_size,
            capabilities=frozenset(offered),
            encoder_attention=encoder_attention(self.body.towers, len(self.views)),
            other_flops=other,
            other_weights=weights,
            # Upstream runs the output layer with every head.
            unread_logits=self.body.vocab,
            repeats=repeats,
        )


_LIBERO = CONSTANTS["libero"]

SEVEN_B = OFTConfig(
    body=preset_body("7b", causal=False),
    action=_LIBERO.action,
    views=_LIBERO.views,
    state_size=_LIBERO.state_size,
    # Upstream trains all these policies with random crops, hence the centre crop.
    transform=ImageTransform(center_crop_area=CENTER_CROP_AREA),
)

SMALL = replace(SEVEN_B, body=preset_body("small", causal=False))
TINY = replace(
    SEVEN_B,
    body=preset_body("tiny", causal=False),
    transform=replace(SEVEN_B.transform, size=56),
)

_MINI_TOWER = ViTConfig(
    image_size=224, patch_size=14, hidden_size=192, depth=5, heads=3, mlp_size=768,
    registers=0, cls=False, layer_scale=False, gelu="exact", tap=3,
)  # fmt: skip
MINI = replace(
    SEVEN_B,
    body=PrismaticConfig(
        towers=(_MINI_TOWER,),
        decoder=DecoderShape(depth=6, hidden=256, heads=8, kv_heads=8, head_dim=32, mlp=704, causal=False),
        vocab=768,
    ),
    # Trained without random crops, hence no centre crop.
    transform=ImageTransform(means=(SIGLIP_MEAN,), stds=(SIGLIP_STD,)),
)
"""A policy small enough to train without an accelerator; it ships with its weights."""

TRAINED_OPTIONS: Mapping[str, Mapping[str, Any]] = {"mini": {"center_crop": False}}
"""Options of the presets that ship with their weights; the options of a checkpoint are in none of its files."""

PRESETS: Mapping[str, OFTConfig] = {"7b": SEVEN_B, "small": SMALL, "tiny": TINY}


def preset(name: str) -> OFTConfig:
    """An untrained preset by name; discrete tokens are chosen among the ids that are actions.

    Untrained weights would nearly always choose another id, and every action would be the same extreme one.

    Raises:
        ConfigError: If there is no such preset.
    """
    return replace(preset_config("openvla-oft", name, PRESETS, OFT_TRAINED), restrict=True)


def with_options(config: OFTConfig, options: Mapping[str, Any]) -> OFTConfig:
    """Apply a user's options; a checkpoint's files state none of them.

    `constants`: `libero`, `aloha` or `bridge`; sets chunk, cameras, state and bounds, before the other options are
    applied. `horizon`: actions per chunk. `views`: one to three camera names in sequence order. `proprio` (bool):
    whether the robot state is read. `center_crop` (bool). `film` (bool): whether the instruction modulates the towers.
    `head`: `l1`, `diffusion` or `discrete`. `steps`, only with a diffusion head: denoising steps. `restrict` (bool),
    only with discrete tokens. `unnorm_key`, the dataset whose statistics a checkpoint uses, is only checked.

    Raises:
        ConfigError: If an option is unknown, its value is not valid, or it has no use with the head.
    """
    ordered = {key: options[key] for key in sorted(options, key=lambda key: key != "constants")}
    config = apply_options("openvla-oft", config, ordered, OPTIONS)
    for key, head in (("steps", "diffusion"), ("restrict", "discrete")):
        if key in options and config.head != head:
            raise ConfigError(f"{key} belongs to head={head}; the head is '{config.head}'")
    if config.max_text < 1:
        positions, chunk = config.body.max_positions, config.action.horizon * config.action.dims
        raise ConfigError(
            f"the decoder has {positions} positions; {len(config.views)} views and a chunk of {chunk} numbers leave "
            "none of them to the prompt; valid: fewer views, or a smaller horizon"
        )
    return config


def _with_constants(config: OFTConfig, value: object) -> OFTConfig:
    if not isinstance(value, str) or value not in CONSTANTS:
        raise ConfigError(f"there are no constants {value!r}{nearest(str(value), CONSTANTS)}")
    found = CONSTANTS[value]
    return replace(config, action=found.action, views=found.views, state_size=found.state_size, bounds=found.bounds)


def _with_horizon(config: OFTConfig, value: object) -> OFTConfig:
    return replace(config, action=replace(config.action, horizon=whole_number("horizon", value)))


def _with_views(config: OFTConfig, value: object) -> OFTConfig:
    return replace(config, views=view_names(value, "sequence"))


def _with_proprio(config: OFTConfig, value: object) -> OFTConfig:
    return config if flag("proprio", value) else replace(config, state_size=None)


def _with_center_crop(config: OFTConfig, value: object) -> OFTConfig:
    area = CENTER_CROP_AREA if flag("center_crop", value) else None
    return replace(config, transform=replace(config.transform, center_crop_area=area))


def _with_film(config: OFTConfig, value: object) -> OFTConfig:
    width = config.body.decoder.hidden if flag("film", value) else None
    towers = tuple(replace(tower, film=width) for tower in config.body.towers)
    return replace(config, body=replace(config.body, towers=towers))


def _with_head(config: OFTConfig, value: object) -> OFTConfig:
    return replace(config, head=choice("head", value, get_args(Head)))


def _with_steps(config: OFTConfig, value: object) -> OFTConfig:
    return replace(config, steps=whole_number("steps", value, most=TRAIN_STEPS))


def _with_restrict(config: OFTConfig, value: object) -> OFTConfig:
    return replace(config, restrict=flag("restrict", value))


OPTIONS: Mapping[str, Callable[[OFTConfig, object], OFTConfig]] = {
    "constants": _with_constants,
    "horizon": _with_horizon,
    "views": _with_views,
    "proprio": _with_proprio,
    "center_crop": _with_center_crop,
    "film": _with_film,
    "head": _with_head,
    "steps": _with_steps,
    "restrict": _with_restrict,
    "unnorm_key": check_unnorm_key,
}
"""What `with_options` accepts."""
