"""Layers left out and flow steps repeated: what is skipped is as if it were not there, and is not counted."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import tiny_oft, tiny_pi0
from tests.helpers.backbones import BACKBONES, DEPTH, oft, pi0
from tests.helpers.naive_oft import entering
from tests.helpers.planting import REGISTRY, pipeline
from tokenprune.engine.adapter import Backbone
from tokenprune.errors import CapabilityError, ConfigError
from tokenprune.model.decoder import Decoder
from tokenprune.model.flops import query_flops
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.policy import ActionChunk, Policy
from tokenprune_plugins.fastv import FastVConfig
from tokenprune_plugins.head_cache import HeadCacheConfig
from tokenprune_plugins.layer_skip import LayerCosineConfig, LayerSkipConfig, least_important
from tokenprune_plugins.shared.bases import HalfConfig

SKIP = LayerSkipConfig(use="layer_skip_cosine", layers=(1, 3))


def act(backbone: Backbone, config: PipelineConfig, seen: dict[str, Any]) -> ActionChunk:
    policy = Policy(backbone, config, REGISTRY)
    policy.reset(tiny_oft.INSTRUCTION)
    return policy.act(seen)


@pytest.mark.parametrize("positions", ["preserve", "compact"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_layer_left_out_is_as_if_the_decoder_had_none(name: str, first: bool, positions: Any) -> None:
    backbone, seen, decoders = BACKBONES[name]()
    left_out = (0, 3) if first else (1, 3)
    cuts = HalfConfig(use="random", after=("embedding", 2), keep=0.5)
    skip = LayerSkipConfig(use="layer_skip_cosine", layers=left_out)
    skipping = act(backbone, pipeline(skip, cuts, positions=positions), seen)
    # The other layers have moved up by as many as are gone before them.
    moved = cuts.model_copy(update={"after": ("embedding", 1)})
    for decoder in decoders:
        decoder.layers = [layer for index, layer in enumerate(decoder.layers) if index not in left_out]
    backbone.info = replace(backbone.info, decoder=replace(backbone.info.decoder, depth=DEPTH - len(left_out)))
    expected = act(backbone, pipeline(moved, positions=positions), seen)
    assert np.array_equal(skipping.normalised, expected.normalised)
    held = list(skipping.trace.held)
    assert [held[layer] for layer in left_out] == [0, 0]
    assert [n for n in held if n] == list(expected.trace.held)


@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_left_out_is_not_counted(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    policy = Policy(backbone, pipeline(SKIP, HalfConfig(use="random", after=(2,))), REGISTRY)
    policy.reset(tiny_oft.INSTRUCTION)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trace = policy.act(seen).trace
    assert query_flops(backbone.info, trace.plan).total == counter.get_total_flops()
    assert trace.to_json()["layers_skipped"] == [1, 3]


def test_the_last_layer_stays() -> None:
    backbone, _, _ = oft()
    config = pipeline(LayerSkipConfig(use="layer_skip_cosine", layers=("99%",)))
    with pytest.raises(ConfigError, match="'layer_skip_cosine' leaves out the last layer, which is read"):
        Policy(backbone, config, REGISTRY)


def test_no_stage_may_look_at_a_layer_that_is_left_out() -> None:
    backbone, _, _ = oft()
    with pytest.raises(ConfigError, match="'fastv' looks at layer 1, which 'layer_skip_cosine' leaves out"):
        Policy(backbone, pipeline(SKIP, FastVConfig(use="fastv")), REGISTRY)


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("variant", tiny_pi0.VARIANTS)
def test_a_spared_flow_step_adds_what_the_layers_added_before(variant: Any, interval: int) -> None:
    steps = 7
    config = tiny_pi0.tiny_config(variant, steps=steps)
    backbone = tiny_pi0.tiny_backbone(config)
    seen, noise = tiny_pi0.observation(config), tiny_pi0.noise_for(config)
    ran: list[tuple[Tensor, Tensor]] = []
    real = Decoder.run

    def recorded(self: Decoder, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        done = real(self, hidden, *args, **kwargs)
        if self is backbone.expert and hidden.shape[1] == config.action.horizon:
            ran.append((hidden, done.stream))
        return done

    policy = Policy(backbone, pipeline(HeadCacheConfig(use="head_cache", interval=interval)), REGISTRY)
    policy.reset(tiny_pi0.INSTRUCTION)
    with patch.object(Decoder, "run", recorded):
        chunk = tiny_pi0.act(policy, {0: seen}, noise)[0]
    computed = range(0, steps, interval)
    assert len(ran) == len(computed)
    model, actions = backbone.model, noise[None].double()
    for step, time in enumerate(backbone._times):
        tokens, condition = model.action_in_proj(actions), None
        if variant == "pi0":
            tokens = model.action_time_tokens(tokens, time)
        else:
            condition = model.condition(time)[None]
        entered, left = ran[step // interval]
        if step in computed:
            torch.testing.assert_close(tokens, entered, rtol=0, atol=1e-12)
        stream = tokens + left - entered
        norm = backbone.expert.norm
        hidden = norm(stream) if condition is None else norm(stream, condition)[0]
        actions = actions - model.action_out_proj(hidden) / steps
    np.testing.assert_allclose(chunk.normalised, actions[0, :, : config.action.dims], rtol=0, atol=1e-12)
    assert chunk.trace.to_json()["head_passes"] == {"ran": len(computed), "spared": steps - len(computed)}


@pytest.mark.parametrize("variant", tiny_pi0.VARIANTS)
def test_an_interval_of_one_is_dense_bit_for_bit(variant: Any) -> None:
    backbone, seen, _ = pi0(variant)
    one = act(backbone, pipeline(HeadCacheConfig(use="head_cache", interval=1)), seen)
    assert np.array_equal(one.normalised, act(backbone, DENSE, seen).normalised)


@pytest.mark.parametrize("variant", tiny_pi0.VARIANTS)
def test_spared_steps_are_not_counted(variant: Any) -> None:
    backbone, seen, _ = pi0(variant)
    policy = Policy(backbone, pipeline(HeadCacheConfig(use="head_cache", interval=4)), REGISTRY)
    policy.reset(tiny_oft.INSTRUCTION)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trace = policy.act(seen).trace
    assert query_flops(backbone.info, trace.plan).total == counter.get_total_flops()


def test_a_head_cache_goes_beside_any_strategy() -> None:
    backbone, seen, _ = pi0("pi0")
    cut = HalfConfig(use="random", keep=0.5)
    both = act(backbone, pipeline(cut, HeadCacheConfig(use="head_cache", interval=10)), seen)
    alone = act(backbone, pipeline(cut), seen)
    assert both.trace.held == alone.trace.held
    assert not np.array_equal(both.normalised, alone.normalised)


def test_only_one_stage_decides_which_steps_run() -> None:
    backbone, _, _ = pi0("pi0")
    twice = HeadCacheConfig(use="head_cache")
    with pytest.raises(ConfigError, match="head_cache and head_cache both decide which flow steps run"):
        Policy(backbone, pipeline(twice, twice), REGISTRY)


def test_a_head_without_a_flow_is_refused() -> None:
    with pytest.raises(CapabilityError, match="'head_cache' requires head_cache"):
        Policy(oft()[0], pipeline(HeadCacheConfig(use="head_cache")), REGISTRY)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one of them is nothing, as placeholders are before layer 0."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return 0.0 if lengths == 0 else float(a @ b / lengths)


def test_importance_is_one_minus_the_cosine_of_what_enters_and_leaves() -> None:
    backbone, _, _ = oft()
    policy = Policy(backbone, pipeline(LayerCosineConfig(use="layer_cosine", leave_out=2)), REGISTRY)
    policy.reset(tiny_oft.INSTRUCTION)
    expected: list[list[float]] = []
    for query in range(2):
        with ExitStack() as stack:
            seen = [stack.enter_context(entering(layer)) for layer in backbone.decoder.layers]
            policy.act(tiny_oft.observation(backbone.config, query))
        inputs = [given[0].numpy() for given in seen]
        expected.append(
            [1 - float(np.mean([cosine(*pair) for pair in zip(x, y, strict=True)])) for x, y in pairwise(inputs)]
        )
    found = policy.pipeline.stages[0].findings()
    np.testing.assert_allclose(found["importance, layer by layer"], np.mean(expected, 0), atol=5.1e-5)
    assert found["layers that matter least"] == list(least_important(np.mean(expected, 0).tolist(), 2))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(1, 8))
def test_no_two_neighbours_are_left_out(importance: list[int], count: int) -> None:
    chosen = least_important(importance, count)
    assert all(b - a > 1 for a, b in pairwise(chosen))
    assert len(chosen) <= count
    free = [i for i in range(len(importance)) if not {i - 1, i, i + 1} & set(chosen)]
    assert len(chosen) == count or not free
    least = min(range(len(importance)), key=lambda i: (importance[i], i))
    assert least in chosen
