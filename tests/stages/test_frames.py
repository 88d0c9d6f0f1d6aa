"""Frames of past control steps: what is kept of them, which one is found, and what a stage is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers.frames_host import BACKBONE, REGISTRY, VIEWS, LookConfig, cropped, live, noted, sight, started
from tests.helpers.planting import pipeline
from tests.helpers.tiny_oft import INSTRUCTION
from tokenprune.errors import ObservationError, StageError
from tokenprune.policy import Policy
from tokenprune.stages.frames import FrameBuffer
from tokenprune_plugins.shared.bases import HalfConfig


def picture(step: int) -> dict[str, np.ndarray]:
    return {"primary": np.full((2, 2, 3), step, np.uint8)}


@given(
    capacity=st.integers(1, 12),
    steps=st.sets(st.integers(0, 40), min_size=1, max_size=40).map(sorted),
    later=st.integers(0, 5),
    data=st.data(),
)
@example(capacity=11, steps=[0, 8, 16], later=0, data=None)
def test_the_newest_frame_old_enough_is_found_else_the_oldest(
    capacity: int, steps: list[int], later: int, data: st.DataObject | None
) -> None:
    buffer = FrameBuffer(capacity)
    for step in steps:
        buffer.add(step, picture(step))
    now, back = steps[-1] + later, data.draw(st.integers(1, capacity)) if data else capacity
    past = [step for step in steps if step < now]
    old_enough = [step for step in past if now - step >= back]
    wanted = old_enough[-1] if old_enough else past[0] if past else None
    assert buffer.find(now, back) == wanted
    if wanted is not None:
        assert buffer.images(wanted)["primary"].tolist() == picture(wanted)["primary"].tolist()


@given(capacity=st.integers(0, 12), gap=st.integers(1, 15))
def test_no_more_frames_are_kept_than_are_looked_back_at(capacity: int, gap: int) -> None:
    buffer, steps = FrameBuffer(capacity), range(0, 15 * gap, gap)
    for step in steps:
        buffer.add(step, picture(step))
    kept = {buffer.find(step + 1, 1) for step in steps} - {None}
    assert len(kept) == (1 + -(-capacity // gap) if capacity else 0)


def test_frames_are_copied_when_they_are_added() -> None:
    buffer, image = FrameBuffer(3), np.zeros((2, 2, 3), np.uint8)
    buffer.add(0, {"primary": image})
    image[:] = 9
    buffer.add(1, {"primary": image})
    assert [int(buffer.images(step)["primary"].max()) for step in (0, 1)] == [0, 9]


def test_a_frame_given_again_replaces_the_one_of_the_same_step() -> None:
    buffer = FrameBuffer(3)
    for value in (4, 7):
        buffer.add(0, picture(value))
    assert buffer.images(0)["primary"].max() == 7


@pytest.mark.parametrize(
    ("back", "told", "found"),
    [
        (3, set(range(9)), [None, 3]),
        (8, set(range(9)), [None, 8]),
        (11, set(range(9)), [None, 8]),
        (3, set(), [None, 8]),
        (3, {2, 7}, [None, 6]),
        # The current frame is not its own past.
        (1, {8}, [None, 8]),
        (0, set(range(9)), [0, 0]),
        (None, set(range(9)), [None, None]),
    ],
)
def test_a_query_looks_back_at_the_frames_the_host_gave(
    back: int | None, told: set[int], found: list[int | None]
) -> None:
    policy = started(back)
    assert live(policy, 8, told, asked={0, 8}) == found
    for view in VIEWS:
        current, past, had = noted(policy, view)
        assert torch.equal(current[0], cropped(8, view))
        if found[-1] is None:
            assert had.tolist() == [False]
            assert not past.any()
        else:
            assert had.tolist() == [True]
            assert torch.equal(past[0], cropped(8 - found[-1], view))


def test_a_frame_given_with_the_last_action_hides_none_before_it() -> None:
    assert live(started(11), 24, told=set(), asked={0, 8, 16, 24}) == [None, 8, 16, 16]
    assert live(started(11), 24, told={8, 16, 24}, asked={0, 8, 16, 24}) == [None, 8, 16, 16]


@pytest.mark.parametrize("told", [set(), set(range(1, 9))])
def test_a_past_frame_is_what_the_policy_made_of_it_when_it_was_current(told: set[int]) -> None:
    policy = started(4)
    live(policy, 8, told, asked={0, 4, 8})
    for view in VIEWS:
        (_, asked, now) = (note[view] for note in policy.pipeline.stages[0].noted)
        assert now[1].shape == now[0].shape == (1, 3, 56, 56)
        assert torch.equal(now[1], asked[0])
        assert not torch.equal(now[1], now[0])


def test_a_frame_between_queries_is_cropped_like_a_current_one() -> None:
    between, current = started(2), started(2)
    live(between, 5, told={3}, asked={0, 5})
    live(current, 3, told=set(), asked={3})
    for view in VIEWS:
        assert torch.equal(noted(between, view)[1], noted(current, view)[0])


def test_the_first_query_has_no_past_unless_actions_with_frames_came_before() -> None:
    assert live(started(2), 0, told=set(), asked={0}) == [None]
    assert live(started(2), 3, told=set(), asked={3}) == [None]
    assert live(started(2), 3, told={3}, asked={3}) == [None]
    assert live(started(2), 3, told={1, 2, 3}, asked={3}) == [2]


def test_two_queries_at_one_step_do_not_see_each_other() -> None:
    policy = started(1)
    live(policy, 0, told=set(), asked={0})
    assert policy.act(sight(5)).trace.looked_back == {"test.look": (None,)}
    policy.executed(np.zeros(7))
    assert policy.act(sight(6)).trace.looked_back == {"test.look": (1,)}
    for view in VIEWS:
        assert torch.equal(noted(policy, view)[1][0], cropped(5, view))


def test_rows_of_a_batch_look_back_at_their_own_frames() -> None:
    policy = started(2, slots=3)
    live(policy, 3, told={1, 2}, asked={0})
    live(policy, 5, told=set(), asked={0}, slot=2)
    chunks = policy.act_batch({slot: sight(10 + slot) for slot in (2, 0, 1)})
    assert all(chunk.trace.looked_back == {"test.look": (5, 2, None)} for chunk in chunks.values())
    for view in VIEWS:
        current, past, had = noted(policy, view)
        assert had.tolist() == [True, True, False]
        assert torch.equal(current, torch.stack([cropped(number, view) for number in (12, 10, 11)]))
        assert torch.equal(past[:2], torch.stack([cropped(number, view) for number in (0, 1)]))
        assert not past[2].any()


@pytest.mark.parametrize(("back", "numbers"), [(0, (4, 5)), (1, (2, 3)), (2, (0, 1))])
def test_frames_of_batched_queries_stay_with_their_rows(back: int, numbers: tuple[int, int]) -> None:
    policy = started(back, slots=2)
    for first in (0, 2, 4):
        policy.act_batch({slot: sight(first + slot) for slot in (0, 1)})
        for slot in (0, 1):
            policy.executed(np.zeros(7), slot=slot)
    for view in VIEWS:
        assert torch.equal(noted(policy, view)[1], torch.stack([cropped(number, view) for number in numbers]))


def test_each_stage_has_its_own_frame() -> None:
    policy = started(1, 4)
    for step in range(6):
        policy.executed(np.zeros(7), observation=sight(step + 1))
    policy.act(sight(6))
    for view in VIEWS:
        for stage, step in enumerate((5, 2)):
            assert torch.equal(noted(policy, view, stage)[1][0], cropped(step, view))


def test_as_many_frames_are_kept_as_any_stage_looks_back_at() -> None:
    looks = [LookConfig(use="test.look", back=9, far=far) for far in (2, 5)]
    policy = Policy(BACKBONE, pipeline(*looks), REGISTRY)
    assert policy.pipeline.look_back_frames == 5
    policy.reset(INSTRUCTION)
    for step in range(1, 13):
        policy.executed(np.zeros(7), observation=sight(step))
    assert set(policy.act(sight(12)).trace.looked_back.values()) == {(5,)}


def test_a_stage_without_look_back_sees_none_and_is_not_in_the_trace() -> None:
    configs = [LookConfig(use="test.forward"), LookConfig(use="test.look", back=1)]
    policy = Policy(BACKBONE, pipeline(*configs), REGISTRY)
    policy.reset(INSTRUCTION)
    policy.act(sight(0))
    policy.executed(np.zeros(7))
    assert policy.act(sight(1)).trace.looked_back == {"test.look": (1,)}
    assert [noted(policy, "wrist", stage)[2].tolist() for stage in (0, 1)] == [[False], [True]]
    assert not noted(policy, "wrist")[1].any()


def test_nothing_is_stored_where_no_stage_looks_back() -> None:
    policy = Policy(BACKBONE, pipeline(HalfConfig(use="uniform_grid")), REGISTRY)
    policy.reset(INSTRUCTION)
    assert policy.pipeline.look_back_frames == 0
    for step in range(1, 4):
        assert policy.act(sight(step)).trace.looked_back == {}
        policy.executed(np.zeros(7), observation=sight(step))
    assert policy._slots[0].past.find(100, 1) is None


def test_a_host_may_render_into_the_same_array() -> None:
    policy, scene = started(2), sight(0)
    policy.act(scene)
    for step in range(1, 5):
        for view in VIEWS:
            scene["images"][view][:] = sight(step)["images"][view]
        policy.executed(np.zeros(7), observation=scene)
    policy.act(scene)
    for view in VIEWS:
        assert torch.equal(noted(policy, view)[1][0], cropped(2, view))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda seen: seen["images"].pop("wrist"), "view 'wrist' is missing"),
        (lambda seen: seen["images"].update(wirst=seen["images"]["wrist"]), "no view 'wirst'; did you mean 'wrist'"),
        (lambda seen: seen["images"].update(wrist=np.zeros((8, 8), np.uint8)), "wrist"),
        (lambda seen: seen["images"].update(primary=np.zeros((8, 8, 3))), "primary"),
        (lambda seen: seen.pop("images"), "an observation is"),
        (lambda seen: seen.update(state=np.zeros(3)), "8 numbers"),
    ],
)
@pytest.mark.parametrize("looks", [True, False])
def test_a_wrong_observation_is_refused_before_the_action_counts(spoil: Any, words: str, looks: bool) -> None:
    policy = started(1) if looks else started()
    policy.act(sight(0))
    wrong = sight(1)
    spoil(wrong)
    with pytest.raises(ObservationError, match=words):
        policy.executed(np.zeros(7), observation=wrong)
    # No control step has passed, so the first frame is still the current one.
    assert policy.act(sight(2)).trace.looked_back == ({"test.look": (None,)} if looks else {})


def test_reset_forgets_the_frames_of_its_own_environment() -> None:
    policy = started(2, slots=2)
    for slot in (0, 1):
        live(policy, 4, told={1, 2, 3, 4}, asked={0}, slot=slot)
    policy.reset(INSTRUCTION, 0)
    assert live(policy, 6, told=set(), asked={0, 6}) == [None, 6]
    assert torch.equal(noted(policy, "wrist")[1][0], cropped(0, "wrist"))
    assert policy.act(sight(9), slot=1).trace.looked_back == {"test.look": (2,)}


def test_a_look_back_that_fails_is_named() -> None:
    policy = Policy(BACKBONE, pipeline(LookConfig(use="test.stumbling")), REGISTRY)
    policy.reset(INSTRUCTION)
    with pytest.raises(StageError, match=r"'test\.stumbling' failed in look_back: ZeroDivisionError: no motion today"):
        policy.act(sight(0))
