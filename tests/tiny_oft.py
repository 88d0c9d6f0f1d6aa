"""A tiny OpenVLA-OFT with random weights, and observations for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tokenprune.backbone import DecoderShape
from tokenprune_adapters.backbones.openvla_oft.backbone import OFTModel, OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import SMALL, OFTConfig
from tokenprune_adapters.prismatic import PrismaticConfig, fill_untrained
from tokenprune_adapters.prompt import PromptTokenizer
from tokenprune_adapters.statistics import Bounds, Statistics
from tokenprune_adapters.vision import ViTConfig

INSTRUCTION = "put the bowl on the plate"


def tiny_config(
    views: tuple[str, ...] = ("primary", "wrist"), proprio: bool = True, kv_heads: int = 2, depth: int = 3
) -> OFTConfig:
    """Two towers of 4x4 patches, a decoder of width 32."""
    dino = ViTConfig(
        image_size=56, patch_size=14, hidden_size=24, depth=3, heads=3, mlp_size=40,
        registers=4, cls=True, layer_scale=True, gelu="exact", tap=1,
    )  # fmt: skip
    siglip = replace(dino, hidden_size=16, heads=2, registers=0, cls=False, layer_scale=False)
    body = PrismaticConfig(
        towers=(dino, siglip),
        decoder=DecoderShape(depth=depth, hidden=32, heads=4, kv_heads=kv_heads, head_dim=8, mlp=48, causal=False),
        vocab=2048,
        max_positions=512,
    )
    transform = replace(SMALL.transform, size=56)
    return replace(SMALL, body=body, views=views, state_size=8 if proprio else None, transform=transform)


def tiny_statistics(state: bool = True) -> Statistics:
    """Bounds that differ per dimension; the gripper is passed through."""
    mask = np.array([True] * 6 + [False])
    action = Bounds(np.linspace(-0.9, -0.3, 7), np.linspace(0.4, 1.0, 7), mask)
    proprio = Bounds(np.linspace(-1, -0.5, 8), np.linspace(0.5, 2, 8), np.ones(8, dtype=bool)) if state else None
    return Statistics("tiny", action, proprio)


def tiny_policy_parts(config: OFTConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> OpenVLAOFT:
    """The backbone, with biases and norms that are not their neutral values, so that a mix-up shows."""
    with torch.device("meta"):
        model = OFTModel(config)
    fill_untrained(model, seed, torch.device("cpu"), dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    info = config.info("tiny", untrained=True)
    return OpenVLAOFT(config, model, PromptTokenizer.bundled(), tiny_statistics(config.state_size is not None), info)


def observation(config: OFTConfig, seed: int = 0) -> dict[str, Any]:
    """Random images and state."""
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for view in config.views}
    return {"images": images, "state": rng.normal(size=8)}
