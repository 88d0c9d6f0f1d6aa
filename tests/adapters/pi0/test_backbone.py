"""pi0 and pi0.5 against a specification with every slot and pad laid out, and each way to get them subtly wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.naive_pi0 import Spec, naive
from tests.helpers.tiny_pi0 import (
    INSTRUCTION,
    VARIANTS,
    VIEWS,
    act,
    noise_for,
    observation,
    query,
    tiny_backbone,
    tiny_config,
)
from tokenprune.errors import ConfigError, ObservationError
from tokenprune.loading import load_backbone
from tokenprune.model.flops import QueryFlops, query_flops
from tokenprune.pipelines.binding import bind
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune.tokens.layout import Role
from tokenprune_adapters.backbones.pi0.backbone import PI0
from tokenprune_adapters.backbones.pi0.config import BASE, PI0Config, Variant, preset, with_options
from tokenprune_adapters.backbones.pi0.factory import PI0Factory, PI05Factory
from tokenprune_adapters.backbones.pi0.model import AdaptiveNorm, time_embeddings
from tokenprune_adapters.inputs.tokenizer import Prompt

FACTORIES = {"pi0": PI0Factory, "pi05": PI05Factory}

BOTH = {
    "language not scaled": Spec(scales_language=False),
    "images scaled": Spec(scales_images=True),
    "suffix behind the padded length": Spec(suffix_begins="padded"),
    "pads advance positions": Spec(pads_advance=True),
    "SigLIP with exact GELU": Spec(exact_gelu=True),
    "no final norm of the tower": Spec(tower_norm=False),
    "actions see only those before them": Spec(causal_actions=True),
    "float32 time embedding": Spec(time=torch.float32),
    "no final norm of the expert": Spec(final_norm_adapts=False),
}

TRAPS: dict[tuple[Variant, str], Spec] = {
    **{(variant, trap): spec for variant in VARIANTS for trap, spec in BOTH.items()},
    ("pi0", "state sees actions"): Spec(state_sees_actions=True),
    ("pi0", "prefix sees the state"): Spec(prefix_sees_state=True),
    ("pi05", "attention branch not gated"): Spec(attention_gate=False),
    ("pi05", "MLP branch not gated"): Spec(mlp_gate=False),
    ("pi05", "no state in the prompt"): Spec(state_in_prompt=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("views", [VIEWS[:1], VIEWS[:2], VIEWS])
def test_equals_the_specification(variant: Variant, views: tuple[str, ...]) -> None:
    backbone = tiny_backbone(tiny_config(variant, views))
    obs, noise = observation(backbone.config), noise_for(backbone.config)
    found, expected = query(backbone, obs, noise), naive(backbone, obs, INSTRUCTION, noise, Spec(absent_slots=2))
    torch.testing.assert_close(found, expected.actions[:, :7], rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_norms_in_float32_as_released(variant: Variant) -> None:
    backbone = tiny_backbone(tiny_config(variant), exact=False)
    obs, noise = observation(backbone.config), noise_for(backbone.config)
    expected = naive(backbone, obs, INSTRUCTION, noise, Spec(norms=torch.float32)).actions[:, :7]
    torch.testing.assert_close(query(backbone, obs, noise), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tiny_preset_equals_the_specification(variant: Variant) -> None:
    backbone = load_backbone(variant, Registry.discover(), None, "tiny", "cpu", "float64", 0, {"steps": 2})
    assert isinstance(backbone, PI0)
    obs, noise = observation(backbone.config), noise_for(backbone.config)
    statistics = replace(backbone.statistics, state=tiny_backbone(tiny_config(variant)).statistics.state)
    backbone.statistics = statistics
    expected = naive(backbone, obs, INSTRUCTION, noise, Spec(norms=torch.float32)).actions[:, :7]
    torch.testing.assert_close(query(backbone, obs, noise), expected, rtol=0, atol=1e-6)
    assert (expected - noise[:, :7]).abs().mean() > 0.1


@pytest.mark.parametrize(("variant", "trap"), TRAPS)
def test_each_trap_is_caught(variant: Variant, trap: str) -> None:
    backbone = tiny_backbone(tiny_config(variant, steps=3))
    obs, noise = observation(backbone.config), noise_for(backbone.config)
    sprung = naive(backbone, obs, INSTRUCTION, noise, TRAPS[variant, trap]).actions[:, :7]
    difference = (query(backbone, obs, noise) - sprung).abs().max()
    assert difference > 1e-6, f"the comparison would not notice this mistake: {difference}"


def test_a_prompt_filled_up_with_zeros_as_by_old_lerobot() -> None:
    backbone = tiny_backbone(replace(tiny_config("pi05", steps=2), prompt_state=32))
    obs, noise = observation(backbone.config), noise_for(backbone.config)
    expected = naive(backbone, obs, INSTRUCTION, noise).actions[:, :7]
    torch.testing.assert_close(query(backbone, obs, noise), expected, rtol=0, atol=1e-10)


def test_pi05_without_state_reads_none() -> None:
    backbone = tiny_backbone(with_options(tiny_config("pi05"), {"state_size": None}))
    noise, with_state = noise_for(backbone.config), observation(backbone.config)
    without = {"images": with_state["images"]}
    assert torch.equal(query(backbone, with_state, noise), query(backbone, without, noise))
    assert backbone.layout(INSTRUCTION).row_names == ("text", "instruction", "readout", "last")
    assert backbone.prompt(INSTRUCTION, with_state["state"]) == backbone.tokenizer.encode(INSTRUCTION, 200)


def test_noise_is_new_for_every_slot_and_query_and_the_same_again() -> None:
    backbone = tiny_backbone(tiny_config())
    obs, seen = observation(backbone.config), []
    for _ in range(2):
        policy = Policy(backbone, DENSE, Registry())
        for slot in (0, 1):
            policy.reset(INSTRUCTION, slot)
        seen.append([policy.act(obs, slot).normalised for slot in (0, 0, 1)])
    assert all(np.array_equal(first, again) for first, again in zip(*seen, strict=True))
    first, second, other = seen[0]
    assert np.abs(first - second).max() > 1e-2
    assert np.abs(first - other).max() > 1e-2


def test_prompts_of_pi05_change_length_with_the_state() -> None:
    backbone = tiny_backbone(tiny_config("pi05", steps=2))
    policy = Policy(backbone, DENSE, Registry())
    policy.reset(INSTRUCTION)
    lengths = set()
    for number, middle in enumerate((-1.0, 0.0, 0.6)):
        obs = {**observation(backbone.config, number), "state": np.full(8, middle)}
        noise = noise_for(backbone.config, number)
        expected = naive(backbone, obs, INSTRUCTION, noise).actions[:, :7]
        found = torch.from_numpy(act(policy, {0: obs}, noise)[0].normalised)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        layout = backbone.layout(INSTRUCTION, obs["state"])
        lengths.add(layout.n_tokens)
        state = layout.span("state")
        assert layout.views["wrist"].span.stop < layout.span("instruction").stop <= state.start
        assert state.stop <= layout.n_tokens
    assert len(lengths) > 1


def test_layout_of_the_releases() -> None:
    layout = BASE.layout(Prompt(tuple(range(48)), range(1, 47)))
    assert [(s.role, s.start, s.length, s.view) for s in layout.segments] == [
        (Role.VISION, 0, 256, "primary"),
        (Role.VISION, 256, 256, "wrist"),
        (Role.TEXT, 512, 48, None),
    ]
    assert layout.prunable == tuple(range(512))
    assert dict(layout.rows) == {"text": range(512, 560), "instruction": range(513, 559), "readout": range(0)}
    spelled = preset("pi05", "base").layout(Prompt(tuple(range(60)), range(5, 20), range(25, 55)))
    assert spelled.span("state") == range(537, 567)


def dense_flops(config: PI0Config, text: int) -> QueryFlops:
    info = config.info("base", untrained=True)
    return query_flops(info, bind(DENSE, info, Registry()).plan(config.layout(Prompt(tuple(range(text)), range(0)))))


def test_flops_at_release_size() -> None:
    # Totals in TF as published, of 2 views and the padded text; they also finish the prefix's last layer.
    for variant, text, prefix, flow, total in (("pi0", 48, 2.27, 0.36, 3.07), ("pi05", 200, 2.90, 0.37, 3.71)):
        flops = dense_flops(preset(variant, "base"), text)
        n, width, mlp = 512 + text, 2048, 16384
        unread = n * (2 * width * width + 6 * width * mlp) + 4 * n * n * width
        assert (flops.other["vision"] + flops.other["projector"]) / 1e12 == pytest.approx(0.44, rel=0.01)
        assert (flops.decoder + unread) / 1e12 == pytest.approx(prefix, rel=0.01)
        parts = flops.follow_up + sum(flops.other[part] for part in ("actions", "time"))
        assert parts / 1e12 == pytest.approx(flow, rel=0.06)
        assert (flops.total + unread) / 1e12 == pytest.approx(total, rel=0.03)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_small_preset_has_the_proportions_of_the_release(variant: Variant) -> None:
    shares = []
    for size in ("base", "small"):
        flops = dense_flops(preset(variant, size), 20)
        shares.append([flops.other["vision"] / flops.total, flops.follow_up / flops.total])
        assert preset(variant, size).tower.grid == (16, 16)
    np.testing.assert_allclose(shares[1], shares[0], atol=0.05)


def test_times_of_the_flow() -> None:
    found = time_embeddings(10, 16)
    assert found.dtype is torch.float64
    assert found.shape == (10, 16)
    for step in range(10):
        time = float(np.float32(1 - step / 10))
        for i in range(8):
            angle = 2 * math.pi * time / (4e-3 * 1000 ** (i / 7))
            assert found[step, i].item() == pytest.approx(math.sin(angle), abs=1e-10)
            assert found[step, 8 + i].item() == pytest.approx(math.cos(angle), abs=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_actions_in_the_units_of_the_robot(variant: Variant) -> None:
    backbone = tiny_backbone(tiny_config(variant))
    policy = Policy(backbone, DENSE, Registry())
    policy.reset(INSTRUCTION)
    chunk = policy.act(observation(backbone.config))
    found = backbone.statistics.action
    if variant == "pi0":
        expected = chunk.normalised * (found.std + 1e-6) + found.mean
    else:
        expected = (chunk.normalised + 1) / 2 * (found.high - found.low + 1e-6) + found.low
    assert chunk.actions.shape == (5, 7)
    np.testing.assert_allclose(chunk.actions, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_stays_near_float64_and_adds_its_steps_up_in_float32(variant: Variant) -> None:
    exact = tiny_backbone(tiny_config(variant), exact=False)
    coarse = tiny_backbone(tiny_config(variant), dtype=torch.bfloat16, exact=False)
    obs, noise = observation(exact.config), noise_for(exact.config)
    found = query(coarse, obs, noise)
    assert 0 < (query(exact, obs, noise) - found).abs().mean() < 0.1
    assert not torch.equal(found.to(torch.bfloat16).double(), found)
    assert torch.equal(found.float().double(), found)


def test_adaptive_norms_round_once() -> None:
    norm, generator = AdaptiveNorm(16, 16, 1e-6).bfloat16(), torch.Generator().manual_seed(0)
    x, condition = (torch.randn(1, *shape, 16, generator=generator).bfloat16() for shape in ((4,), ()))
    torch.nn.init.normal_(norm.dense.weight, 0, 0.1, generator)
    found, gate = norm(x, condition)
    # Unrounded, but for the numbers the condition is turned into.
    scale, shift, wanted = norm.dense(condition).double().reshape(3, 16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    assert found.dtype is gate.dtype is torch.bfloat16
    assert torch.equal(gate[0, 0].double(), wanted)
    assert torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("variant", VARIANTS)
def test_options(variant: Variant) -> None:
    options = {"views": ["front"], "horizon": 4, "steps": 3, "state_size": 6, "dims": 9}
    policy = Policy(
        load_backbone(variant, Registry.discover(), None, "tiny", "cpu", "float32", 0, options), DENSE, Registry()
    )
    policy.reset(INSTRUCTION)
    info = policy.backbone.info
    assert info.views == ("front",)
    assert dict(info.action.groups) == {"joints": tuple(range(9))}
    assert info.action.gripper is None
    assert sum(rows == 4 for rows, _ in info.follow_up.passes) == 3
    obs = {"images": {"front": np.zeros((64, 64, 3), dtype=np.uint8)}, "state": np.zeros(6)}
    assert policy.act(obs).actions.shape == (4, 9)
    with pytest.raises(ObservationError, match="state must be 6 numbers"):
        policy.act({**obs, "state": np.zeros(8)})


@pytest.mark.parametrize("variant", VARIANTS)
def test_relative_actions_are_added_to_the_state_they_were_asked_in(variant: Variant) -> None:
    config = tiny_config(variant)
    absolute, relative = (tiny_backbone(replace(config, relative=n)) for n in (0, 6))
    observations = [observation(config, seed) for seed in (0, 1)]
    chunks = []
    for backbone in (absolute, relative):
        policy = Policy(backbone, DENSE, Registry())
        for slot in (0, 1):
            policy.reset(INSTRUCTION, slot=slot)
        chunks.append(policy.act_batch(dict(enumerate(observations))))
    for slot, obs in enumerate(observations):
        moved = chunks[1][slot].actions - chunks[0][slot].actions
        np.testing.assert_allclose(moved, np.tile([*obs["state"][:6], 0], (len(moved), 1)), atol=1e-12)
        np.testing.assert_array_equal(chunks[1][slot].normalised, chunks[0][slot].normalised)


def test_the_prompt_spells_the_whole_state() -> None:
    assert with_options(tiny_config("pi05"), {"state_size": 14}).prompt_state == 14
    assert with_options(tiny_config("pi0"), {"state_size": 14}).prompt_state == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizn": 10}, "has no option 'horizn'; did you mean 'horizon'"),
        ({"horizon": 0}, "horizon must be a whole number, 1 or more, got 0"),
        ({"steps": True}, "steps must be a whole number"),
        ({"dims": 33}, "dims must be a whole number, 1 to 32, got 33"),
        ({"state_size": 33}, "state_size must be a whole number, 1 to 32"),
        ({"state_size": None}, "state_size must be a whole number, 1 to 32, got None"),
        ({"views": ["a", "a"]}, "views must be one to three distinct camera names"),
        ({"views": []}, "views must be one to three"),
        ({"views": "primary"}, "views must be one to three"),
        ({"unnorm_key": "libero"}, "unnorm_key names statistics of a checkpoint"),
        ({"relative": True}, "relative must be a whole number, 0 or more, got True"),
        ({"relative": 7, "state_size": 6}, "relative is 7; this policy's actions and state share 6 numbers"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PI0Factory.describe("tiny", None, options)


def test_presets_are_named() -> None:
    with pytest.raises(ConfigError, match="backbone 'pi05' has no preset 'bas'; did you mean 'base'"):
        PI05Factory.describe("bas", None, {})
    with pytest.raises(ConfigError, match="backbone 'pi0' needs a checkpoint, or a preset"):
        PI0Factory.describe(None, None, {})


def test_a_prompt_longer_than_those_of_the_release_is_refused() -> None:
    backbone = tiny_backbone(tiny_config())
    with pytest.raises(ObservationError, match="48"):
        backbone.layout("put the bowl on the plate " * 20)
