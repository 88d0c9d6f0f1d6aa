"""Frames the host is ready to draw: drawn once and only where a stage looks back, and no part of a query's time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.frames_host import BACKBONE, REGISTRY, VIEWS, cropped, live, noted, sight, started
from tests.helpers.planting import pipeline
from tests.helpers.tiny_oft import INSTRUCTION
from tokenprune.errors import ObservationError
from tokenprune.policy import Policy
from tokenprune_plugins.shared.bases import HalfConfig

CANVAS = {view: np.zeros((80, 80, 3), np.uint8) for view in VIEWS}


class Scene:
    """Draws one moment when it is called, into the same arrays as before, and counts how often."""

    def __init__(self, number: int) -> None:
        self.number, self.drawn = number, 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.drawn += 1
        for view in VIEWS:
            CANVAS[view][:] = sight(self.number)["images"][view]
        return CANVAS


def staged(policy: Policy, last: int, asked: set[int]) -> tuple[list[Scene], list[int | None]]:
    """Control steps 0 to `last`, with a scene to draw after each; how far back each query looked."""
    scenes, backs = [], []
    for step in range(last + 1):
        if step:
            scenes.append(Scene(step))
            policy.executed(np.zeros(7), frames=scenes[-1])
        if step in asked:
            (looked,) = policy.act(sight(step)).trace.looked_back.values()
            backs += looked
    return scenes, backs


@pytest.mark.parametrize(
    ("back", "asked", "drawn"), [(3, {0, 8, 16}, {5, 13}), (2, {8, 9}, {6, 7}), (8, {0, 8}, set())]
)
def test_frames_are_drawn_only_for_the_steps_looked_back_at(back: int, asked: set[int], drawn: set[int]) -> None:
    policy = started(back)
    scenes, _ = staged(policy, max(asked), asked)
    assert {scene.number for scene in scenes if scene.drawn} == drawn
    assert all(scene.drawn <= 1 for scene in scenes)
    for view in VIEWS:
        assert torch.equal(noted(policy, view)[1][0], cropped(max(asked) - back, view))


def test_drawn_frames_are_found_as_given_ones_are() -> None:
    for back in (1, 3, 11, None):
        asked = {0, 4, 9}
        given = live(started(back), 9, told=set(range(10)), asked=asked)
        assert staged(started(back), 9, asked)[1] == given


def test_a_frame_is_drawn_once_however_many_look_at_it() -> None:
    policy = started(2, 3)
    scenes = [Scene(step) for step in range(1, 6)]
    for scene in scenes:
        policy.executed(np.zeros(7), frames=scene)
    policy.act(sight(5))
    policy.act(sight(5))
    assert [scene.drawn for scene in scenes] == [0, 1, 1, 0, 0]
    for stage, step in enumerate((3, 2)):
        assert torch.equal(noted(policy, "wrist", stage)[1][0], cropped(step, "wrist"))


def test_drawing_is_no_part_of_the_time_of_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: ticks[0])

    def slow() -> dict[str, np.ndarray]:
        ticks[0] += 100.0
        return sight(1)["images"]

    policy = started(1)
    policy.executed(np.zeros(7), frames=slow)
    policy.executed(np.zeros(7), frames=Scene(2))
    trace = policy.act(sight(2)).trace
    assert ticks == [100.0]
    assert trace.milliseconds == 0.0
    assert set(trace.phases.values()) == {0.0}
    assert "drawing" not in trace.phases


def test_nothing_is_drawn_where_no_stage_looks_back() -> None:
    policy, scene = Policy(BACKBONE, pipeline(HalfConfig(use="uniform_grid")), REGISTRY), Scene(1)
    policy.reset(INSTRUCTION)
    policy.executed(np.zeros(7), frames=scene)
    policy.act(sight(1))
    assert (policy.looks_back, scene.drawn) == (False, 0)
    assert started(1).looks_back


def test_an_observation_and_frames_to_draw_are_one_too_many() -> None:
    policy = started(1)
    with pytest.raises(ObservationError, match="not with both"):
        policy.executed(np.zeros(7), observation=sight(1), frames=Scene(1))
    assert policy.act(sight(0)).trace.looked_back == {"test.look": (None,)}


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        ({"primary": sight(0)["images"]["primary"]}, "view 'wrist' is missing"),
        (sight(0)["images"] | {"wirst": sight(0)["images"]["wrist"]}, "no view 'wirst'; did you mean 'wrist'"),
        (sight(0)["images"] | {"wrist": np.zeros((8, 8, 3))}, "wrist"),
        (None, "an observation is"),
    ],
)
def test_wrong_frames_are_refused_when_they_are_drawn(drawn: Any, words: str) -> None:
    policy = started(1)
    policy.executed(np.zeros(7), frames=lambda: drawn)
    policy.executed(np.zeros(7))
    for _ in range(2):
        with pytest.raises(ObservationError, match=words):
            policy.act(sight(2))
