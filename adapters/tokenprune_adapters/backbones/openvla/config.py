"""OpenVLA's configuration and token layout; no weights, no model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from tokenprune.errors import ConfigError, nearest
from tokenprune.model.info import ActionSpec, BackboneInfo, FollowUp
from tokenprune.model.phase import Phase
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune_adapters.backbones.prismatic.config import LIBERO_ACTION, PrismaticConfig, body_of, lm_head_flops
from tokenprune_adapters.backbones.prismatic.image_transform import ImageTransform
from tokenprune_adapters.backbones.prismatic.prompt import PromptStyle
from tokenprune_adapters.inputs.tokenizer import Prompt
from tokenprune_adapters.vision.attention import answers

OPTIONS = ("views", "center_crop", "unnorm_key", "prompt", "restrict")
CROP = 0.9
"""Share of an image's area that fine-tunes keep which were trained with random crops, such as LIBERO's."""


@dataclass(frozen=True)
class OpenVLAConfig:
    """An OpenVLA policy: a causal decoder that spells an action as tokens, one per number.

    Attributes:
        body: Towers, projector and decoder.
        action: What the dimensions move; one action per query.
        views: The camera it looks at, exactly one.
        transform: Image preprocessing.
        padding: Rows of the embedding table that are no tokens; the actions stand at the end of those that are.
        n_bins: Ids that are actions.
        prompt: How the instruction is put.
        restrict: Choose among the ids that are actions. Upstream chooses among all, and what is no action gives an
            extreme one.
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

    def layout(self, prompt: Prompt) -> TokenLayout:
        """Tokens of a query (upstream OpenVLA).

        BOS, the patches, and the prompt with its closing empty token, where the first number of the action is read. The
        action follows token by token; no stop token stands before it.
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
        """What the core needs to know."""
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
            encoder_attention=answers(self.body.towers, len(self.views)),
            other_flops={**self.body.vision_flops(1), "lm_head": lm_head},
            other_weights={**self.body.vision_weights(), "lm_head": dims * shape.hidden * self.body.vocab},
            unread_logits=self.body.vocab,
            follow_up=FollowUp(Phase.DECODE, shape, tuple((1, behind) for behind in range(dims - 1))),
        )


SEVEN_B = OpenVLAConfig(
    body=body_of("7b", causal=True),
    action=LIBERO_ACTION,
    views=("primary",),
    transform=ImageTransform(center_crop_area=CROP),
)

SMALL = replace(SEVEN_B, body=body_of("small", causal=True))
TINY = replace(
    SEVEN_B,
    body=body_of("tiny", causal=True),
    transform=ImageTransform(size=56, center_crop_area=CROP),
)

PRESETS: Mapping[str, OpenVLAConfig] = {"7b": SEVEN_B, "small": SMALL, "tiny": TINY}


def preset(name: str) -> OpenVLAConfig:
    """A preset by name.

    It chooses among the ids that are actions: untrained weights would choose others nearly always, and whatever the
    image, the action would be the extreme one.

    Raises:
        ConfigError: If there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"backbone 'openvla' has no preset '{name}'{nearest(name, PRESETS)}")
    return replace(PRESETS[name], restrict=True)


def with_options(config: OpenVLAConfig, options: Mapping[str, Any]) -> OpenVLAConfig:
    """Apply a user's options.

    `views` (one name), `center_crop` (bool), `prompt` (`pure`, or `vicuna` for the v0.1 releases) and `restrict` (bool)
    are attributes of the configuration. `unnorm_key`, the dataset whose statistics a checkpoint uses, is checked only.

    Raises:
        ConfigError: If an option is unknown or has a value it cannot have.
    """
    for key, value in options.items():
        if key == "views":
            names = (value,) if isinstance(value, str) else value
            if not isinstance(names, list | tuple) or len(names) != 1 or not (isinstance(names[0], str) and names[0]):
                raise ConfigError(f"views must be one camera name, got {value!r}; this policy looks at one image")
            config = replace(config, views=(names[0],))
        elif key in ("center_crop", "restrict"):
            if not isinstance(value, bool):
                raise ConfigError(f"{key} must be true or false, got {value!r}")
            if key == "restrict":
                config = replace(config, restrict=value)
            else:
                config = replace(config, transform=replace(config.transform, center_crop_area=CROP if value else None))
        elif key == "unnorm_key":
            if not isinstance(value, str):
                raise ConfigError(f"unnorm_key must be the name of a dataset, got {value!r}")
        elif key == "prompt":
            styles = get_args(PromptStyle)
            if value not in styles:
                raise ConfigError(f"there is no prompt {value!r}{nearest(str(value), styles)}")
            config = replace(config, prompt=value)
        else:
            raise ConfigError(f"backbone 'openvla' has no option '{key}'{nearest(key, OPTIONS)}")
    return config
