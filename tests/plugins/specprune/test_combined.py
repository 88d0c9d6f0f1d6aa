"""SpecPrune's stages at other places than the presets', and beside the stages of other strategies."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.helpers.tiny_episodes import (
    VIEWS,
    Episode,
    Host,
    Turn,
    backbone,
    inline,
    kept,
    play,
    policy_of,
    shrunk,
    wanted,
)
from tests.helpers.tiny_oft import INSTRUCTION
from tokenprune.errors import ConfigError

STATIC = {"use": "specprune.static", "local_top": 4, "previous_top": 5, "changed_top": 3}

C3 = {
    "use": "specprune.static_c3",
    "local_top": {"default": [4, 3]},
    "unchanged_cap": {"default": [12, 11]},
}

DYNAMIC = {"use": "specprune.dynamic", "keep": 0.7, "per_view": 1}

CONTROLLER = {
    "use": "specprune.controller",
    "enter": [{"translation": 0.35, "rotation": 0.2, "rise": 1e-6}],
    "leave": {"translation": 0.5},
}

TURNS = (Turn(), Turn(("slow",) * 2), Turn())


def cuts(*stages: dict[str, Any], **settings: Any) -> list[dict[int, list[int]]]:
    """Ids kept at each cut of each query of an episode."""
    return [kept(chunk) for chunk in play(policy_of(inline(*stages, **settings)), Episode(0, TURNS))]


def patches(view: str) -> set[int]:
    return set(backbone().layout(INSTRUCTION).views[view].span)


@pytest.mark.parametrize("keep", [8, 11, 24])
def test_static_before_layer_0_spreads_its_first_query_evenly(keep: int) -> None:
    first, *later = cuts(STATIC | {"after": "embedding", "keep": keep})
    grid, *_ = cuts({"use": "uniform_grid", "keep": keep})
    assert first == grid
    assert all(len(ids[-1]) == keep and ids != grid for ids in later)


def test_static_before_layer_0_keeps_the_union_of_change_and_previous_attention() -> None:
    policy = policy_of(inline(STATIC | {"after": "embedding", "keep": "union"}))
    first, *later = play(policy, Episode(0, TURNS))
    assert kept(first) == {-1: list(first.trace.plan.layout.prunable)}
    for chunk in later:
        (after,) = kept(chunk)
        assert wanted(chunk, "dynamic")
        assert wanted(chunk, "previous")
        assert not wanted(chunk, "local")
        why = chunk.trace.reasons[after]
        assert (why["dynamic"] | why["previous"]).all()
        assert chunk.trace.held[0] < first.trace.held[0]


def test_static_before_layer_0_goes_on_after_a_layer() -> None:
    policy = policy_of(inline(STATIC | {"after": ["embedding", 1], "keep": [20, 8]}))
    for number, chunk in enumerate(play(policy, Episode(0, TURNS))):
        assert {after: len(ids) for after, ids in kept(chunk).items()} == {-1: 20, 1: 8}
        reasons = {name for name in ("dynamic", "previous", "local") if wanted(chunk, name)}
        assert reasons == ({"dynamic", "previous", "local"} if number else {"local"})


@pytest.mark.parametrize(
    ("stages", "counts"),
    [
        ([{"use": "uniform_grid", "keep": 20}, STATIC | {"keep": [10, 6]}], {-1: 20, 0: 10, 1: 6}),
        ([{"use": "uniform_grid", "keep": 20}, STATIC | {"after": "embedding", "keep": 12}], {-1: 12}),
        ([STATIC | {"keep": [10, 6]}, {"use": "fastv", "after": 1, "keep": 8}], {0: 10, 1: 6}),
        ([{"use": "fastv", "after": 1, "keep": 4}, STATIC | {"keep": [10, 6]}], {0: 10, 1: 4}),
        ([STATIC | {"keep": [10, 6]}, {"use": "fastv", "after": 3, "keep": 0.5}], {0: 10, 1: 6, 3: 3}),
        ([{"use": "fastv", "after": 0, "keep": 20}, STATIC | {"after": 1, "keep": 0.5}], {0: 20, 1: 10}),
        ([{"use": "uniform_grid", "keep": 30}, DYNAMIC], {-1: 30, 2: 21, 4: 14, 5: 9, 6: 6}),
        ([DYNAMIC, {"use": "fastv", "after": [2, 4], "keep": [25, 8]}], {2: 22, 4: 8, 5: 5, 6: 3}),
        ([DYNAMIC, {"use": "fastv", "after": [1, 3], "keep": 0.5}], {1: 16, 2: 11, 3: 5, 4: 3, 5: 2, 6: 1}),
        ([STATIC | {"keep": 0.5}, DYNAMIC], {0: 16, 1: 8, 2: 5, 4: 3, 5: 2, 6: 1}),
        ([C3, {"use": "random", "after": "embedding", "keep": 20}], {-1: 20}),
        ([C3, {"use": "fastv", "after": [1, 3], "keep": [9, 5]}], {1: 9, 3: 5}),
    ],
)
def test_stages_of_several_strategies_share_a_query(stages: list[dict[str, Any]], counts: dict[int, int]) -> None:
    for found in cuts(*stages):
        held = {after: len(ids) for after, ids in found.items()}
        assert held | counts == held
        for earlier, later in pairwise(found.values()):
            assert set(later) <= set(earlier)


@pytest.mark.parametrize("stage", [STATIC | {"after": 1, "keep": "union"}, C3], ids=["static", "static_c3"])
def test_a_union_stays_what_it_is_beside_a_larger_budget(stage: dict[str, Any]) -> None:
    # fastv's scores change nothing, for every token of the union is protected and nothing else fits.
    assert cuts(stage, {"use": "fastv", "after": 1, "keep": 32}) == cuts(stage)
    assert cuts(stage, {"use": "fastv", "after": 1, "keep": 4}) != cuts(stage)


def test_what_static_protects_comes_before_another_score() -> None:
    union, *_ = cuts(STATIC | {"after": 1, "keep": "union"})
    fastv = {"use": "fastv", "after": 1, "weight": 9.0}
    for spare in (0, 2):
        both, *_ = cuts(STATIC | {"after": 1, "keep": 32}, fastv | {"keep": len(union[1]) + spare})
        assert set(union[1]) <= set(both[1])
        assert len(both[1]) == len(union[1]) + spare


def test_the_controller_chooses_another_strategys_budget() -> None:
    fastv = {"use": "fastv", "after": 1, "keep": {"coarse": 6, "fine": 20}}
    host = Host(policy_of(inline(CONTROLLER, fastv, modes=["coarse", "fine"])), Episode(0, ()))
    found = []
    for moves in (["middling"] * 2, ["slow", "middling"], ["slow"], ["fast"], []):
        chunk = host.act()
        found.append((chunk.trace.mode, len(kept(chunk)[1])))
        host.execute(*moves)
    assert found == [("coarse", 6), ("coarse", 6), ("fine", 20), ("fine", 20), ("coarse", 6)]


@pytest.mark.parametrize(
    ("stage", "cut", "update"),
    [
        ({"after": [2, 4], "updates": [3]}, 2, 3),
        ({"after": ["31%", "47%"], "updates": ["44%", "59%"]}, 2, 4),
        ({"after": [0]}, 0, 2),
    ],
)
def test_a_cut_before_any_score_is_refused(stage: dict[str, Any], cut: int, update: int) -> None:
    said = rf"cut after layer {cut} comes before the first update after layer {update}, .*move the cut"
    with pytest.raises(ConfigError, match=said):
        policy_of(inline({"use": "specprune.dynamic", **stage}))
    policy_of(inline({"use": "specprune.dynamic", **stage, "as_released": True}))


def test_a_camera_can_be_protected() -> None:
    whole = {"views": {"wrist": {"keep": 1.0}}}
    for found in cuts(STATIC | {"keep": [5, 3]} | whole, {"use": "specprune.dynamic", "keep": 0.7} | whole):
        assert list(found) == [0, 1, 2, 4, 5, 6]
        assert [len(set(ids) - patches("wrist")) for ids in found.values()] == [5, 3, 2, 1, 1, 1]
        assert all(patches("wrist") <= set(ids) for ids in found.values())


def test_a_camera_can_be_protected_in_one_mode() -> None:
    policy = policy_of(
        inline(
            CONTROLLER,
            STATIC
            | {
                "after": 0,
                "keep": {"coarse": 4, "fine": 6},
                "views": {"wrist": {"keep": {"coarse": 4, "fine": 1.0}}},
            },
            modes=["coarse", "fine"],
        )
    )
    coarse, _, fine = play(policy, Episode(0, TURNS))
    assert len(set(kept(coarse)[0]) & patches("wrist")) == 4
    assert patches("wrist") <= set(kept(fine)[0])
    assert len(kept(fine)[0]) == 22


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_keeps_its_best_at_every_dynamic_cut(view: str) -> None:
    policy = policy_of(shrunk("specprune.dynamic", "stages.0.per_view=2", "stages.0.keep=0.5"), views=3)
    span = policy.backbone.layout(INSTRUCTION).views[view].span
    for chunk in play(policy, Episode(0, TURNS)):
        assert [len(ids) for ids in kept(chunk).values()] == [24, 12, 6, 3]
        for ids in list(kept(chunk).values())[:3]:
            assert len(set(ids) & set(span)) >= 2


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_remembered_before_the_first_cut_is_the_previous_querys(layer: int) -> None:
    stage = STATIC | {"after": 5, "local_layers": [3], "previous_layers": [layer], "keep": 10}
    first, *later = play(policy_of(inline(stage)), Episode(0, TURNS))
    assert not wanted(first, "previous")
    assert all(wanted(chunk, "previous") for chunk in later)
