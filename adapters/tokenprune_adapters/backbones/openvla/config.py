"""OpenVLA's configuration, token layout, presets and options; no weights, no model code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from tokenprune.errors import ConfigError
from tokenprune.model.info import ActionSpec, BackboneInfo, FollowUp
from tokenprune.model.phase import Phase
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune_adapters.backbones.common.actions import LIBERO_ACTION
from tokenprune_adapters.backbones.common.options import apply_options, check_unnorm_key, choice, flag, preset_config
from tokenprune_adapters.backbones.prismatic.config import PrismaticConfig, lm_head_flops, preset_body
from tokenprune_adapters.backbones.prismatic.image_transform import CENTER_CROP_AREA, ImageTransform
from tokenprune_adapters.backbones.prismatic.prompt import PromptStyle, PromptTokenizer
from tokenprune_adapters.inputs.tokenizer import Prompt
from tokenprune_adapters.vision.attention import encoder_attention


@dataclass(frozen=True)
class OpenVLAConfig:
    """An OpenVLA policy: a causal decoder that generates an action token by token, one per number.

    Attributes:
        body: Towers, projector and decoder.
        action: What the dimensions move; one action per query.
        views: Its camera, exactly one.
        transform: Image preprocessing.
        padding: Padding rows of the embedding table; the action ids are the last ones before them.
        n_bins: Number of action ids.
        prompt: Form of the prompt.
        restrict: Choose among the action ids only. Upstream chooses among all ids, and any other gives an extreme
            action.
    """

    body: PrismaticConfig
    action: ActionSpec
    views: tuple[str]
    transform: ImageTransform
    padding: int = 64
    n_bins: int = 256
    prompt: PromptStyle = "pure"
    restrict: bool = False

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary, without the padding rows."""
        return self.body.vocab - self.padding

    @property
    def max_text(self) -> int:
        """Prompt tokens that still fit between the image and the action."""
        rows, cols = self.body.towers[0].grid
        return self.body.max_positions - 1 - rows * cols - (self.action.dims - 1)

    def encode(self, tokenizer: PromptTokenizer, instruction: str) -> Prompt:
        """The prompt of an instruction."""
        return tokenizer.encode(instruction, self.max_text, self.prompt)

    def layout(self, prompt: Prompt) -> TokenLayout:
        """Tokens of a query (upstream OpenVLA).

        BOS, the patches, and the prompt, whose last token is the empty token; the first number of the action is read
        there. The action follows token by token, without a stop token before it.
        """
        rows, cols = self.body.towers[0].grid
        text = 1 + rows * cols
        end = text + len(prompt.ids)
        segments = [
            Segment(Role.BOS, 0, 1),
            Segment(Role.VISION, 0, rows * cols, self.views[0], (rows, cols), prunable=True),
            Segment(Role.TEXT, 0, len(prompt.ids)),
        ]
        spans = {
            "text": range(text, end),
            "instruction": range(text + prompt.instruction.start, text + prompt.instruction.stop),
            "readout": range(end - 1, end),
        }
        return TokenLayout.build(segments, spans)

    def info(self, source: str, untrained: bool) -> BackboneInfo:
        """The description of the backbone for the core."""
        shape, dims = self.body.decoder, self.action.dims
        lm_head = lm_head_flops(1, dims, shape.hidden, self.body.vocab)
        return BackboneInfo(
            name="openvla",
            source=source,
            untrained=untrained,
            decoder=shape,
            views=self.views,
            action=self.action,
            capabilities=frozenset({"batch", "encoder_attention", "kv_reuse", "layer_skip", "merge"}),
            encoder_attention=encoder_attention(self.body.towers, len(self.views)),
            other_flops={**self.body.vision_flops(1), "lm_head": lm_head},
            other_weights={**self.body.vision_weights(), "lm_head": dims * shape.hidden * self.body.vocab},
            unread_logits=self.body.vocab,
            follow_up=FollowUp(Phase.DECODE, shape, tuple((1, behind) for behind in range(dims - 1))),
        )


SEVEN_B = OpenVLAConfig(
    body=preset_body("7b", causal=True),
    action=LIBERO_ACTION,
    views=("primary",),
    transform=ImageTransform(center_crop_area=CENTER_CROP_AREA),
)

SMALL = replace(SEVEN_B, body=preset_body("small", causal=True))
TINY = replace(
    SEVEN_B,
    body=preset_body("tiny", causal=True),
    transform=ImageTransform(size=56, center_crop_area=CENTER_CROP_AREA),
)

PRESETS: Mapping[str, OpenVLAConfig] = {"7b": SEVEN_B, "small": SMALL, "tiny": TINY}


def preset(name: str) -> OpenVLAConfig:
    """A preset by name; it chooses among the ids that are actions.

    Untrained weights would nearly always choose another id, and every action would be the same extreme one.

    Raises:
        ConfigError: If there is no such preset.
    """
    return replace(preset_config("openvla", name, PRESETS), restrict=True)


def with_options(config: OpenVLAConfig, options: Mapping[str, Any]) -> OpenVLAConfig:
    """Apply a user's options.

    `views` (one name), `center_crop` (bool), `prompt` (`pure`, or `vicuna` for the v0.1 releases) and `restrict` (bool)
    are attributes of the configuration. `unnorm_key`, the dataset whose statistics a checkpoint uses, is only checked.

    Raises:
        ConfigError: If an option is unknown or its value is not valid.
    """
    return apply_options("openvla", config, options, OPTIONS)


def _with_views(config: OpenVLAConfig, value: object) -> OpenVLAConfig:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or len(names) != 1 or not (isinstance(names[0], str) and names[0]):
        raise ConfigError(f"views must be one camera name, got {value!r}; this policy looks at one image")
    return replace(config, views=(names[0],))


def _with_center_crop(config: OpenVLAConfig, value: object) -> OpenVLAConfig:
    area = CENTER_CROP_AREA if flag("center_crop", value) else None
    return replace(config, transform=replace(config.transform, center_crop_area=area))


def _with_prompt(config: OpenVLAConfig, value: object) -> OpenVLAConfig:
    return replace(config, prompt=choice("prompt", value, get_args(PromptStyle)))


def _with_restrict(config: OpenVLAConfig, value: object) -> OpenVLAConfig:
    return replace(config, restrict=flag("restrict", value))


OPTIONS: Mapping[str, Callable[[OpenVLAConfig, object], OpenVLAConfig]] = {
    "views": _with_views,
    "center_crop": _with_center_crop,
    "unnorm_key": check_unnorm_key,
    "prompt": _with_prompt,
    "restrict": _with_restrict,
}
"""What `with_options` accepts."""
