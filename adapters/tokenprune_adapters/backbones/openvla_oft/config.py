"""OpenVLA-OFT's configuration and token layout; no weights, no model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenprune.backbone import ActionSpec, BackboneInfo, DecoderShape
from tokenprune.errors import ConfigError, nearest
from tokenprune.layout import Role, Segment, TokenLayout
from tokenprune_adapters.heads import head_flops, proprio_flops
from tokenprune_adapters.preprocess import ImageTransform
from tokenprune_adapters.prismatic import PrismaticConfig
from tokenprune_adapters.prompt import Prompt
from tokenprune_adapters.vision import DINOV2_L_REG4_224, SIGLIP_SO400M_224, ViTConfig

# LIBERO's robots are driven by robosuite's OSC_POSE controller, which scales its inputs to 5 cm and 0.5 rad.
LIBERO_ACTION = ActionSpec(
    horizon=8,
    groups={"translation": (0, 1, 2), "rotation": (3, 4, 5), "gripper": (6,)},
    gripper=(6, 0.5),
    metric={"translation": 0.05, "rotation": 0.5},
)


@dataclass(frozen=True)
class OFTConfig:
    """An OpenVLA-OFT policy with the L1 head.

    Attributes:
        body: Towers, projector and decoder.
        action: Chunk length and what the dimensions move.
        views: Cameras in sequence order, third-person first, one to three.
        state_size: Numbers of robot state in the proprio token, None without one.
        transform: Image preprocessing.
    """

    body: PrismaticConfig
    action: ActionSpec
    views: tuple[str, ...]
    state_size: int | None
    transform: ImageTransform

    def layout(self, prompt: Prompt) -> TokenLayout:
        """Tokens of a query (upstream OpenVLA-OFT).

        BOS, the patches of each view, the proprio token, the prompt with its closing empty token, one zero
        placeholder per number of the chunk, and a stop token. Action number i is read one place early: from the empty
        token for the first, from placeholder i-1 after that.
        """
        rows, cols = self.body.towers[0].grid
        patches = [Segment(Role.VISION, 0, rows * cols, view, (rows, cols), prunable=True) for view in self.views]
        proprio = [Segment(Role.PROPRIO, 0, 1)] if self.state_size is not None else []
        numbers = self.action.horizon * self.action.dims
        text = 1 + sum(p.length for p in patches) + len(proprio)
        action = text + len(prompt.ids)
        segments = [
            Segment(Role.BOS, 0, 1),
            *patches,
            *proprio,
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
        fixed = 2 + (self.state_size is not None) + self.action.horizon * self.action.dims
        return self.body.max_positions - fixed - rows * cols * len(self.views)

    def info(self, source: str, untrained: bool) -> BackboneInfo:
        """What the core needs to know."""
        width = self.body.decoder.hidden
        other = self.body.vision_flops(len(self.views))
        if self.state_size is not None:
            other["proprio"] = proprio_flops(self.state_size, width)
        other["head"] = head_flops(self.action.horizon, self.action.dims, width)
        return BackboneInfo(
            name="openvla-oft",
            source=source,
            untrained=untrained,
            decoder=self.body.decoder,
            views=self.views,
            action=self.action,
            state_size=self.state_size,
            capabilities=frozenset({"action_rows", "batch"}),
            other_flops=other,
        )


# LIBERO fine-tunes are trained with random crops, hence the centre crop.
_LIBERO_TRANSFORM = ImageTransform(center_crop_area=0.9)

SEVEN_B = OFTConfig(
    body=PrismaticConfig(
        towers=(DINOV2_L_REG4_224, SIGLIP_SO400M_224),
        decoder=DecoderShape(depth=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, causal=False),
        vocab=32064,
    ),
    action=LIBERO_ACTION,
    views=("primary", "wrist"),
    state_size=8,
    transform=_LIBERO_TRANSFORM,
)

# The same tokens as the release through a decoder that two CPU cores run in half a second; the towers are kept
# small beside it, as they are in the release.
SMALL = replace(
    SEVEN_B,
    body=PrismaticConfig(
        towers=(
            ViTConfig(
                image_size=224, patch_size=14, hidden_size=192, depth=4, heads=3, mlp_size=768,
                registers=4, cls=True, layer_scale=True, gelu="exact", tap=2,
            ),
            ViTConfig(
                image_size=224, patch_size=14, hidden_size=192, depth=4, heads=3, mlp_size=768,
                registers=0, cls=False, layer_scale=False, gelu="exact", tap=2,
            ),
        ),
        decoder=DecoderShape(depth=8, hidden=1024, heads=16, kv_heads=16, head_dim=64, mlp=2560, causal=False),
        vocab=2048,
    ),
)  # fmt: skip

# Milliseconds a query, for checks of what runs where.
TINY = replace(
    SEVEN_B,
    body=PrismaticConfig(
        towers=(
            ViTConfig(
                image_size=56, patch_size=14, hidden_size=24, depth=3, heads=3, mlp_size=48,
                registers=4, cls=True, layer_scale=True, gelu="exact", tap=1,
            ),
            ViTConfig(
                image_size=56, patch_size=14, hidden_size=16, depth=3, heads=2, mlp_size=32,
                registers=0, cls=False, layer_scale=False, gelu="exact", tap=1,
            ),
        ),
        decoder=DecoderShape(depth=8, hidden=32, heads=4, kv_heads=4, head_dim=8, mlp=48, causal=False),
        vocab=2048,
    ),
    transform=replace(_LIBERO_TRANSFORM, size=56),
)  # fmt: skip

PRESETS: Mapping[str, OFTConfig] = {"7b": SEVEN_B, "small": SMALL, "tiny": TINY}


def preset(name: str) -> OFTConfig:
    """A preset by name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"backbone 'openvla-oft' has no preset '{name}'{nearest(name, PRESETS)}")
    return PRESETS[name]


def with_options(config: OFTConfig, options: Mapping[str, Any]) -> OFTConfig:
    """Apply a user's options: `views` (names, one to three), `proprio` (bool), `center_crop` (bool).

    `unnorm_key`, the dataset whose statistics a checkpoint uses, is checked only.

    Raises:
        ConfigError: If an option is unknown or has a value it cannot have.
    """
    known = ("views", "proprio", "center_crop", "unnorm_key")
    for key, value in options.items():
        if key == "views":
            names = tuple(value) if isinstance(value, list | tuple) else ()
            if (
                not 1 <= len(names) <= 3
                or len(set(names)) != len(names)
                or not all(isinstance(n, str) and n for n in names)
            ):
                raise ConfigError(f"views must be one to three distinct camera names in sequence order, got {value!r}")
            config = replace(config, views=names)
        elif key in ("proprio", "center_crop"):
            if not isinstance(value, bool):
                raise ConfigError(f"{key} must be true or false, got {value!r}")
            if key == "proprio":
                config = replace(config, state_size=(config.state_size or 8) if value else None)
            else:
                config = replace(config, transform=replace(config.transform, center_crop_area=0.9 if value else None))
        elif key == "unnorm_key":
            if not isinstance(value, str):
                raise ConfigError(f"unnorm_key must be the name of a dataset, got {value!r}")
        else:
            raise ConfigError(f"backbone 'openvla-oft' has no option '{key}'{nearest(key, known)}")
    return config
