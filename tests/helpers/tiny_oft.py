"""A tiny OpenVLA-OFT with random weights, and observations for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tokenprune.model.info import DecoderShape
from tokenprune_adapters.backbones.openvla_oft.backbone import OFTSetup, OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import SMALL, OFTConfig, with_options
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.prismatic.config import PrismaticConfig
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.statistics import Bounds, Statistics
from tokenprune_adapters.vision.transformer import ViTConfig
from tokenprune_adapters.weights.untrained import fill_untrained

INSTRUCTION = "put the bowl on the plate"


def tiny_config(
    views: tuple[str, ...] = ("primary", "wrist"),
    proprio: bool = True,
    kv_heads: int = 2,
    depth: int = 3,
    **options: Any,
) -> OFTConfig:
    """Two towers of 4x4 patches, a decoder of width 32; with `constants` among the options, the views are theirs."""
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
    config = replace(SMALL, body=body, views=views, transform=transform)
    return with_options(config, {"proprio": proprio, **options})


def tiny_statistics(config: OFTConfig) -> Statistics:
    """Bounds that differ per dimension; a gripper is passed through."""
    dims, size = config.action.dims, config.state_size
    mask = np.ones(dims, dtype=bool)
    if config.action.gripper is not None:
        mask[config.action.gripper[0]] = False
    action = Bounds(np.linspace(-0.9, -0.3, dims), np.linspace(0.4, 1.0, dims), mask)
    state = None
    if size is not None:
        state = Bounds(np.linspace(-1, -0.5, size), np.linspace(0.5, 2, size), np.ones(size, dtype=bool))
    return Statistics("tiny", action, state)


def tiny_policy_parts(
    config: OFTConfig, seed: int = 0, dtype: torch.dtype = torch.float64, contrast: float = 1.0
) -> OpenVLAOFT:
    """The backbone, with biases and norms that are not their neutral values, so that a mix-up shows.

    With more `contrast`, attention is further from uniform, and the rows of the chunk further from each other.
    """
    with torch.device("meta"):
        model = OFTModel(config)
    fill_untrained(model, seed, torch.device("cpu"), dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
        for layer in model.language_model.model.layers:
            layer.self_attn.q_proj.weight.mul_(contrast)
    info = config.info("tiny", untrained=True)
    return OpenVLAOFT(OFTSetup(config, PromptTokenizer.bundled(), tiny_statistics(config)), model, info)


def observation(config: OFTConfig, seed: int = 0) -> dict[str, Any]:
    """Random images and state."""
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for view in config.views}
    return {"images": images, "state": rng.normal(size=config.state_size or 8)}
