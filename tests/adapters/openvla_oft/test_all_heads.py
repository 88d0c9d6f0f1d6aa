"""OpenVLA-OFT's diffusion and discrete heads and its three robots, against the specification written out in loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.naive_oft import Spec, naive_actions
from tests.helpers.planting import REGISTRY, pipeline, pipelines, prop
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.engine.cuts import RepeatedCuts
from tokenprune.engine.query import Query
from tokenprune.errors import CheckpointError, ConfigError
from tokenprune.loading import load
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.policy import ActionChunk, Policy
from tokenprune.tokens.layout import Role
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import SEVEN_B, preset, with_options
from tokenprune_adapters.inputs.tokenizer import Prompt
from tokenprune_plugins.fastv import FastVConfig
from tokenprune_plugins.shared.bases import HalfConfig

RIGHT = Spec()
DIFFUSION, DISCRETE = {"head": "diffusion", "steps": 4}, {"head": "discrete"}
HEADS = [{}, DIFFUSION, DISCRETE, {**DISCRETE, "restrict": True}]
CHUNKS = {"libero": (8, 7), "aloha": (25, 14), "bridge": (5, 7)}
VIEWS = {"libero": ("primary", "wrist"), "aloha": ("high", "left_wrist", "right_wrist"), "bridge": ("primary",)}

DIFFUSION_TRAPS = {
    "timestep before proprio": Spec(timestep="before proprio"),
    "timestep after the prompt": Spec(timestep="after the prompt"),
    "no timestep": Spec(timestep=None),
    "zero placeholders": Spec(noisy_placeholders=False),
    "read-out not shifted": Spec(readout_shift=0),
    "no stop token": Spec(stop_token=False),
    "clean actions not clipped": Spec(clipped=False),
    "timesteps ascending": Spec(ascending=True),
}

DISCRETE_TRAPS = {
    "read-out not shifted": Spec(readout_shift=0),
    "padding rows are tokens": Spec(padding=0),
    "placeholders embedded": Spec(zero_placeholders=False),
    "causal attention": Spec(causal=True),
}


@contextmanager
def noted() -> Iterator[list[torch.Tensor]]:
    """Collect the noise that queries begin with."""
    seen: list[torch.Tensor] = []
    real = Query.noise
    with patch.object(Query, "noise", lambda self, *shape: (seen.append(real(self, *shape)), seen[-1])[1]):
        yield seen


def tiny(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> OpenVLAOFT:
    """A backbone whose rows of the chunk differ enough to be different tokens."""
    views = VIEWS[options.get("constants", "libero")]
    return tiny_policy_parts(tiny_config(views, **options), seed, dtype, contrast=6)


def act(
    backbone: OpenVLAOFT, config: PipelineConfig = DENSE, batch: int = 1, instruction: str = INSTRUCTION
) -> list[ActionChunk]:
    policy = Policy(backbone, config, REGISTRY)
    for slot in range(batch):
        policy.reset(instruction, slot)
    chunks = policy.act_batch({slot: observation(backbone.config, slot) for slot in range(batch)})
    return list(chunks.values())


def expected(backbone: OpenVLAOFT, spec: Spec = RIGHT, row: int = 0, **more: Any) -> np.ndarray:
    return naive_actions(backbone, observation(backbone.config, row), INSTRUCTION, spec, **more).numpy()


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


# Heads and robots equal the specification.


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("constants", CHUNKS)
def test_each_head_of_each_robot_equals_the_specification(constants: str, options: dict[str, Any]) -> None:
    backbone = tiny(constants=constants, **options)
    with noted() as noise:
        found = act(backbone)[0].normalised
    assert found.shape == CHUNKS[constants]
    assert len(noise) == (options.get("head") == "diffusion")
    assert gap(found, expected(backbone, noise=noise[0][0] if noise else None)) < 1e-10


@settings(max_examples=8)
@given(st.integers(0, 1000), st.booleans(), st.integers(1, 3), st.sampled_from([1, 2, 7]))
def test_diffusion_equals_the_specification(seed: int, proprio: bool, views: int, steps: int) -> None:
    names = ("primary", "left", "right")[:views]
    backbone = tiny_policy_parts(tiny_config(names, proprio, head="diffusion", steps=steps, depth=2), seed)
    with noted() as noise:
        found = act(backbone)[0].normalised
    assert gap(found, expected(backbone, noise=noise[0][0])) < 1e-10


@pytest.mark.parametrize("trap", DIFFUSION_TRAPS)
def test_each_trap_of_diffusion_is_caught(trap: str) -> None:
    backbone = tiny(**DIFFUSION)
    with noted() as noise:
        found = act(backbone)[0].normalised
    assert gap(found, expected(backbone, noise=noise[0][0])) < 1e-10
    assert gap(found, expected(backbone, DIFFUSION_TRAPS[trap], noise=noise[0][0])) > 1e-5


@pytest.mark.parametrize("trap", DISCRETE_TRAPS)
def test_each_trap_of_discrete_tokens_is_caught(trap: str) -> None:
    backbone = tiny(**DISCRETE, restrict=True)
    found = act(backbone)[0].normalised
    assert len(np.unique(found)) > 5
    assert gap(found, expected(backbone)) < 1e-12
    assert gap(found, expected(backbone, DISCRETE_TRAPS[trap])) > 1e-3


# Pruning holds for every denoising step.


@prop(pipelines(depth=3), st.integers(0, 5), st.sampled_from([1, 3]), examples=8)
def dropping(config: PipelineConfig, seed: int, batch: int) -> None:
    backbone = tiny(seed, **DIFFUSION)
    with noted() as noise:
        chunks = act(backbone, config, batch)
    for row, chunk in enumerate(chunks):
        fixed = set(chunk.trace.plan.layout.fixed)
        kept = {after: fixed | set(ids[row].tolist()) for after, ids in chunk.trace.kept.items()}
        assert gap(chunk.normalised, expected(backbone, row=row, kept=kept, noise=noise[0][row])) < 1e-10


def test_pruned_diffusion_equals_masking_the_same_tokens_at_every_step() -> None:
    dropping()


def test_a_step_without_cuts_is_noticed() -> None:
    dropping.notices(RepeatedCuts, "_cut", lambda self, after, hidden, tokens: (hidden, tokens))


def test_a_step_that_cuts_once_less_is_noticed() -> None:
    real = RepeatedCuts._cut
    dropping.notices(RepeatedCuts, "_cut", lambda self, after, *rest: rest if after == 1 else real(self, after, *rest))


def test_stages_are_asked_once_a_query() -> None:
    attention = pipeline(FastVConfig(use="fastv", after=(1,), keep=0.5, rows="text"))
    trace = act(tiny(**DIFFUSION), attention)[0].trace
    assert [(probe.layer, probe.rows) for probe in trace.probes] == [(1, "text")]
    assert trace.held == trace.plan.tokens
    assert trace.phases.keys() >= {"vision", "decoder", "selection", "head"}


def test_the_noise_is_the_querys_and_not_the_pipelines() -> None:
    backbone = tiny(**DIFFUSION)
    with noted() as noise:
        for config in (DENSE, pipeline(HalfConfig(use="random", after=0, keep=0.5))):
            policy = Policy(backbone, config, REGISTRY)
            policy.reset(INSTRUCTION)
            for _ in range(2):
                policy.act(observation(backbone.config))
    assert [n.shape for n in noise] == [(1, 8, 7)] * 4
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1], noise[3])
    assert not torch.equal(noise[0], noise[1])


# What the core is told.


def roles(**options: Any) -> list[tuple[str, int, int]]:
    layout = with_options(SEVEN_B, options).layout(Prompt(tuple(range(30)), range(9, 26)))
    assert layout.span("action") == range(layout.span("text").stop, layout.n_tokens - 1)
    shift = layout.span("text").stop - 1
    assert layout.readout == range(shift, shift + len(layout.span("action")))
    return [(s.role, s.start, s.length) for s in layout.segments]


def test_the_timestep_has_a_token_between_proprio_and_prompt() -> None:
    with_state = roles(head="diffusion")
    assert with_state[3:] == [
        (Role.PROPRIO, 513, 1),
        (Role.STATE, 514, 1),
        (Role.TEXT, 515, 30),
        (Role.ACTION, 545, 56),
        (Role.STOP, 601, 1),
    ]
    assert roles(head="diffusion", proprio=False)[3:5] == [(Role.STATE, 513, 1), (Role.TEXT, 514, 30)]
    assert roles(head="discrete") == roles()


def test_tokens_of_the_other_robots() -> None:
    assert roles(constants="aloha")[3:] == [
        (Role.VISION, 513, 256),
        (Role.PROPRIO, 769, 1),
        (Role.TEXT, 770, 30),
        (Role.ACTION, 800, 350),
        (Role.STOP, 1150, 1),
    ]
    assert roles(constants="bridge")[1:] == [
        (Role.VISION, 1, 256),
        (Role.PROPRIO, 257, 1),
        (Role.TEXT, 258, 30),
        (Role.ACTION, 288, 35),
        (Role.STOP, 323, 1),
    ]


@pytest.mark.parametrize("options", [*HEADS, {"constants": "aloha", **DIFFUSION}, {"proprio": False, **DIFFUSION}])
def test_a_prompt_fills_the_positions_exactly(options: dict[str, Any]) -> None:
    config = with_options(SEVEN_B, options)
    longest = Prompt(tuple(range(config.max_text)), range(3))
    assert config.layout(longest).n_tokens == 2048


def test_the_robots() -> None:
    libero, aloha, bridge = (with_options(SEVEN_B, {"constants": name}) for name in CHUNKS)
    assert libero == SEVEN_B
    assert [config.views for config in (libero, aloha, bridge)] == list(VIEWS.values())
    assert [config.state_size for config in (libero, aloha, bridge)] == [8, 14, 7]
    assert [config.bounds for config in (libero, aloha, bridge)] == [("q01", "q99"), ("min", "max"), ("q01", "q99")]
    assert libero.action.metric == {"translation": 0.05, "rotation": 0.5}
    assert aloha.action.metric == bridge.action.metric == {}
    assert aloha.action.gripper is None
    assert bridge.action.gripper == (6, 0.5)


# Discrete tokens.


def test_without_a_restriction_any_token_may_be_chosen() -> None:
    free, bound = tiny(**DISCRETE), tiny(**DISCRETE, restrict=True)
    with torch.no_grad():
        for backbone in (free, bound):
            backbone.model.language_model.lm_head.weight[100:].mul_(1e-3)
    assert np.array_equal(np.unique(act(free)[0].normalised), [1 - 1 / 255])
    assert len(np.unique(act(bound)[0].normalised)) > 2


def test_the_gripper_of_discrete_actions_is_passed_through() -> None:
    backbone = tiny(**DISCRETE, restrict=True)
    chunk, bounds = act(backbone)[0], backbone.statistics.action
    assert np.array_equal(chunk.actions[:, 6], chunk.normalised[:, 6])
    scaled = 0.5 * (chunk.normalised[:, :6] + 1) * (bounds.high[:6] - bounds.low[:6] + 1e-8) + bounds.low[:6]
    assert gap(chunk.actions[:, :6], scaled) < 1e-12


# Options.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "l2"}, ["'l2'", "did you mean 'l1'"]),
        ({"head": ["l1"]}, ["head", "['l1']"]),
        ({"steps": 10}, ["steps", "head=diffusion", "'l1'"]),
        ({"head": "discrete", "steps": 10}, ["steps", "head=diffusion", "'discrete'"]),
        ({"restrict": True}, ["restrict", "head=discrete", "'l1'"]),
        ({"head": "discrete", "restrict": 1}, ["restrict", "true or false", "1"]),
        ({"head": "diffusion", "steps": 51}, ["steps", "1 to 50", "51"]),
        ({"head": "diffusion", "steps": 0}, ["steps", "1 to 50", "0"]),
        ({"head": "diffusion", "steps": True}, ["steps", "True"]),
        ({"constants": "alloha"}, ["'alloha'", "did you mean 'aloha'"]),
        ({"constants": ["aloha"]}, ["constants", "['aloha']"]),
        ({"horizon": 0}, ["horizon", "0"]),
        ({"horizon": 8.0}, ["horizon", "8.0"]),
        ({"horizon": 300}, ["2048 positions", "2 views", "2100 numbers", "smaller horizon"]),
        ({"film": "yes"}, ["film", "true or false", "'yes'"]),
        ({"views": ["a", "a"]}, ["views", "distinct"]),
        ({"views": ["a", "b", "c", "d"]}, ["views", "one to three"]),
        ({"step": 3}, ["no option 'step'", "did you mean 'steps'"]),
    ],
)
def test_wrong_options_say_what_is_valid(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        with_options(preset("7b"), options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_constants_come_first_whatever_the_order() -> None:
    config = with_options(SEVEN_B, {"views": ["top"], "horizon": 50, "proprio": False, "constants": "aloha"})
    assert (config.views, config.action.horizon, config.action.dims, config.state_size) == (("top",), 50, 14, None)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"head": "diffusion", "steps": 2}, (8, 7)),
        ({"head": "discrete"}, (8, 7)),
        ({"constants": "aloha"}, (25, 14)),
        ({"constants": "aloha", "film": True, "head": "diffusion", "steps": 1, "horizon": 12}, (12, 14)),
        ({"constants": "bridge", "views": ["over"], "head": "discrete"}, (5, 7)),
    ],
)
def test_presets_take_every_option(options: dict[str, Any], shape: tuple[int, int]) -> None:
    policy = load("openvla-oft", preset="tiny", dtype="float32", registry=REGISTRY, **options)
    policy.reset(INSTRUCTION)
    config = policy.backbone.config
    chunk = policy.act(observation(config))
    assert chunk.actions.shape == shape
    # Untrained tokens are chosen among the actions, so that they say something.
    assert config.restrict
    assert policy.backbone.info.repeats == options.get("steps", 1)


def test_a_vocabulary_without_room_for_actions_is_refused() -> None:
    config = tiny_config(**DISCRETE)
    with pytest.raises(CheckpointError, match="action bins in a vocabulary of 200"):
        tiny_policy_parts(replace(config, padding=config.body.vocab - 200))
