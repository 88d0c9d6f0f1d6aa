"""OpenVLA-OFT against a specification written out token by token, and each way to get it subtly wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.naive_oft import Spec, naive_actions
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.loading import load_backbone
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune.tokens.layout import Role
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT

TRAPS = {
    "norm epsilon 1e-5": Spec(eps=1e-5),
    "causal attention": Spec(causal=True),
    "read-out not shifted": Spec(readout_shift=0),
    "no stop token": Spec(stop_token=False),
    "placeholders embedded": Spec(zero_placeholders=False),
    "SigLIP first": Spec(dino_first=False),
    "BOS after the image": Spec(bos_first=False),
    "no empty token after the prompt": Spec(empty_token=False),
    "proprio after the prompt": Spec(proprio_last=True),
}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


def dense_actions(
    backbone: OpenVLAOFT, obs: dict[str, Any], registry: Registry, instruction: str = INSTRUCTION
) -> torch.Tensor:
    policy = Policy(backbone, DENSE, registry)
    policy.reset(instruction)
    return torch.from_numpy(policy.act(obs).normalised)


@pytest.mark.parametrize("views", [("primary",), ("primary", "wrist"), ("primary", "left", "right")])
@pytest.mark.parametrize("proprio", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_specification(views: tuple[str, ...], proprio: bool, kv_heads: int, registry: Registry) -> None:
    backbone = tiny_policy_parts(tiny_config(views, proprio, kv_heads))
    obs = observation(backbone.config)
    expected = naive_actions(backbone, obs, INSTRUCTION)
    torch.testing.assert_close(dense_actions(backbone, obs, registry), expected, rtol=0, atol=1e-9)


def test_the_small_preset_equals_the_specification(registry: Registry) -> None:
    backbone = load_backbone("openvla-oft", registry, None, "small", "cpu", "float64", 0, {})
    assert isinstance(backbone, OpenVLAOFT)
    obs = observation(backbone.config)
    expected = naive_actions(backbone, obs, INSTRUCTION)
    torch.testing.assert_close(dense_actions(backbone, obs, registry), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_is_caught(trap: str, registry: Registry) -> None:
    backbone = tiny_policy_parts(tiny_config())
    obs = observation(backbone.config)
    actions = dense_actions(backbone, obs, registry)
    sprung = naive_actions(backbone, obs, INSTRUCTION, TRAPS[trap])
    assert (actions - sprung).abs().max() > 1e-7, "the comparison would not notice this mistake"


@given(st.integers(0, 2**32 - 1), st.sampled_from(["open the drawer", "pick up the black bowl", "a" * 30]))
def test_any_weights_and_images_equal_the_specification(seed: int, instruction: str) -> None:
    backbone = tiny_policy_parts(tiny_config(), seed % 1000)
    obs = observation(backbone.config, seed)
    expected = naive_actions(backbone, obs, instruction)
    torch.testing.assert_close(dense_actions(backbone, obs, Registry(), instruction), expected, rtol=0, atol=1e-9)


def test_the_image_is_looked_at(registry: Registry) -> None:
    backbone = tiny_policy_parts(tiny_config())
    black, white = observation(backbone.config), observation(backbone.config)
    for view in backbone.config.views:
        black["images"][view] = np.zeros((80, 80, 3), dtype=np.uint8)
        white["images"][view] = np.full((80, 80, 3), 255, dtype=np.uint8)
        assert (dense_actions(backbone, black, registry) - dense_actions(backbone, white, registry)).abs().max() > 1e-3
        white["images"][view] = black["images"][view]


def test_layout_of_the_release() -> None:
    from tokenprune_adapters.backbones.openvla_oft.config import SEVEN_B
    from tokenprune_adapters.inputs.tokenizer import Prompt

    layout = SEVEN_B.layout(Prompt(tuple(range(30)), range(9, 26)))
    roles = [(s.role, s.start, s.length) for s in layout.segments]
    assert roles == [
        (Role.BOS, 0, 1),
        (Role.VISION, 1, 256),
        (Role.VISION, 257, 256),
        (Role.PROPRIO, 513, 1),
        (Role.TEXT, 514, 30),
        (Role.ACTION, 544, 56),
        (Role.STOP, 600, 1),
    ]
    assert layout.span("instruction") == range(523, 540)
    assert layout.span("readout") == range(543, 599)


def test_gripper_is_passed_through_and_the_rest_is_scaled(registry: Registry) -> None:
    backbone = tiny_policy_parts(tiny_config())
    policy = Policy(backbone, DENSE, registry)
    policy.reset(INSTRUCTION)
    chunk = policy.act(observation(backbone.config))
    bounds = backbone.statistics.action
    assert np.array_equal(chunk.actions[:, 6], chunk.normalised[:, 6])
    expected = 0.5 * (chunk.normalised[:, :6] + 1) * (bounds.high[:6] - bounds.low[:6] + 1e-8) + bounds.low[:6]
    np.testing.assert_allclose(chunk.actions[:, :6], expected, rtol=0, atol=1e-12)


def test_centre_crop_can_be_turned_off(registry: Registry) -> None:
    cropped = tiny_policy_parts(tiny_config())
    whole = tiny_policy_parts(replace(tiny_config(), transform=replace(tiny_config().transform, center_crop_area=None)))
    obs = observation(cropped.config)
    assert (dense_actions(cropped, obs, registry) - dense_actions(whole, obs, registry)).abs().max() > 1e-3
