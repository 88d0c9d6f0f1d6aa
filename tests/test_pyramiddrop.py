"""PyramidDrop against the coming layer's whole attention map."""

from __future__ import annotations

import numpy as np
import pytest

from tests.naive_oft import attention_map, entering
from tests.planting import REGISTRY, pipeline
from tests.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.config import PipelineConfig
from tokenprune.loader import load_pipeline
from tokenprune.policy import ActionChunk, Policy
from tokenprune.trace import ProbeRecord
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_plugins.pyramiddrop import PyramidDropConfig


def act(backbone: OpenVLAOFT, config: PipelineConfig) -> ActionChunk:
    policy = Policy(backbone, config, REGISTRY)
    policy.reset(INSTRUCTION)
    return policy.act(observation(backbone.config))


@pytest.mark.parametrize(("after", "layer"), [("embedding", 0), (0, 1), (1, 2)])
def test_it_keeps_the_half_that_the_next_layer_attends_to_most(after: int | str, layer: int) -> None:
    backbone = tiny_policy_parts(tiny_config())
    layout = backbone.layout(INSTRUCTION)
    with entering(backbone.decoder.layers[layer]) as inputs:
        act(backbone, pipeline())
    given = attention_map(backbone, layer, inputs[0])[:, list(layout.span("text"))].mean((0, 1)).numpy()
    patches = np.array(layout.prunable)
    best = patches[np.argsort(-given[patches], kind="stable")[: len(patches) // 2]]
    trace = act(backbone, pipeline(PyramidDropConfig(use="pyramiddrop", after=(after,)))).trace
    assert trace.kept[layer - 1][0].tolist() == sorted(best)
    assert trace.probes == [ProbeRecord("pyramiddrop", layer, "text", len(layout.span("text")), ahead=True)]


def test_the_preset_halves_three_times_and_renumbers() -> None:
    backbone = tiny_policy_parts(tiny_config(depth=32))
    config = load_pipeline("pyramiddrop", REGISTRY).config
    trace = act(backbone, config).trace
    n = len(backbone.layout(INSTRUCTION).prunable)
    assert {after: kept.shape[1] for after, kept in trace.kept.items()} == {7: n // 2, 15: n // 4, 23: n // 8}
    assert config.positions == "compact"
