"""SpecPrune over episodes on a real decoder: first queries, hosts of every kind, environments side by side."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import chain, pairwise, zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.helpers.naive_oft import naive_actions
from tests.helpers.tiny_episodes import (
    OTHER_TASK,
    PIPELINES,
    PRESETS,
    SPEED,
    VIEWS,
    Diary,
    Episode,
    FailingConfig,
    Host,
    Turn,
    backbone,
    changed,
    chosen,
    episodes,
    everything,
    inline,
    kept,
    play,
    policy_of,
    registry,
    shrunk,
    sight,
    wanted,
)
from tests.helpers.tiny_oft import INSTRUCTION
from tokenprune.model import decoder
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import ActionChunk, Policy
from tokenprune.stages.config import StageConfig

TOPS = {"local_top": 4, "previous_top": 5, "changed_top": 3}
MIXED = (Turn(("slow",) * 3), Turn(("fast",) * 5, shown=False), Turn(("middling",) * 8), Turn())
ONE, OTHER = Episode(0, MIXED), Episode(1, MIXED, OTHER_TASK)
every_pipeline = pytest.mark.parametrize("name", PIPELINES)
every_preset = pytest.mark.parametrize("name", PRESETS)
historical = pytest.mark.parametrize("name", ["specprune", "specprune-paper", "specprune.static"])


@cache
def alone(name: str, episode: Episode) -> list[dict[str, Any]]:
    """Every query of an episode by a policy that has seen nothing else."""
    return [everything(chunk) for chunk in play(policy_of(shrunk(name)), episode)]


def looked_back(chunk: ActionChunk) -> int | None:
    """Control steps, of the only stage that compares frames, in the first batch row."""
    ((steps, *_),) = chunk.trace.looked_back.values()
    return steps


def counts(chunk: ActionChunk) -> dict[int, int]:
    return {after: ids.shape[1] for after, ids in chunk.trace.kept.items()}


@historical
def test_the_first_query_knows_no_frame_and_no_query(name: str) -> None:
    policy = policy_of(shrunk(name))
    for scene in (0, 1):
        first, second, *_ = play(policy, Episode(scene, MIXED))
        assert looked_back(first) is None
        assert wanted(first, "dynamic") == wanted(first, "previous") == 0
        assert wanted(first, "local")
        assert looked_back(second) == 3
        assert wanted(second, "dynamic")
        assert wanted(second, "previous")


@settings(max_examples=15)
@given(episodes(min_turns=2, max_turns=4))
def test_specprune_never_prunes_the_first_query_harder(episode: Episode) -> None:
    first, *later = play(policy_of(shrunk("specprune")), episode)
    assert first.trace.mode == "coarse"
    by_mode = {"coarse": counts(first)}
    for chunk in later:
        assert counts(chunk) == by_mode.setdefault(chunk.trace.mode, counts(chunk))
        assert all(counts(chunk)[after] >= n for after, n in counts(first).items())


@every_pipeline
def test_a_new_task_is_a_new_policy(name: str) -> None:
    policy = policy_of(shrunk(name))
    for episode in (ONE, OTHER):
        assert [everything(chunk) for chunk in play(policy, episode)] == alone(name, episode)


@every_pipeline
def test_episodes_of_one_query_are_new_policies(name: str) -> None:
    policy = policy_of(shrunk(name))
    for episode in (ONE, OTHER, ONE):
        (own,) = play(policy, replace(episode, turns=MIXED[:1]))
        assert everything(own) == alone(name, episode)[0]


@every_preset
@pytest.mark.parametrize("honoured", [True, False])
def test_a_replan_is_only_an_earlier_query(name: str, honoured: bool) -> None:
    asking = Host(policy_of(shrunk(name, "stages.0.replan=true")), Episode(0, ()))
    silent = Host(policy_of(shrunk(name)), Episode(0, ()))
    for _ in range(2):
        assert everything(asking.act()) == everything(silent.act())
        assert asking.execute(*["middling"] * 8) == silent.execute(*["middling"] * 8) == [False] * 8
    assert everything(asking.act()) == everything(silent.act())
    moves = ["fast", "fast", "fast", "slow"]
    assert asking.execute(*moves) == [False, False, False, True]
    assert silent.execute(*moves) == [False] * 4
    if not honoured:
        assert asking.execute(*["slow"] * 4) == silent.execute(*["slow"] * 4) == [False] * 4
    early = asking.act()
    assert early.trace.mode == "fine"
    assert everything(early) == everything(silent.act())
    if honoured and name != "specprune-c3":
        assert looked_back(early) == 8
    # Fine already: nothing is asked for a second time.
    assert asking.execute(*["slow"] * 7, "fast") == silent.execute(*["slow"] * 7, "fast") == [False] * 8
    assert asking.act().trace.mode == "coarse"


@every_preset
def test_the_last_action_of_a_chunk_needs_no_replan(name: str) -> None:
    host = Host(policy_of(shrunk(name, "stages.0.replan=true", "stages.0.first_step=0")), Episode(0, ()))
    host.act()
    assert not any(host.execute(*["fast"] * 7, "slow"))
    assert host.act().trace.mode == "fine"


@pytest.mark.parametrize("lengths", [(8, 8, 8), (3, 2, 4, 7, 1, 8), (1,) * 14])
@pytest.mark.parametrize("shown", [True, False])
def test_look_back_counts_control_steps_whatever_the_queries(lengths: tuple[int, ...], shown: bool) -> None:
    host = Host(policy_of(shrunk("specprune.static")), Episode(0, ()))
    given: list[int] = []
    since = 0
    for length in lengths:
        past = [step for step in given if step < host.step]
        wish = host.step - min(max(int(np.floor(7 - since * SPEED["middling"])) + 4, 1), 11)
        expected = max((step for step in past if step <= wish), default=min(past, default=None))
        assert looked_back(host.act()) == (None if expected is None else host.step - expected)
        given.append(host.step)
        given += range(host.step + 1, host.step + length + 1) if shown else ()
        host.execute(*["middling"] * length, shown=shown)
        since = length


def test_look_back_reaches_as_far_as_there_are_frames() -> None:
    for shown, expected in ((True, [None, 3, 6, 10, 10]), (False, [None, 3, 6, 11, 11])):
        host = Host(policy_of(shrunk("specprune.static")), Episode(0, ()))
        found = []
        for length in (3, 3, 5, 6, 0):
            found.append(looked_back(host.act()))
            host.execute(*["slow"] * length, shown=shown)
        assert found == expected


def test_look_back_does_not_depend_on_how_many_frames_are_kept() -> None:
    # Without frames in between, the newest one that is 11 steps old may be older than that by as much as a chunk.
    host = Host(policy_of(shrunk("specprune.static")), Episode(0, ()))
    for length, expected in ((8, None), (8, 8), (2, 16), (0, 18)):
        assert looked_back(host.act()) == expected
        host.step += length
        for _ in range(length):
            host.policy.executed(np.zeros(7))


def test_a_host_may_use_one_array_for_all_actions() -> None:
    host = Host(policy_of(shrunk("specprune.static")), Episode(0, ()))
    host.act()
    action = np.zeros(7)
    for direction in (1, 1, 1, 1, -1, -1, -1, -1):
        action[0] = direction
        host.step += 1
        host.policy.executed(action, observation=host.sight)
    # The arm is back where it was, so the oldest frame is the one to compare with.
    assert looked_back(host.act()) == 8


@every_pipeline
def test_environments_in_turns_are_policies_of_their_own(name: str) -> None:
    # The first environment begins a new episode while the second is in the middle of its own.
    together = policy_of(shrunk(name))
    first = chain(play(together, replace(ONE, turns=MIXED[:2])), play(together, OTHER))
    second = play(together, OTHER, slot=1)
    pairs = [[chunk and everything(chunk) for chunk in pair] for pair in zip_longest(first, second)]
    assert [pair[0] for pair in pairs] == alone(name, ONE)[:2] + alone(name, OTHER)
    assert [pair[1] for pair in pairs] == [*alone(name, OTHER), None, None]


@every_pipeline
def test_a_batch_with_different_masks_is_two_policies(name: str) -> None:
    together, alone = policy_of(shrunk(name)), [policy_of(shrunk(name)) for _ in range(2)]
    hosts = [[Host(policy, Episode(slot, ()), slot) for policy in (together, alone[slot])] for slot in (0, 1)]
    differed = False
    for turn, moves in enumerate([("slow", "middling"), ("fast", "fast"), ("middling", "slow")]):
        if turn == 2:
            hosts[1] = [Host(policy, Episode(5, ()), 1) for policy in (together, alone[1])]
        chunks = together.act_batch({slot: pair[0].sight for slot, pair in enumerate(hosts)})
        shared = chunks[0].trace is chunks[1].trace
        for slot, (_, single) in enumerate(hosts):
            expected = single.act()
            assert chosen(chunks[slot], slot if shared else 0) == chosen(expected)
            np.testing.assert_allclose(chunks[slot].normalised, expected.normalised, rtol=0, atol=1e-10)
            for host in hosts[slot]:
                host.execute(*[moves[slot]] * 8)
        differed |= kept(chunks[0]) != kept(chunks[1], int(shared))
    assert differed or name == "specprune.controller"


@every_preset
def test_every_executed_action_is_the_chunks_and_is_seen(name: str) -> None:
    config = changed(shrunk(name, "stages.0.replan=true"), StageConfig(use="test.diary"))
    policy = policy_of(config)
    policy.reset(INSTRUCTION)
    diary = policy.pipeline.stages[0]
    assert isinstance(diary, Diary)
    given: list[np.ndarray] = []
    asked_at = []
    for scene in range(5):
        asked_at.append(len(given))
        for action in policy.act(sight(VIEWS[:2], scene, 0)).actions:
            given.append(action.copy())
            if policy.executed(action):
                break
    seen = [record.action for record in diary.executed]
    assert len(seen) == len(given) > 8
    assert all(np.array_equal(one, other) for one, other in zip(seen, given, strict=True))
    # Whoever chooses a mode knows of all actions so far, and of those since the last query.
    told = [(step, since) for event, step, since in diary.controls if event == "executed"]
    assert told == [(step, step - max(q for q in asked_at if q < step)) for step in range(1, len(given) + 1)]


@pytest.mark.parametrize(
    "stages",
    [
        [{"use": "specprune.static", "keep": "union", **TOPS, "unchanged": [0.97]}],
        [
            {"use": "specprune.static", "keep": [5, 3], **TOPS, "unchanged": [0.97]}
            | {"views": {"wrist": {"keep": [5, 3]}, "primary": {"keep": [5, 3]}}}
        ],
        [{"use": "specprune.dynamic", "keep": 0.7, "per_view": 2}],
        [{"use": "specprune.dynamic", "keep": 0.7, "rows": "action", "of": "sequence", "floor": 4, "decay": 1.0}],
        [
            {"use": "specprune.static_c3", "unchanged": [0.98]}
            | {"local_top": {"default": [3]}, "unchanged_cap": {"default": [12]}}
        ],
    ],
    ids=["union", "budgets", "dynamic", "dynamic of action rows", "c3"],
)
def test_cameras_in_another_order_keep_the_same_patches(
    stages: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rotary positions taken away, the model itself does not know the order."""
    real = decoder.rotary

    def unturned(*args: Any) -> Any:
        cos, sin = real(*args)
        return torch.ones_like(cos), torch.zeros_like(sin)

    monkeypatch.setattr(decoder, "rotary", unturned)
    found = []
    for views in (VIEWS[:2], VIEWS[1::-1]):
        policy = Policy(backbone(views), inline(*stages), registry())
        spans = {view: segment.span for view, segment in policy.backbone.layout(INSTRUCTION).views.items()}
        chunks = list(play(policy, Episode(3, MIXED)))
        found.append(
            [
                {
                    after: {v: [i - s.start for i in ids if i in s] for v, s in spans.items()}
                    for after, ids in cuts.items()
                }
                for cuts in map(kept, chunks)
            ]
        )
    assert found[0] == found[1]
    assert any(len(ids) < 16 for cuts in found[0] for views in cuts.values() for ids in views.values())


@every_pipeline
@pytest.mark.parametrize("views", [1, 3])
def test_fixed_tokens_stay_and_survivors_are_nested(name: str, views: int) -> None:
    policy = policy_of(changed(shrunk(name), StageConfig(use="test.diary")), views)
    diary = policy.pipeline.stages[0]
    assert isinstance(diary, Diary)
    for chunk in play(policy, Episode(0, MIXED[:3])):
        layout, cuts = chunk.trace.plan.layout, list(kept(chunk).values())
        assert {segment.role for segment in layout.segments} == {"bos", "vision", "proprio", "text", "action", "stop"}
        for earlier, later in pairwise([list(layout.prunable), *cuts]):
            assert set(later) <= set(earlier)
            assert sorted(set(later)) == later
        assert diary.queries[-1].tokens.ids[0].tolist() == sorted([*layout.fixed, *cuts[-1]])


@every_preset
def test_dropping_is_masking(name: str) -> None:
    model = backbone()
    *_, chunk = play(Policy(model, shrunk(name), registry()), Episode(0, MIXED[:2]))
    held = {after: {*chunk.trace.plan.layout.fixed, *ids} for after, ids in kept(chunk).items()}
    expected = naive_actions(model, sight(VIEWS[:2], 0, 3), INSTRUCTION, kept=held)
    torch.testing.assert_close(torch.from_numpy(chunk.normalised), expected, rtol=0, atol=1e-10)


WIDE = ("local_top={coarse: [16, 16], fine: [16, 16]}", "unchanged_cap={coarse: [0], fine: [0]}")


@pytest.mark.parametrize(
    ("name", "settings_"),
    [
        ("specprune", ("stages.1.keep=1.0", "stages.2.keep=1.0")),
        ("specprune", ("stages.1.keep=[32, 32]", "stages.2.keep={coarse: 32, fine: 1.0}")),
        ("specprune-paper", ("stages.1.keep=1.0", "stages.2.keep=1.0")),
        ("specprune-paper", ("stages.1.local_top=20", "stages.2.floor=32")),
        ("specprune-c3", ("stages.1.keep=1.0", "stages.2.keep=1.0")),
        ("specprune-c3", (*(f"stages.1.{wide}" for wide in WIDE), "stages.2.keep=1.0")),
        ("specprune.static", ("stages.0.keep=[1.0, 1.0]",)),
        ("specprune.dynamic", ("stages.0.keep=1.0",)),
        ("specprune.controller", ("stages.1.keep=1.0",)),
    ],
)
def test_keeping_everything_is_dense_bit_for_bit(name: str, settings_: tuple[str, ...]) -> None:
    # The second query is a fine one.
    chunks = play(policy_of(shrunk(name, *settings_)), Episode(0, MIXED[:2]))
    for chunk, dense in zip(chunks, play(policy_of(DENSE), Episode(0, MIXED[:2])), strict=True):
        assert chunk.trace.held == dense.trace.held
        assert np.array_equal(chunk.normalised, dense.normalised)


@every_preset
@pytest.mark.parametrize(("query", "layer"), [(0, 7), (1, 0), (1, 5)])
def test_a_query_that_fell_back_leaves_the_memory_usable(name: str, query: int, layer: int) -> None:
    config = changed(shrunk(name), FailingConfig(use="test.failing", query=query, layer=layer), on_error="dense")
    # Fine before, during and after the query that fails, and a far way up to it.
    turns = (Turn(("fast",) * 7 + ("slow",)), Turn(("middling",) * 5), Turn(("middling",) * 8), Turn(("fast",)), Turn())
    policy, episode = policy_of(config), Episode(0, turns)
    chunks, unfailing = list(play(policy, episode)), alone(name, episode)
    *_, dense = play(policy_of(DENSE), replace(episode, turns=turns[: query + 1]))
    assert "test.failing" in chunks[query].trace.fallback
    assert np.array_equal(chunks[query].normalised, dense.normalised)
    for number, chunk in enumerate(chunks):
        if number != query:
            assert not chunk.trace.fallback
            assert {key: chosen(chunk)[key] for key in ("mode", "back")} == {
                key: unfailing[number][key] for key in ("mode", "back")
            }
            assert number == 0 or wanted(chunk, "dynamic")
    # Everything remembered by a later layer's end is there again after one query that went well.
    assert wanted(chunks[query + 2], "previous")
    again = play(policy, replace(episode, turns=turns[:3]))
    assert [everything(chunk) for chunk in chunks[:3]] == [everything(chunk) for chunk in again]
