"""A tiny pi0 or pi0.5 with random weights, observations for it, and queries with noise that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.engine.query import Query
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry.discovery import Registry
from tokenprune_adapters.backbones.pi0.backbone import PI0, PI0Setup
from tokenprune_adapters.backbones.pi0.config import TINY, PI0Config, Variant
from tokenprune_adapters.backbones.pi0.model import AdaptiveNorm, PI0Model
from tokenprune_adapters.backbones.pi0.prompt import GemmaTokenizer
from tokenprune_adapters.inputs.statistics import Quantiles, Standard, Statistics
from tokenprune_adapters.weights.untrained import fill_untrained

VARIANTS: tuple[Variant, ...] = ("pi0", "pi05")
INSTRUCTION = "put the bowl on the plate"
VIEWS = ("primary", "wrist", "left")
HORIZON = 5


class ExactNorm(nn.Module):
    """Gemma's norm in the type of its input, which Gemma's own rounds to float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden / (hidden.square().mean(-1, keepdim=True) + self.eps).sqrt() * (1 + self.weight)


class ExactAdaptiveNorm(nn.Module):
    """pi0.5's adaptive norm, likewise."""

    def __init__(self, dense: nn.Linear, eps: float) -> None:
        super().__init__()
        self.dense, self.eps = dense, eps

    def forward(self, hidden: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        width = hidden.shape[-1]
        modulation = self.dense(condition)[:, None]
        normed = hidden / (hidden.square().mean(-1, keepdim=True) + self.eps).sqrt()
        scale, shift, gate = (modulation[..., part * width : (part + 1) * width] for part in range(3))
        return normed * (1 + scale) + shift, gate


def tiny_config(
    variant: Variant = "pi0", views: tuple[str, ...] = VIEWS[:2], depth: int = 3, steps: int = 10
) -> PI0Config:
    """4x4 patches a view, a prefix of width 32, an expert of width 16 and chunks of five actions."""
    return replace(
        TINY,
        variant=variant,
        views=views,
        decoder=replace(TINY.decoder, depth=depth),
        expert=replace(TINY.expert, depth=depth),
        action=replace(TINY.action, horizon=HORIZON),
        prompt_state=0 if variant == "pi0" else 8,
        steps=steps,
    )


def tiny_statistics(config: PI0Config) -> Statistics:
    """Of the release's kind, different for every dimension."""
    if config.variant == "pi0":
        kind, low, high = Standard, (-0.4, 0.3), (0.5, 2.0)
    else:
        kind, low, high = Quantiles, (-2.5, -1.5), (1.0, 2.5)
    action, state = (kind(np.linspace(*low, size), np.linspace(*high, size)) for size in (7, 8))
    return Statistics("tiny", action, None if config.state_size is None else state)


def tiny_backbone(config: PI0Config, seed: int = 0, dtype: torch.dtype = torch.float64, exact: bool = True) -> PI0:
    """The backbone, with biases and norms that are not neutral and attention that is far from uniform.

    `exact` norms do not round to float32, so that a comparison in float64 can be strict.
    """
    with torch.device("meta"):
        model = PI0Model(config)
    fill_untrained(model, seed, torch.device("cpu"), dtype)
    model.rescale_untrained()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
        for layer in (*model.language.layers, *model.expert.layers):
            layer.self_attn.q_proj.weight.mul_(3)
    if exact:
        _make_exact(model)
    info = config.info("tiny", untrained=True)
    return PI0(PI0Setup(config, GemmaTokenizer.bundled(), tiny_statistics(config)), model, info)


def _make_exact(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if "norm" not in name or not name.startswith(("language", "expert")) or isinstance(module, nn.Linear):
            continue
        adaptive = isinstance(module, AdaptiveNorm)
        exact = ExactAdaptiveNorm(module.dense, 1e-6) if adaptive else ExactNorm(module.weight.data, 1e-6)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, exact)


def observation(config: PI0Config, seed: int = 0) -> dict[str, Any]:
    """Random images, not square, and state."""
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (80, 100, 3), dtype=np.uint8) for view in config.views}
    return {"images": images, "state": rng.normal(size=8)}


def noise_for(config: PI0Config, seed: int = 0) -> Tensor:
    """Noise `[T, width]` of one query."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(config.action.horizon, config.width, generator=generator)


def act(policy: Policy, observations: Mapping[int, dict[str, Any]], noise: Tensor) -> dict[int, ActionChunk]:
    """A query in which every slot starts from the same noise `[T, width]`."""

    def given(query: Query, *shape: int) -> Tensor:
        assert shape == tuple(noise.shape)
        return noise.expand(len(query._inputs.slots), *shape)

    with patch.object(Query, "noise", given):
        return policy.act_batch(observations)


def query(
    backbone: PI0,
    obs: dict[str, Any],
    noise: Tensor,
    pipeline: PipelineConfig = DENSE,
    registry: Registry | None = None,
    instruction: str = INSTRUCTION,
) -> Tensor:
    """Normalised actions `[T, D]` of one query."""
    policy = Policy(backbone, pipeline, registry or Registry())
    policy.reset(instruction)
    return torch.from_numpy(act(policy, {0: obs}, noise)[0].normalised)
