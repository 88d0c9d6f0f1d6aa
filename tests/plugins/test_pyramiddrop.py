"""PyramidDrop against the coming layer's whole attention map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.naive_oft import attention_map, entering, naive_rms, naive_rope
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.engine.trace import ProbeRecord
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import ActionChunk, Policy
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_plugins.pyramiddrop import PyramidDropConfig
from tokenprune_plugins.shared.bases import HalfConfig


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


def test_behind_a_cut_tokens_are_compared_where_they_stood() -> None:
    backbone = tiny_policy_parts(tiny_config())
    layout, shape = backbone.layout(INSTRUCTION), backbone.config.body.decoder
    chance = HalfConfig(use="random", keep=0.5)
    with entering(backbone.decoder.layers[1]) as inputs:
        held = act(backbone, pipeline(chance)).trace.kept[-1][0].tolist()
    ids = sorted({*layout.fixed, *held})
    weights, name = backbone.model.state_dict(), "language_model.model.layers.1"
    # Keys and queries of what is held, each at its own row of the whole sequence.
    spread = torch.zeros(layout.n_tokens, shape.hidden, dtype=inputs[0].dtype)
    spread[ids] = naive_rms(inputs[0], weights[f"{name}.input_layernorm.weight"], 1e-6)
    q, k = (spread @ weights[f"{name}.self_attn.{part}_proj.weight"].T for part in "qk")
    given = torch.zeros(layout.n_tokens, dtype=q.dtype)
    for head in range(shape.heads):
        group = head // (shape.heads // shape.kv_heads)
        qh = naive_rope(q[:, head * shape.head_dim : (head + 1) * shape.head_dim])[list(layout.span("text"))]
        kh = naive_rope(k[:, group * shape.head_dim : (group + 1) * shape.head_dim])[ids]
        given[ids] += torch.softmax(qh @ kh.T / shape.head_dim**0.5, dim=-1).sum(0)
    best = sorted(held, key=lambda token: -float(given[token]))[: len(held) // 2]
    trace = act(backbone, pipeline(chance, PyramidDropConfig(use="pyramiddrop", after=(0,)))).trace
    assert trace.kept[0][0].tolist() == sorted(best)


def test_the_preset_halves_three_times_and_renumbers() -> None:
    backbone = tiny_policy_parts(tiny_config(depth=32))
    config = load_pipeline("pyramiddrop", REGISTRY).config
    trace = act(backbone, config).trace
    n = len(backbone.layout(INSTRUCTION).prunable)
    assert {after: kept.shape[1] for after, kept in trace.kept.items()} == {7: n // 2, 15: n // 4, 23: n // 8}
    assert config.positions == "compact"
