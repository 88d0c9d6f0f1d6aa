"""Bad input to a policy: a typed error that names the thing, before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.errors import ObservationError
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Policy:
    backbone = tiny_policy_parts(tiny_config())
    policy = Policy(backbone, DENSE, Registry())
    policy.reset(INSTRUCTION)

    def must_not_run(*_: object) -> None:
        raise AssertionError("the model ran on bad input")

    monkeypatch.setattr(backbone, "infer", must_not_run)
    monkeypatch.setattr(backbone, "prepare", must_not_run)
    return policy


def spoiled(policy: Policy, part: str, value: Any) -> dict[str, Any]:
    good = observation(policy.backbone.config)
    if part == "state":
        good["state"] = value
    elif part == "drop":
        del good["images"][value]
    else:
        good["images"][part] = value
    return good


IMAGE = np.zeros((80, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("wrist", IMAGE.astype(np.float32), ("wrist", "float32", "uint8")),
        ("wrist", IMAGE.transpose(2, 0, 1), ("wrist", "transpose")),
        ("wrist", IMAGE[None], ("wrist", "one frame")),
        ("wrist", IMAGE[:10], ("wrist", "[10, 80, 3]", "64")),
        ("wrist", np.zeros((80, 80, 4), dtype=np.uint8), ("wrist", "[80, 80, 4]")),
        ("wrist", [[0]], ("wrist", "list")),
        ("drop", "wrist", ("'wrist' is missing", "primary, wrist")),
        ("wirst", IMAGE, ("no view 'wirst'", "did you mean 'wrist'")),
        ("state", None, ("state is missing", "8")),
        ("state", np.zeros(7), ("8 numbers", "[7]")),
        ("state", np.array([0, 1, np.nan, 3, 4, np.inf, 6, 7]), ("NaN", "[2, 5]")),
        ("state", "left", ("8 numbers", "str")),
    ],
)
def test_bad_observations(policy: Policy, part: str, value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ObservationError) as error:
        policy.act(spoiled(policy, part, value))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("bad", [None, {}, {"image": IMAGE}, {"images": IMAGE}])
def test_things_that_are_no_observation(policy: Policy, bad: Any) -> None:
    with pytest.raises(ObservationError, match="an observation is"):
        policy.act(bad)


def test_unknown_key_names_the_nearest(policy: Policy) -> None:
    with pytest.raises(ObservationError, match="no 'sate'; did you mean 'state'"):
        policy.act(observation(policy.backbone.config) | {"sate": np.zeros(8)})


@pytest.mark.parametrize("instruction", ["", "   ", None, 3, "put\x00it"])
def test_bad_instructions(policy: Policy, instruction: Any) -> None:
    with pytest.raises(ObservationError):
        policy.reset(instruction)


def test_over_long_instruction_names_both_numbers(policy: Policy) -> None:
    limit = policy.backbone.config.max_text
    with pytest.raises(ObservationError, match=str(limit)):
        policy.reset("put the bowl on the plate " * 200)


def test_an_episode_must_have_begun(policy: Policy) -> None:
    with pytest.raises(ObservationError, match=r"slot 3.*reset"):
        policy.act(observation(policy.backbone.config), slot=3)
    with pytest.raises(ObservationError, match=r"slot 3.*reset"):
        policy.executed(np.zeros(7), slot=3)


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan), np.zeros((1, 7))])
def test_bad_executed_actions(policy: Policy, action: np.ndarray) -> None:
    with pytest.raises(ObservationError, match="7 finite numbers"):
        policy.executed(action)


def test_one_bad_observation_in_a_batch_stops_the_batch(policy: Policy) -> None:
    policy.reset(INSTRUCTION, slot=1)
    good, bad = observation(policy.backbone.config), spoiled(policy, "drop", "wrist")
    with pytest.raises(ObservationError, match="wrist"):
        policy.act_batch({0: good, 1: bad})
