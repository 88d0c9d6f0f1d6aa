"""VLA-ADP: what layer 0 thinks of the patches, and when the gate prunes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.naive_oft import entering, naive_rms
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune.stages.control_context import ControlContext
from tokenprune.stages.memory import ExecutedAction
from tokenprune_plugins.vla_adp import Gate, GateConfig, RelevanceConfig


def test_it_keeps_what_the_first_layer_finds_alike_without_positions() -> None:
    backbone = tiny_policy_parts(tiny_config())
    layout, shape = backbone.layout(INSTRUCTION), backbone.config.body.decoder
    policy = Policy(backbone, pipeline(RelevanceConfig(use="vla_adp", keep=12)), REGISTRY)
    policy.reset(INSTRUCTION)
    kept = policy.act(observation(backbone.config)).trace.kept[-1][0].tolist()
    with entering(backbone.decoder.layers[0]) as inputs:
        policy = Policy(backbone, pipeline(), REGISTRY)
        policy.reset(INSTRUCTION)
        policy.act(observation(backbone.config))
    weights, name = backbone.model.state_dict(), "language_model.model.layers.0"
    normed = naive_rms(inputs[0], weights[f"{name}.input_layernorm.weight"], 1e-6)
    q, k = (normed @ weights[f"{name}.self_attn.{part}_proj.weight"].T for part in "qk")
    patches, text = list(layout.prunable), list(layout.span("text"))
    score = torch.zeros(len(patches), dtype=q.dtype)
    for head in range(shape.heads):
        group = head // (shape.heads // shape.kv_heads)
        qh = q[text, head * shape.head_dim : (head + 1) * shape.head_dim]
        kh = k[patches, group * shape.head_dim : (group + 1) * shape.head_dim]
        score += (qh @ kh.T).mean(0) / shape.head_dim**0.5
    assert kept == sorted(patches[i] for i in score.argsort(descending=True, stable=True)[:12])


def gated(windows: list[list[float] | None]) -> list[str]:
    """Modes of the queries after windows of positions on a line; None is a window whose poses nobody knows."""
    gate, memory, modes = Gate(GateConfig(use="vla_adp.gate")), {}, []
    done: list[ExecutedAction] = []
    for number, window in enumerate([[], *windows]):
        steps = [
            ExecutedAction(0, np.zeros(7), None if window is None else np.array([at, 0.0, 0.0, 0, 0, 0, 1]))
            for at in ([0.0, 1.0] if window is None else window)
        ]
        done += steps
        ctx = ControlContext("query", 0, ("full", "pruned"), number, done, steps, memory)
        modes.append(gate.control(ctx).mode)
        after = ControlContext("executed", 0, ("full", "pruned"), number + 1, done, [], memory)
        assert gate.control(after).mode == modes[-1]
    return modes


@given(st.lists(st.integers(0, 6), max_size=14))
def test_the_gate_prunes_while_the_hand_travels_far(distances: list[int]) -> None:
    modes = gated([[2.0, 9.0, 2.0 + distance] for distance in distances])
    expected, past = ["full"], []
    for distance in distances:
        prune = bool(past) and distance >= min(past[-3:]) and expected[-3:] != ["pruned"] * 3
        expected.append("pruned" if prune else "full")
        past.append(distance)
    assert modes == expected


def test_without_poses_nothing_is_pruned() -> None:
    assert gated([None] * 6) == ["full"] * 7


def test_the_preset_prunes_after_a_far_window() -> None:
    backbone = tiny_policy_parts(tiny_config(depth=8))
    policy = Policy(backbone, load_pipeline("vla_adp", REGISTRY).config, REGISTRY)
    policy.reset(INSTRUCTION)
    modes = []
    for query in range(4):
        modes.append(policy.act(observation(backbone.config)).trace.plan.mode)
        for step in range(8):
            policy.executed(np.zeros(7), pose=np.array([query * query * step, 0, 0, 0, 0, 0, 1.0]))
    assert modes == ["full", "full", "pruned", "pruned"]
