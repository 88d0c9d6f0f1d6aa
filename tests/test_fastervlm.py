"""What stages learn of the vision towers' attention, against whole maps; and FasterVLM, which keeps by it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests import tiny_oft
from tests.planting import REGISTRY, pipeline
from tests.test_shortcuts import BACKBONES
from tokenprune.errors import ConfigError
from tokenprune.model.flops import query_flops
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune_adapters.vision.transformer import Attention, VisionTower
from tokenprune_plugins.fastervlm import FasterVLMConfig

ASKED = {
    "oft": ("featurizer", True),
    "openvla": ("featurizer", True),
    "pi0": ("vision", False),
    "pi05": ("vision", False),
}


def whole_map(attention: Attention, x: Tensor) -> Tensor:
    """Attention `[B, n, n]` of a block's normed input `[B, n, D]`, mean over heads, one head at a time."""
    if attention.split:
        q, k = attention.q_proj(x), attention.k_proj(x)
    else:
        q, k, _ = attention.qkv(x).chunk(3, -1)
    width = q.shape[-1] // attention.heads
    maps = [
        torch.softmax(q[..., at : at + width] @ k[..., at : at + width].mT / width**0.5, -1)
        for at in range(0, q.shape[-1], width)
    ]
    return torch.stack(maps).mean(0)


def last_inputs(tower: VisionTower, stack: ExitStack) -> list[Tensor]:
    """What the last block's attention is given in the queries run meanwhile."""
    seen: list[Tensor] = []
    handle = tower.blocks[-1].norm1.register_forward_hook(lambda _m, _a, out: seen.append(out))
    stack.callback(handle.remove)
    return seen


@pytest.mark.parametrize("kind", ["auto", "cls", "received"])
@pytest.mark.parametrize("name", BACKBONES)
def test_it_keeps_what_the_tower_attends_to(name: str, kind: Any) -> None:
    backbone, seen, _ = BACKBONES[name]()
    first, has_cls = ASKED[name]
    config = pipeline(FasterVLMConfig(use="fastervlm", keep=9, attention=kind))
    if kind == "cls" and not has_cls:
        with pytest.raises(ConfigError, match=f"attention: cls: the towers of '{name}' do not have it"):
            Policy(backbone, config, REGISTRY)
        return
    from_cls = has_cls and kind != "received"
    modules = dict(backbone.model.named_modules())
    place = f"vision_backbone.{first if from_cls else 'fused_featurizer'}" if has_cls else first
    tower = modules[place]
    with ExitStack() as stack:
        inputs = last_inputs(tower, stack)
        policy = Policy(backbone, config, REGISTRY)
        policy.reset(tiny_oft.INSTRUCTION)
        trace = policy.act(seen).trace
    attention = whole_map(tower.blocks[-1].attn, inputs[0])
    prefix = tower.config.prefix_tokens
    score = (attention[:, 0] if from_cls else attention.mean(1))[:, prefix:].flatten().numpy()
    layout = trace.plan.layout
    best = np.argsort(-score, kind="stable")[:9]
    assert trace.kept[-1][0].tolist() == sorted(layout.prunable[i] for i in best)
    assert trace.encoder == (("cls",) if from_cls else ("received",))


@pytest.mark.parametrize("kind", ["auto", "received"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_look_is_counted(name: str, kind: Any) -> None:
    backbone, seen, _ = BACKBONES[name]()
    policy = Policy(backbone, pipeline(FasterVLMConfig(use="fastervlm", attention=kind)), REGISTRY)
    policy.reset(tiny_oft.INSTRUCTION)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trace = policy.act(seen).trace
    assert query_flops(backbone.info, trace.plan, (), trace.encoder).total == counter.get_total_flops()


@pytest.mark.parametrize("name", BACKBONES)
def test_looking_changes_nothing(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    actions = []
    for config in (DENSE, pipeline(FasterVLMConfig(use="fastervlm", keep=1.0))):
        policy = Policy(backbone, config, REGISTRY)
        policy.reset(tiny_oft.INSTRUCTION)
        actions.append(policy.act(seen).normalised)
    assert np.array_equal(*actions)
