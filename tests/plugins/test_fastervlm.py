"""What stages learn of the vision towers' attention, against whole maps; and FasterVLM, which keeps by it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import tiny_oft
from tests.helpers.backbones import BACKBONES
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tower_attention import ASKED, last_inputs, whole_map
from tokenprune.errors import ConfigError
from tokenprune.model.flops import query_flops
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune_plugins.fastervlm import FasterVLMConfig


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
