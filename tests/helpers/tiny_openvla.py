"""A tiny OpenVLA with random weights, observations for it, and stages that keep and look where they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers.registries import with_stages
from tokenprune.model.info import BackboneInfo
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry.discovery import Registry
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.stages.config import CutConfig, StageConfig
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.query_record import ActionAttention
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import LayerContext, SelectContext
from tokenprune.tokens.proposal import Proposal
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA, OpenVLASetup
from tokenprune_adapters.backbones.openvla.config import TINY, OpenVLAConfig
from tokenprune_adapters.backbones.openvla.model import OpenVLAModel
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.statistics import Bounds, Statistics
from tokenprune_adapters.weights.untrained import fill_untrained

INSTRUCTION = "put the bowl on the plate"


def tiny_config(kv_heads: int = 2, depth: int = 3, **changes: Any) -> OpenVLAConfig:
    """The tiny preset as a checkpoint would be: any token may be chosen."""
    decoder = replace(TINY.body.decoder, kv_heads=kv_heads, depth=depth)
    return replace(TINY, body=replace(TINY.body, decoder=decoder, max_positions=512), **changes)


def tiny_openvla(
    config: OpenVLAConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, exact: bool = True
) -> OpenVLA:
    """The backbone, with biases and norms that are not their neutral values and attention far from uniform.

    transformers' norms round to float32 whatever the dtype. Unless told otherwise, torch's take their place with their
    epsilon, so that the last bit of a sum is not blown up to one of float32.
    """
    config = config or tiny_config()
    with torch.device("meta"):
        model = OpenVLAModel(config)
    fill_untrained(model, seed, torch.device("cpu"), dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
        for layer in model.language_model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
    if exact:
        _use_exact_norms(model.language_model.model)
    bounds = Bounds(np.linspace(-0.9, -0.3, 7), np.linspace(0.4, 1.0, 7), np.array([True] * 6 + [False]), epsilon=0.0)
    info = config.info("tiny", untrained=True)
    setup = OpenVLASetup(config, PromptTokenizer.bundled(), Statistics("libero_tiny", bounds, None))
    return OpenVLA(setup, model, info)


def _use_exact_norms(llama: Any) -> None:
    def exact(norm: Any) -> nn.Module:
        made = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=norm.weight.dtype)
        made.weight = norm.weight
        return made

    for layer in llama.layers:
        layer.input_layernorm = exact(layer.input_layernorm)
        layer.post_attention_layernorm = exact(layer.post_attention_layernorm)
    llama.norm = exact(llama.norm)


def observation(seed: int = 0, view: str = "primary") -> dict[str, Any]:
    """A random image."""
    return {"images": {view: np.random.default_rng(seed).integers(0, 256, (80, 80, 3), dtype=np.uint8)}}


@dataclass
class Seen:
    """What a backbone's output layer was given and gave: `hidden` `[B, D]` and `logits` `[B, V]` of each token."""

    hidden: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def watched(backbone: OpenVLA) -> Seen:
    """Write down from now on what each token is chosen from."""
    seen, language = Seen(), backbone.model.language_model
    real = type(language).logits

    def logits(hidden: Tensor) -> Tensor:
        seen.hidden.append(hidden)
        seen.logits.append(real(language, hidden))
        return seen.logits[-1]

    language.logits = logits
    return seen


class KeeperConfig(CutConfig):
    """`kept[cut][row]` are the original ids that stay at each cut."""

    kept: tuple[tuple[tuple[int, ...], ...], ...]


class Keeper(Stage[KeeperConfig]):
    """Keeps the tokens it is told."""

    Config = KeeperConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        return self._vote(ctx, "embedding")

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        return self._vote(ctx, ctx.layer)

    def _vote(self, ctx: SelectContext, after: int | str) -> Proposal:
        wanted = torch.tensor(self.config.kept[self.config.after.index(after)], dtype=torch.int64)
        return Proposal(score=(ctx.prunable[:, :, None] == wanted[:, None]).any(-1).double())


class WatcherConfig(StageConfig):
    layers: tuple[int, ...]


class Watcher(Stage[WatcherConfig]):
    """Notes the attention of the action tokens."""

    Config = WatcherConfig
    attention: Mapping[int, ActionAttention]

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        return replace(super().requirements(info), action_attention=self.config.layers)

    @hookimpl
    def observe(self, record: Any) -> None:
        self.attention = record.attention


@cache
def registry() -> Registry:
    """Everything installed, and the two stages above."""
    return with_stages(Registry.discover(), (Keeper, Watcher), "test", "selector")


def keeping(kept: Mapping[int, list[list[int]]], watch: tuple[int, ...] = ()) -> PipelineConfig:
    """A pipeline that keeps these tokens of each batch row after each layer, -1 being before the first."""
    stages: list[StageConfig] = [WatcherConfig(use="test.watcher", layers=watch)] if watch else []
    if kept:
        after = tuple("embedding" if layer < 0 else layer for layer in kept)
        counts = tuple(len(rows[0]) for rows in kept.values())
        rows = tuple(tuple(map(tuple, rows)) for rows in kept.values())
        stages.append(KeeperConfig(use="test.keeper", after=after, keep=counts, kept=rows))
    return PipelineConfig(version=1, name="told", stages=tuple(stages))


def act(
    backbone: OpenVLA, config: PipelineConfig, observations: list[dict[str, Any]], instruction: str = INSTRUCTION
) -> list[ActionChunk]:
    """One query for a batch."""
    policy = Policy(backbone, config, registry())
    for slot in range(len(observations)):
        policy.reset(instruction, slot)
    return list(policy.act_batch(dict(enumerate(observations))).values())
