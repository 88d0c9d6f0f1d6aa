"""OpenVLA-OFT with FiLM: the towers hear the instruction, as the specification written out in loops says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.naive_oft import Spec, naive_actions
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.engine.query import Query
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.policy import Policy
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_adapters.backbones.prismatic.model import VisionBackbone
from tokenprune_plugins.shared.bases import HalfConfig

# As many tokens, so that both share a pass, and others, so that their mean is another.
OTHER = "push the plate to the stove"

TRAPS = {
    "the mean has no BOS": Spec(film_bos=False),
    "the mean has no stop token": Spec(film_stop=False),
    "the mean has the placeholders": Spec(film_placeholders=True),
    "before attention": Spec(film_place="before"),
    "after the MLP": Spec(film_place="after"),
    "x * g + b": Spec(film_one=False),
    "not at all": Spec(film_place="nowhere"),
}


def tiny(views: tuple[str, ...] = ("primary", "wrist"), seed: int = 0, **options: Any) -> OpenVLAOFT:
    return tiny_policy_parts(tiny_config(views, film=True, **options), seed)


def act(backbone: OpenVLAOFT, config: PipelineConfig = DENSE, instruction: str = INSTRUCTION, seed: int = 0) -> Any:
    policy = Policy(backbone, config, REGISTRY)
    policy.reset(instruction)
    return policy.act(observation(backbone.config, seed))


def features(backbone: OpenVLAOFT, instruction: str) -> dict[str, Tensor]:
    """What stages get of each view."""
    seen: dict[str, Tensor] = {}
    real = Query.transform
    with patch.object(Query, "transform", lambda self, view, x: real(self, view, seen.setdefault(view, x))):
        act(backbone, instruction=instruction)
    return seen


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@settings(max_examples=10)
@given(st.integers(0, 1000), st.integers(1, 3), st.sampled_from([INSTRUCTION, "push it", "a" * 30]))
def test_equals_the_specification(seed: int, views: int, instruction: str) -> None:
    backbone = tiny(("primary", "left", "right")[:views], seed)
    found = act(backbone, instruction=instruction, seed=seed).normalised
    expected = naive_actions(backbone, observation(backbone.config, seed), instruction)
    assert gap(found, expected.numpy()) < 1e-10


@pytest.mark.parametrize("options", [{"constants": "aloha"}, {"head": "diffusion", "steps": 2}, {"head": "discrete"}])
def test_film_goes_with_everything_else(options: dict[str, Any]) -> None:
    backbone, noise = tiny(**options), torch.randn(8, 7)
    with patch.object(Query, "noise", lambda self, *shape: noise[None]):
        found = act(backbone).normalised
    expected = naive_actions(backbone, observation(backbone.config), INSTRUCTION, noise=noise)
    assert gap(found, expected.numpy()) < 1e-10


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_is_caught(trap: str) -> None:
    backbone = tiny()
    found, obs = act(backbone).normalised, observation(backbone.config)
    assert gap(found, naive_actions(backbone, obs, INSTRUCTION).numpy()) < 1e-10
    assert gap(found, naive_actions(backbone, obs, INSTRUCTION, TRAPS[trap]).numpy()) > 1e-3


def test_another_instruction_changes_what_is_seen() -> None:
    heard, deaf = tiny(), tiny_policy_parts(tiny_config())
    first, second = (features(heard, instruction) for instruction in (INSTRUCTION, OTHER))
    third, fourth = (features(deaf, instruction) for instruction in (INSTRUCTION, OTHER))
    for view in heard.config.views:
        assert (first[view] - second[view]).abs().amax(-1).min() > 1e-3, "every patch"
        assert torch.equal(third[view], fourth[view])


def rows_are_independent() -> None:
    backbone = tiny(("primary", "left", "right"))
    assert backbone.layout(INSTRUCTION) == backbone.layout(OTHER), "one pass for both"
    half = pipeline(HalfConfig(use="random", after=("embedding", 1), keep=0.5))
    together, alone = (Policy(backbone, half, REGISTRY) for _ in range(2))
    for slot, instruction in enumerate((INSTRUCTION, OTHER, INSTRUCTION)):
        together.reset(instruction, slot)
        alone.reset(instruction, slot)
    observations = {slot: observation(backbone.config, slot) for slot in range(3)}
    for slot, chunk in together.act_batch(observations).items():
        assert gap(chunk.normalised, alone.act(observations[slot], slot).normalised) < 1e-10


def test_each_row_of_a_batch_hears_its_own_instruction() -> None:
    rows_are_independent()


@pytest.mark.parametrize("order", [lambda rows: sorted(range(rows), key=lambda row: row % 3), lambda rows: [0] * rows])
def test_words_in_another_row_are_noticed(order: Callable[[int], list[int]]) -> None:
    real = VisionBackbone.forward

    def mixed(
        self: VisionBackbone, pixels: Tensor, transform: Any, dtype: torch.dtype, words: Tensor, look: Any
    ) -> Tensor:
        return real(self, pixels, transform, dtype, words[order(len(words))], look)

    with patch.object(VisionBackbone, "forward", mixed), pytest.raises(AssertionError):
        rows_are_independent()


def test_the_layout_is_the_same() -> None:
    heard, deaf = tiny(), tiny_policy_parts(tiny_config())
    assert heard.layout(INSTRUCTION) == deaf.layout(INSTRUCTION)
    assert {view: x.shape for view, x in features(heard, OTHER).items()} == {
        view: x.shape for view, x in features(deaf, OTHER).items()
    }


def test_flops_of_what_hears() -> None:
    heard, deaf = (tiny_config(constants="aloha", film=film).info("tiny", untrained=True) for film in (True, False))
    # Two linear layers from 32 numbers to the tower's width, in two blocks of each tower, for each of three views.
    assert heard.other_flops["vision"] - deaf.other_flops["vision"] == 2 * 3 * 2 * 2 * 32 * (24 + 16)
