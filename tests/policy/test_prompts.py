"""An instruction is tokenised once per reset; where the prompt spells the robot state, once more per query."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.backbones import BACKBONES
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_oft import INSTRUCTION
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy


@pytest.mark.parametrize(("family", "per_query"), [("oft", 0), ("openvla", 0), ("pi0", 0), ("pi05", 1)])
def test_an_instruction_is_tokenised_once_per_reset(
    family: str, per_query: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, observation, _ = BACKBONES[family]()
    real, tokenised = type(backbone.tokenizer).encode, []

    def counting(self: Any, instruction: str, *rest: Any) -> Any:
        tokenised.append(instruction)
        return real(self, instruction, *rest)

    monkeypatch.setattr(type(backbone.tokenizer), "encode", counting)
    policy = Policy(backbone, DENSE, REGISTRY)
    policy.reset(INSTRUCTION)
    assert len(tokenised) == 1
    for _ in range(3):
        policy.act(observation)
    assert len(tokenised) == 1 + 3 * per_query


def test_the_state_of_each_query_is_in_its_prompt() -> None:
    backbone, observation, _ = BACKBONES["pi05"]()
    policy = Policy(backbone, DENSE, REGISTRY)
    policy.reset(INSTRUCTION)
    moved = {**observation, "state": np.asarray(observation["state"]) * -1 + 0.3}
    first, second, third = (policy.act(seen).trace.plan.layout for seen in (observation, moved, observation))
    assert first == third
    assert second == backbone.encode(INSTRUCTION, moved["state"]).layout
