"""The SpecPrune presets over whole simulated episodes, against the specification written out in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.helpers import naive_specprune as naive
from tests.helpers.simulated_episode import (
    BOUNDS,
    VIEWS,
    Ask,
    Attention,
    Chunk,
    Recipe,
    Script,
    SimulatedOFT,
    Step,
    chunks,
    layout_of,
    live,
    next_frame,
    recipes,
    scene_of,
    tell,
)
from tokenprune.pipelines.loader import LoadedPipeline, load_pipeline
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry.discovery import Registry

PRESETS = ("specprune", "specprune-paper", "specprune-c3")
STILL, MOVING = Chunk(8, "zero", ("static",), "all"), Chunk(8, "fast", ("all",), "all")
every_preset = pytest.mark.parametrize("preset", PRESETS)


def examples(count: int) -> settings:
    """Without shrinking, which would take minutes: a recipe is short as it is."""
    return settings(max_examples=count, phases=(Phase.explicit, Phase.generate))


@cache
def registry() -> Registry:
    return Registry.discover()


@cache
def loaded(preset: str, *overrides: str) -> LoadedPipeline:
    return load_pipeline(preset, registry(), overrides)


@cache
def budget(preset: str) -> naive.Budget:
    """The reference's own numbers, or the shipped pipeline's where these may be tuned."""
    if preset != "specprune":
        return naive.PAPER_BUDGET
    named = {stage["use"]: stage for stage in loaded(preset).resolved["stages"]}
    static, dynamic = named["specprune.static"], named["specprune.dynamic"]
    return naive.Budget(static["keep"], dynamic["keep"], dynamic["floor"], of_each_view=12)


def policy_of(preset: str, views: tuple[str, ...], replan: bool = False) -> Policy:
    controller = [stage.use for stage in loaded(preset).config.stages].index("specprune.controller")
    overrides = [f"stages.{controller}.replan=true"] if replan else []
    return Policy(SimulatedOFT(views), loaded(preset, *overrides).config, registry())


class Judge:
    """A reference in step with a policy."""

    def __init__(self, preset: str, script: Script) -> None:
        self.reference = naive.make(preset, scene_of(script.layout), budget(preset))
        self.frames: dict[int, naive.Frame] = {}

    def executed(self, event: Step) -> bool:
        replan = self.reference.executed(event.action.tolist())
        if event.images is not None:
            self.frames[self.reference.controller.steps] = event.images
        return replan

    def asked(self, event: Ask) -> dict[str, Any]:
        now = self.reference.controller.steps
        self.frames[now] = event.images
        answer = self.reference.query(self.frames, event.attention)
        back = None if answer.reference is None else now - answer.reference
        return {"mode": answer.mode, "steps back": back, "kept": answer.kept}


def seen(chunk: ActionChunk, row: int = 0) -> dict[str, Any]:
    """What a query did to one environment."""
    (steps,) = chunk.trace.looked_back.values()
    kept = {layer: ids[row].tolist() for layer, ids in chunk.trace.kept.items()}
    return {"mode": chunk.trace.mode, "steps back": steps[row], "kept": kept}


def queries(policy: Policy, script: Script) -> list[ActionChunk]:
    return [answer for answer in live(policy, script) if isinstance(answer, ActionChunk)]


def agree(preset: str, script: Script, replan: bool = False) -> list[ActionChunk]:
    """The policy's answers, each found to be the reference's."""
    judge, answers = Judge(preset, script), []
    for event, answer in zip(script.events, live(policy_of(preset, script.views, replan), script), strict=True):
        if isinstance(event, Ask):
            assert isinstance(answer, ActionChunk)
            assert seen(answer) == judge.asked(event)
            answers.append(answer)
        else:
            assert answer == (judge.executed(event) and replan)
    return answers


@every_preset
@examples(25)
@given(recipe=recipes)
def test_every_cut_mode_and_look_back_is_the_references(preset: str, recipe: Recipe) -> None:
    agree(preset, recipe.script())


@pytest.mark.slow
@every_preset
@examples(500)
@given(recipe=recipes, replan=st.booleans())
def test_every_cut_mode_and_look_back_is_the_references_at_length(preset: str, recipe: Recipe, replan: bool) -> None:
    agree(preset, recipe.script(), replan)


@every_preset
def test_the_controller_turns_where_the_references_does(preset: str) -> None:
    """Each quantity at, below and above each bound, in either mode; downwards where the plane alone is looked at."""
    full = policy_of(preset, VIEWS[:1], replan=True)
    alone = full.pipeline.config.model_copy(update={"stages": full.pipeline.config.stages[:1]})
    policy = Policy(full.backbone, alone, registry())
    policy.reset("12")
    reference = naive.make(preset, scene_of(layout_of(VIEWS[:1], 12))).controller
    (asked,) = Recipe(1, 12, []).script().events
    assert isinstance(asked, Ask)
    modes, turns = set(), set()

    def step(**action: float) -> None:
        values = [action.get(name, 0.0) for name in ("x", "y", "z", "roll", "pitch", "yaw", "gripper")]
        turn = reference.executed(values)
        turns.add(turn)
        assert policy.executed(np.array(values)) is turn, action

    def query() -> None:
        mode = reference.query()
        modes.add(mode)
        assert policy.act(asked.observation).trace.mode == mode

    for _ in range(12):
        query()
        step()
    for length in range(1, 11):
        query()
        for _ in range(length):
            step(x=1.0, z=1.0)
        step()
    for bound, near, down, name in itertools.product(BOUNDS, (0, 1e-9, -1e-9), (0.0, -0.5), ("y", "z", "pitch")):
        for before in ({"x": 1.0, "z": 1.0}, {}):
            step(**before)
            query()
            step(**({"z": down} | {name: bound + near}))
            query()
    assert modes == {"coarse", "fine"}
    assert turns == {True, False}


def counts(chunk: ActionChunk) -> list[int]:
    """Visual tokens after each cut."""
    return [ids.shape[1] for ids in chunk.trace.kept.values()]


@examples(6)
@given(seed=st.integers(0, 999), lasting=st.sampled_from([0.0, 3.0]))
def test_c3_keeps_few_tokens_of_a_static_scene(seed: int, lasting: float) -> None:
    script = Recipe(2, 25, [STILL] * 4, seed, lasting).script()
    answers = agree("specprune-c3", script)
    assert [answer.trace.mode for answer in answers] == ["coarse", "coarse", "fine", "fine", "fine"]
    for answer in answers:
        assert counts(answer)[1] <= 174
        assert len(answer.trace.kept) == 6
    assert counts(answers[3])[1] <= 116
    assert counts(answers[4])[1] <= 116


def test_c3_keeps_174_tokens_at_most_and_plans_from_there() -> None:
    views, prompt = VIEWS[:2], 25
    n = layout_of(views, prompt).n_tokens

    def attention(query: int, wanted: dict[int, list[tuple[range, range]]]) -> Attention:
        """Per layer, the groups of tokens (a range of each view) that draw most attention, the first of them most."""
        bonus = {layer: np.zeros(n) for layer in wanted}
        for layer, ranked in wanted.items():
            for place, (primary, wrist) in enumerate(ranked):
                bonus[layer][[1 + i for i in primary] + [257 + i for i in wrist]] = 60 - 20 * place
        return Attention(n, (7, query), np.zeros(n), bonus)

    # Of a static scene the first 20 and 26 patches count as changed; no group below holds one of these.
    local = [[(range(i, i + 24), range(i, i + 19)) for i in (start, start + 30)] for start in (26, 100, 180)]
    # The cut after layer 10 keeps the lowest ids, so that what is remembered of the wrist must be low.
    left, right = (range(26, 38), range(26, 35)), (range(56, 68), range(100, 109))
    late = {14: [left, right], 19: [left, right], 24: [left, right], 30: [right, left]}
    asked = [attention(query, {0: sets, 1: sets[1:]} | late) for query, sets in enumerate(local)]
    images = {view: np.full((32, 32, 3), 9, np.uint8) for view in views}
    script = Script(views, prompt, tuple(Ask(images, drawn) for drawn in asked))
    first, _, third = agree("specprune-c3", script)
    assert counts(first) == [132, 132, 110, 90, 72, 59]
    assert counts(third) == [174, 174, 148, 124, 103, 84]


def test_c3_takes_no_scores_in_a_query_from_which_nothing_leaves_any_more() -> None:
    """At the floor the release stops looking, so a layer's confidence may be that of a later query."""
    views, prompt, rng = VIEWS[:1], 25, np.random.default_rng(3)
    n = layout_of(views, prompt).n_tokens
    peaks = np.zeros(n)
    peaks[1 + rng.permutation(256)[:2]] = 14
    before = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    after = before.copy()
    after[:8] = rng.integers(0, 256, (8, 32, 3))
    script = Script(
        views,
        prompt,
        (
            Ask({"primary": before}, Attention(n, (3, 0), np.zeros(n))),
            *[Step(np.array([1.0, 0, 0, 0, 0, 0, 0]), {"primary": before})] * 8,
            Ask({"primary": after}, Attention(n, (3, 1), np.zeros(n), {19: peaks})),
        ),
    )
    first, second = ({probe.layer for probe in answer.trace.probes} for answer in agree("specprune-c3", script))
    assert first == {0, 1, 14, 30}
    assert second == {0, 1, 14, 19, 24, 30}


def test_c3_plans_from_174() -> None:
    policy = policy_of("specprune-c3", VIEWS[:2])
    plan = policy.pipeline.plan(policy.backbone.layout("25"), "coarse", (200, 174))
    assert [cut.keep for cut in plan.cuts] == [200, 174, 148, 124, 103, 84]


def test_attention_rows_are_computed_at_six_layers_in_c3() -> None:
    script = Recipe(2, 25, [MOVING, MOVING]).script()
    for answer in queries(policy_of("specprune-c3", script.views), script):
        rows = {(probe.layer, probe.count) for probe in answer.trace.probes}
        assert rows == {(0, 15), (1, 15), (14, 25), (14, 56), (19, 56), (24, 56), (30, 25)}


def groups(script: Script) -> Iterator[tuple[Ask, list[Step]]]:
    """Each query with the steps after it."""
    asks = [place for place, event in enumerate(script.events) if isinstance(event, Ask)]
    for place, after in itertools.zip_longest(asks, asks[1:]):
        ask, *steps = script.events[place:after]
        assert isinstance(ask, Ask)
        yield ask, [step for step in steps if isinstance(step, Step)]


@every_preset
@examples(5)
@given(one=recipes, other=recipes)
def test_interleaved_environments_equal_separate_ones(preset: str, one: Recipe, other: Recipe) -> None:
    pair = [replace(recipe, views=2).script() for recipe in (one, other)]
    policy = policy_of(preset, VIEWS[:2])
    both = itertools.zip_longest(*(live(policy, script, slot) for slot, script in enumerate(pair)))
    for slot, answers in enumerate(zip(*both, strict=True)):
        together = [seen(answer) for answer in answers if isinstance(answer, ActionChunk)]
        assert together == [seen(answer) for answer in queries(policy_of(preset, VIEWS[:2]), pair[slot])]


@every_preset
@examples(5)
@given(
    parts=st.lists(st.tuples(chunks, chunks), min_size=1, max_size=4),
    prompt=st.sampled_from([12, 34, 70]),
    seed=st.integers(0, 999),
)
def test_a_batch_of_two_equals_two_singles(
    preset: str, parts: list[tuple[Chunk, Chunk]], prompt: int, seed: int
) -> None:
    pair = [Recipe(2, prompt, [both[slot] for both in parts], seed + slot).script() for slot in (0, 1)]
    alone = [queries(policy_of(preset, VIEWS[:2]), script) for script in pair]
    policy = policy_of(preset, VIEWS[:2])
    for slot in (0, 1):
        policy.reset(str(prompt), slot)
    for number, both in enumerate(zip(*map(groups, pair), strict=True)):
        answers = policy.act_batch({slot: ask.observation for slot, (ask, _) in enumerate(both)})
        shared = answers[0].trace is answers[1].trace
        for slot, (_, steps) in enumerate(both):
            assert seen(answers[slot], slot if shared else 0) == seen(alone[slot][number])
            for step in steps:
                tell(policy, step, slot)


@pytest.mark.parametrize(
    ("speed", "steps", "c3"), [(0, 11, 15), (4.875, 6, 15), (5, 6, 16), (8, 3, 18), (9.4, 1, 19), (10, 1, 19)]
)
def test_the_reference_looks_back_less_the_faster_the_robot_moves(speed: float, steps: int, c3: int) -> None:
    scene = scene_of(layout_of(VIEWS[:1], 12))
    past = list(range(20))
    assert naive.make("specprune", scene)._reference(20, speed, past) == 20 - steps
    assert naive.make("specprune-c3", scene)._reference(20, speed, past) == c3


@pytest.mark.parametrize(("speed", "c3"), [(10.5, 20), (11.625, 0), (12.75, 1), (14, 2), (40, 20)])
def test_the_c3_reference_looks_at_the_oldest_frames_at_high_speed(speed: float, c3: int) -> None:
    scene = scene_of(layout_of(VIEWS[:1], 12))
    assert naive.make("specprune-c3", scene)._reference(20, speed, list(range(20))) == c3


def test_the_reference_counts_a_patch_at_the_threshold_as_unchanged() -> None:
    scene = scene_of(layout_of(VIEWS[:1], 12))
    rng = np.random.default_rng(0)
    before = next_frame(np.zeros((32, 32, 3), np.uint8), "threshold", rng)
    after = next_frame(next_frame(before, "static", rng), "threshold", np.random.default_rng(0))
    found = naive.similarities(scene, "primary", after, before, both_black=1.0)
    assert {0.986, 0.98, 1.0} == set(found.values())
