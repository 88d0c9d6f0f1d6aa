"""Past frames are cropped and uploaded no more often than a query needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.frames_host import BACKBONE, VIEWS, cropped, live, noted, sight, started
from tests.helpers.tiny_oft import INSTRUCTION


@pytest.fixture
def crops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many environments' frames the backbone was given, call by call."""
    counted: list[int] = []
    real = type(BACKBONE).pixels

    def pixels(self: Any, images: Any) -> Any:
        counted.append(len(images))
        return real(self, images)

    monkeypatch.setattr(type(BACKBONE), "pixels", pixels)
    return counted


def test_stages_that_look_at_one_step_share_its_frame(crops: list[int]) -> None:
    policy = started(4, 4, 2)
    for step in range(6):
        policy.executed(np.zeros(7), observation=sight(step + 1))
    policy.act(sight(6))
    # The current frames, step 2 once for two stages, step 4.
    assert crops == [1, 1, 1]
    for view in VIEWS:
        for stage, step in enumerate((2, 2, 4)):
            assert torch.equal(noted(policy, view, stage)[1][0], cropped(step, view))


def test_a_step_that_two_queries_look_at_is_cropped_once(crops: list[int]) -> None:
    policy = started(5)
    # Query after query, step 3 is the newest that is old enough.
    assert live(policy, 11, told={3}, asked={8, 9, 11}) == [5, 6, 8]
    assert crops == [1, 1, 1, 1]
    for view in VIEWS:
        assert all(torch.equal(note[view][1][0], cropped(3, view)) for note in policy.pipeline.stages[0].noted)


def test_no_more_cropped_frames_are_held_than_a_query_looked_at() -> None:
    policy = started(2, 4)
    assert live(policy, 12, told=set(range(13)), asked={6, 12})
    assert sorted(policy._slots[0].crops) == [8, 10]


def test_a_frame_cropped_for_one_environment_is_not_shown_to_another(crops: list[int]) -> None:
    policy = started(1, 1, slots=2)
    for slot in (0, 1):
        policy.executed(np.zeros(7), observation=sight(slot), slot=slot)
        policy.executed(np.zeros(7), slot=slot)
    policy.act_batch({slot: sight(5) for slot in (0, 1)})
    assert crops == [2, 1, 1]
    policy.reset(INSTRUCTION, 0)
    policy.executed(np.zeros(7), observation=sight(7))
    policy.executed(np.zeros(7))
    policy.act(sight(5))
    assert crops == [2, 1, 1, 1, 1]
    for view in VIEWS:
        batch, alone = (note[view][1] for note in policy.pipeline.stages[0].noted)
        assert torch.equal(batch, torch.stack([cropped(slot, view) for slot in (0, 1)]))
        assert torch.equal(alone[0], cropped(7, view))
