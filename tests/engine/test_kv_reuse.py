"""Tokens that leave with their keys and values of the last query in their place, on every backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import stages, tiny_oft, tiny_openvla, tiny_pi0
from tests.helpers.backbones import BACKBONES
from tests.helpers.naive_oft import entering, naive_rms, naive_rope
from tests.helpers.planting import REGISTRY, pipeline
from tokenprune.engine.adapter import Backbone
from tokenprune.errors import CapabilityError, ConfigError
from tokenprune.model.flops import Probed, query_flops
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.policy import ActionChunk, Policy
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_plugins.layer_skip import LayerSkipConfig
from tokenprune_plugins.shared.bases import HalfConfig
from tokenprune_plugins.vla_cache import VLACacheConfig

EVERYTHING = VLACacheConfig(
    use="vla_cache", after=(0, 2), top=999, relevant_top=0, relevant_layer=1, shares=(0.5, 1.0), unchanged=-1.0
)


def act(policy: Policy, seen: dict[int, dict[str, Any]]) -> dict[int, ActionChunk]:
    """A query; flows start from the same noise."""
    if policy.backbone.info.name.startswith("pi0"):
        return tiny_pi0.act(policy, seen, tiny_pi0.noise_for(policy.backbone.config))
    return policy.act_batch(seen)


def begun(backbone: Backbone, config: PipelineConfig, slots: int = 1) -> Policy:
    policy = Policy(backbone, config, REGISTRY)
    for slot in range(slots):
        policy.reset(tiny_oft.INSTRUCTION, slot)
    return policy


@pytest.mark.parametrize("name", BACKBONES)
def test_reusing_nothing_is_dense_bit_for_bit(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    nothing = EVERYTHING.model_copy(update={"unchanged": 1.5})
    policy, dense = begun(backbone, pipeline(nothing)), begun(backbone, DENSE)
    for _ in range(2):
        chunk, plain = (act(one, {0: seen})[0] for one in (policy, dense))
        assert np.array_equal(chunk.normalised, plain.normalised)
    assert chunk.trace.held == plain.trace.held


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", BACKBONES)
def test_reusing_everything_under_the_same_picture_is_dense(name: str, batch: int) -> None:
    backbone, seen, decoders = BACKBONES[name]()
    policy = begun(backbone, pipeline(EVERYTHING), batch)
    observations = dict.fromkeys(range(batch), seen)
    # What enters the last layer, since the actions of an autoregressive decoder are too coarse to tell.
    with entering(decoders[0].layers[-1]) as inputs:
        first, second, third = (act(policy, observations) for _ in range(3))
    stays = list(first[0].trace.plan.layout.fixed)
    prefix = [given for given in inputs if len(given) in (first[0].trace.plan.layout.n_tokens, len(stays))]
    torch.testing.assert_close(prefix[batch], prefix[0][stays], rtol=0, atol=1e-6)
    fixed = len(second[0].trace.plan.layout.fixed)
    n = len(second[0].trace.plan.layout.prunable)
    assert list(second[0].trace.held) == [n + fixed, n - n // 2 + fixed, n - n // 2 + fixed, fixed, fixed]
    for row in range(batch):
        for later in (second, third):
            np.testing.assert_allclose(later[row].normalised, first[row].normalised, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_reused_is_not_counted_but_attended_to(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    policy = begun(backbone, pipeline(EVERYTHING))
    act(policy, {0: seen})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trace = act(policy, {0: seen})[0].trace
    probes = [Probed(probe.layer, probe.count, probe.ahead) for probe in trace.probes]
    assert query_flops(backbone.info, trace.plan, probes).total == counter.get_total_flops()
    assert trace.plan.keys == (trace.plan.layout.n_tokens,) * 5
    assert trace.cached in ((), trace.plan.keys)


def reference(backbone: OpenVLAOFT, hidden: Tensor, left: dict[int, list[int]], stored: list[Any]) -> list[Tensor]:
    """Inputs of each layer `[n, D]` if the keys and values of tokens that have left are those `stored`.

    Rows of tokens that have left are computed and never read.
    """
    weights, shape = backbone.model.state_dict(), backbone.config.body.decoder
    inputs, gone, known = [], [], bool(stored)
    for layer in range(shape.depth):
        gone = gone + left.get(layer - 1, [])
        inputs.append(hidden)
        name = f"language_model.model.layers.{layer}"
        normed = naive_rms(hidden, weights[f"{name}.input_layernorm.weight"], 1e-6)
        q, k, v = (normed @ weights[f"{name}.self_attn.{part}_proj.weight"].T for part in "qkv")
        heads = []
        old = stored[layer] if known else None
        new = []
        for head in range(shape.heads):
            group = head // (shape.heads // shape.kv_heads)
            part = slice(group * shape.head_dim, (group + 1) * shape.head_dim)
            kh, vh = naive_rope(k[:, part]), v[:, part].clone()
            if old is not None:
                kh[gone], vh[gone] = old[head][0][gone], old[head][1][gone]
            new.append((kh, vh))
            qh = naive_rope(q[:, head * shape.head_dim : (head + 1) * shape.head_dim])
            heads.append(torch.softmax(qh @ kh.T / shape.head_dim**0.5, dim=-1) @ vh)
        if old is not None:
            stored[layer] = new
        hidden = hidden + torch.cat(heads, -1) @ weights[f"{name}.self_attn.o_proj.weight"].T
        normed = naive_rms(hidden, weights[f"{name}.post_attention_layernorm.weight"], 1e-6)
        gate, up = (normed @ weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        hidden = hidden + (gate / (1 + torch.exp(-gate)) * up) @ weights[f"{name}.mlp.down_proj.weight"].T
        if old is None:
            stored.append(new)
    return inputs


def test_layers_see_what_the_tokens_were_in_the_last_query() -> None:
    backbone = tiny_oft.tiny_policy_parts(tiny_oft.tiny_config(depth=5))
    policy = begun(backbone, pipeline(EVERYTHING))
    layout, stored = backbone.layout(tiny_oft.INSTRUCTION), []
    for query in range(3):
        with entering(backbone.decoder.layers[0]) as first, entering(backbone.decoder.layers[4]) as last:
            trace = policy.act(tiny_oft.observation(backbone.config, query)).trace
        held, left = set(layout.prunable), {}
        for after, kept in trace.kept.items():
            left[after] = sorted(held - set(kept[0].tolist()))
            held -= set(left[after])
        assert bool(left[0]) == bool(left[2]) == (query > 0)
        expected = reference(backbone, first[0], left, stored)[4]
        rows = sorted({*layout.fixed, *held})
        torch.testing.assert_close(last[0], expected[rows], rtol=0, atol=1e-6)


def test_a_reset_and_another_slot_start_without_keys() -> None:
    backbone = tiny_oft.tiny_policy_parts(tiny_oft.tiny_config(depth=5))
    policy, seen = begun(backbone, pipeline(EVERYTHING), 2), tiny_oft.observation(backbone.config)
    whole = backbone.layout(tiny_oft.INSTRUCTION).n_tokens
    policy.act_batch({0: seen})
    assert set(policy.act_batch({1: seen})[1].trace.held) == {whole}
    assert set(policy.act_batch({0: seen})[0].trace.held) != {whole}
    policy.reset(tiny_oft.INSTRUCTION, 0)
    both = policy.act_batch({0: seen, 1: seen})
    assert set(both[0].trace.held) == {whole}
    assert set(both[1].trace.held) != {whole}


def test_a_stage_that_protects_nothing_reuses_nothing_that_nobody_has() -> None:
    backbone = tiny_oft.tiny_policy_parts(tiny_oft.tiny_config(depth=5))
    stage = stages.TestConfig(use="test.careless", after=(1,), keep="union")
    policy, seen = begun(backbone, pipeline(stage)), tiny_oft.observation(backbone.config)
    first, second = (policy.act(seen) for _ in range(2))
    layout = first.trace.plan.layout
    assert set(first.trace.held) == {layout.n_tokens}
    assert second.trace.held[2:] == (len(layout.fixed),) * 3


def test_layers_left_out_have_no_keys_to_reuse() -> None:
    backbone = tiny_oft.tiny_policy_parts(tiny_oft.tiny_config(depth=5))
    skip = LayerSkipConfig(use="layer_skip_cosine", layers=(3,))
    policy, seen = begun(backbone, pipeline(EVERYTHING, skip)), tiny_oft.observation(backbone.config)
    first, second = (policy.act(seen) for _ in range(2))
    np.testing.assert_allclose(second.normalised, first.normalised, rtol=0, atol=1e-6)
    assert second.trace.held[3] == 0


@pytest.mark.parametrize(
    ("stages", "settings", "expected"),
    [
        ((EVERYTHING,), {"positions": "compact"}, "which stay at their positions; use positions: preserve"),
        ((EVERYTHING, HalfConfig(use="random")), {}, "so no token may be dropped; leave out 'random'"),
        ((EVERYTHING.model_copy(update={"keep": 9}),), {}, "give it keep: union, which is known only then"),
    ],
)
def test_what_cannot_be_reused_is_refused(stages: Any, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Policy(tiny_oft.tiny_policy_parts(tiny_oft.tiny_config(depth=5)), pipeline(*stages, **settings), REGISTRY)


def test_a_diffusion_head_is_refused() -> None:
    from dataclasses import replace

    config = replace(tiny_oft.tiny_config(depth=5), head="diffusion")
    assert "kv_reuse" not in config.info("tiny", untrained=True).capabilities
    assert "kv_reuse" in tiny_openvla.tiny_openvla().info.capabilities
    backbone = tiny_oft.tiny_policy_parts(tiny_oft.tiny_config(depth=5))
    backbone.info = config.info("tiny", untrained=True)
    with pytest.raises(CapabilityError, match="'vla_cache' requires kv_reuse"):
        Policy(backbone, pipeline(EVERYTHING), REGISTRY)
