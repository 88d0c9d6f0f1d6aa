"""OpenVLA against a specification written out token by token, and each way to get it subtly wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.naive_openvla import Answer, Spec, naive_query
from tests.helpers.tiny_openvla import (
    INSTRUCTION,
    act,
    observation,
    registry,
    tiny_config,
    tiny_openvla,
    watched,
)
from tokenprune.errors import ConfigError, ObservationError, TokenPruneError
from tokenprune.loading import load, load_backbone
from tokenprune.pipelines.config import DENSE
from tokenprune.tokens.layout import Role
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA
from tokenprune_adapters.backbones.openvla.config import PRESETS, SEVEN_B, preset
from tokenprune_adapters.backbones.openvla.factory import OpenVLAFactory
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.tokenizer import Prompt

# Name: the mistake, and whether it must show although only ids that are actions are chosen.
TRAPS = {
    "norm epsilon 1e-5": (Spec(eps=1e-5), False),
    "SigLIP first": (Spec(dino_first=False), False),
    "no empty token after the prompt": (Spec(empty_token=False), False),
    "BOS after the image": (Spec(bos_first=False), False),
    "stop token after the prompt": (Spec(stop_token=True), False),
    "the image not looked at": (Spec(sees_image=False), False),
    "padding rows are tokens": (Spec(padding=0), True),
    "bins not clipped": (Spec(clipped=False), False),
    "gripper scaled like the rest": (Spec(passes_gripper=False), True),
}


def asked(backbone: OpenVLA, obs: dict[str, Any], instruction: str = INSTRUCTION) -> Answer:
    """What the adapter answers."""
    seen = watched(backbone)
    (chunk,) = act(backbone, DENSE, [obs], instruction)
    logits = torch.cat(seen.logits)
    first = backbone.bins.ids.start if backbone.config.restrict else 0
    last = backbone.bins.ids.stop if backbone.config.restrict else logits.shape[1]
    ids = (logits[:, first:last].argmax(-1) + first).tolist()
    return Answer(ids, torch.cat(seen.hidden), logits, [], chunk.normalised[0].tolist(), chunk.actions[0].tolist())


def apart(found: Answer, expected: Answer) -> float:
    """The largest difference of anything in the answers."""
    return max(
        (found.hidden - expected.hidden).abs().max().item(),
        (found.logits - expected.logits).abs().max().item(),
        *(abs(a - b) for a, b in zip(found.normalised, expected.normalised, strict=True)),
        *(abs(a - b) for a, b in zip(found.action, expected.action, strict=True)),
        *(abs(a - b) for a, b in zip(found.ids, expected.ids, strict=True)),
    )


@pytest.mark.parametrize("restrict", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_specification(restrict: bool, kv_heads: int) -> None:
    backbone = tiny_openvla(tiny_config(kv_heads, restrict=restrict))
    found, expected = asked(backbone, observation()), naive_query(backbone, observation(), INSTRUCTION)
    assert found.ids == expected.ids
    assert apart(found, expected) < 1e-9


@settings(max_examples=10)
@given(st.integers(0, 999), st.booleans(), st.sampled_from(["pure", "vicuna"]), st.sampled_from(["go", "a" * 30]))
def test_any_weights_and_images_equal_the_specification(seed: int, restrict: bool, prompt: str, words: str) -> None:
    backbone = tiny_openvla(tiny_config(restrict=restrict, prompt=prompt), seed)
    assert apart(asked(backbone, observation(seed), words), naive_query(backbone, observation(seed), words)) < 1e-9


def test_the_tiny_preset_equals_the_specification() -> None:
    backbone = load_backbone("openvla", registry(), None, "tiny", "cpu", "float64", 0, {})
    assert isinstance(backbone, OpenVLA)
    found, expected = asked(backbone, observation()), naive_query(backbone, observation(), INSTRUCTION)
    assert found.ids == expected.ids
    # Its norms are transformers' own, which round to float32.
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_is_caught(trap: str) -> None:
    spec, restrict = TRAPS[trap]
    backbone = tiny_openvla(tiny_config(restrict=restrict))
    sprung = naive_query(backbone, observation(), INSTRUCTION, spec)
    assert apart(asked(backbone, observation()), sprung) > 1e-7, "the comparison would not notice this mistake"


def test_the_whole_vocabulary_unless_restricted() -> None:
    free, bound = (tiny_openvla(tiny_config(restrict=restrict)) for restrict in (False, True))
    assert not set(asked(free, observation()).ids) <= set(range(1728, 1984))
    assert set(asked(bound, observation()).ids) <= set(range(1728, 1984))


def test_layout_of_the_release() -> None:
    layout = SEVEN_B.layout(Prompt(tuple(range(30)), range(9, 26)))
    roles = [(s.role, s.start, s.length) for s in layout.segments]
    assert roles == [(Role.BOS, 0, 1), (Role.VISION, 1, 256), (Role.TEXT, 257, 30)]
    assert layout.span("text") == range(257, 287)
    assert layout.span("instruction") == range(266, 283)
    assert layout.readout == range(286, 287)
    assert layout.prunable == tuple(range(1, 257))


def test_numbers_of_the_release() -> None:
    info = SEVEN_B.info("7b", untrained=True)
    assert (SEVEN_B.vocab, SEVEN_B.max_text) == (32000, 2048 - 257 - 6)
    assert (info.action.horizon, info.action.dims, info.state_size) == (1, 7, None)
    follow = info.follow_up
    assert follow is not None
    assert (follow.phase, follow.passes) == ("decode", ((1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5)))
    assert SEVEN_B.restrict is False


@pytest.mark.parametrize("name", PRESETS)
def test_text_never_collides_with_actions_in_a_preset(name: str) -> None:
    config = preset(name)
    assert config.vocab - config.n_bins >= PromptTokenizer.bundled().vocab_size
    assert config.restrict


def test_gripper_is_passed_through_and_the_rest_is_scaled_without_an_epsilon() -> None:
    backbone = tiny_openvla(tiny_config(restrict=True))
    (chunk,) = act(backbone, DENSE, [observation()])
    bounds = backbone.statistics.action
    assert chunk.actions.shape == (1, 7)
    assert chunk.actions[0, 6] == chunk.normalised[0, 6]
    expected = 0.5 * (chunk.normalised[0, :6] + 1) * (bounds.high[:6] - bounds.low[:6]) + bounds.low[:6]
    np.testing.assert_array_equal(chunk.actions[0, :6], expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_no_action(value: float) -> None:
    backbone = tiny_openvla()
    backbone.model.language_model.lm_head.weight[1900].fill_(value)
    with pytest.raises(TokenPruneError, match="not finite"):
        act(backbone, DENSE, [observation()])


def test_centre_crop_can_be_turned_off() -> None:
    whole = replace(tiny_config(), transform=replace(tiny_config().transform, center_crop_area=None))
    assert apart(asked(tiny_openvla(), observation()), asked(tiny_openvla(whole), observation())) > 1e-3


def test_phases() -> None:
    (chunk,) = act(tiny_openvla(), DENSE, [observation()])
    assert {"vision", "decoder", "decode", "head"} <= chunk.trace.phases.keys()


# Options, and what is refused.


def test_options() -> None:
    policy = load(
        "openvla", preset="tiny", dtype="float32", views="wrist", center_crop=False, prompt="vicuna", restrict=False
    )
    backbone = policy.backbone
    assert isinstance(backbone, OpenVLA)
    assert backbone.info.views == ("wrist",)
    assert (backbone.config.transform.center_crop_area, backbone.config.restrict) == (None, False)
    policy.reset(INSTRUCTION)
    assert np.isfinite(policy.act(observation(view="wrist")).actions).all()
    plain = PromptTokenizer.bundled().encode(INSTRUCTION)
    assert len(backbone.layout(INSTRUCTION).span("text")) > len(plain.ids)
    described = OpenVLAFactory.describe("tiny", None, {"views": ["wrist"], "prompt": "vicuna"})
    assert described.info.views == ("wrist",)
    assert described.layout(INSTRUCTION) == backbone.layout(INSTRUCTION)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"view": "wrist"}, ("no option 'view'", "did you mean 'views'")),
        ({"views": ["primary", "wrist"]}, ("views", "one camera name", "['primary', 'wrist']")),
        ({"views": []}, ("views", "[]")),
        ({"views": 1}, ("views", "1")),
        ({"views": ""}, ("views", "''")),
        ({"center_crop": 0.9}, ("center_crop", "0.9", "true or false")),
        ({"restrict": "yes"}, ("restrict", "'yes'")),
        ({"prompt": "vicunna"}, ("'vicunna'", "did you mean 'vicuna'")),
        ({"prompt": ["pure"]}, ("prompt", "['pure']")),
        ({"unnorm_key": "libero"}, ("unnorm_key", "preset has none")),
        ({"proprio": False}, ("no option 'proprio'",)),
    ],
)
def test_wrong_options(options: dict[str, Any], words: tuple[str, ...]) -> None:
    for make in (
        lambda: OpenVLAFactory.describe("tiny", None, options),
        lambda: OpenVLAFactory.build("tiny", None, options, torch.device("cpu"), torch.float32, 0),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [(None, ("needs a checkpoint", "7b, small, tiny")), ("tinny", ("no preset 'tinny'", "did you mean 'tiny'"))],
)
def test_wrong_presets(name: str | None, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        OpenVLAFactory.describe(name, None, {})
    assert [word for word in words if word not in str(error.value)] == []


def test_an_instruction_that_leaves_no_room() -> None:
    backbone = tiny_openvla()
    room = 512 - 17 - 6
    assert backbone.config.max_text == room
    with pytest.raises(ObservationError, match=f"at most {room}"):
        backbone.layout("b c " * 400)
