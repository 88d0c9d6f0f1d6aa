"""Memory stays flat over many queries, resets, modes and instructions."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
from long_run import LongRunResult, TimedQuery, long_run, summary

import tokenprune
from tests.helpers.backbones import BACKBONES
from tests.helpers.paths import ROOT
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_oft import INSTRUCTION
from tokenprune.engine.executor import MAX_GRAPHS, GraphExecutor
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune.report.files import read_result
from tokenprune.testing.cycles import caught_in_cycles
from tokenprune.testing.matrix import random_observation
from tokenprune.testing.tape import taped


@pytest.mark.slow
def test_five_thousand_queries_leave_nothing_behind() -> None:
    policy = tokenprune.load("openvla-oft", preset="mini", pipeline="specprune")
    stretches = list(long_run(policy, 5000, 500))
    assert all(len(one.modes) == 2 for one in stretches)
    # What one query leaves on the device is some hundred kB, so a leak of it would be hundreds of MB by the end.
    assert stretches[-1].resident_mb - stretches[1].resident_mb < 16


def test_what_a_policy_holds_does_not_grow() -> None:
    policy = tokenprune.load("openvla-oft", preset="tiny", pipeline="specprune", dtype="float32")
    stretches, sizes = zip(*((one, held(policy)) for one in long_run(policy, 230, 115)), strict=True)
    assert all(one.modes.keys() == {"coarse", "fine"} for one in stretches)
    assert all(one.switch_ms is not None and one.reset_ms is not None for one in stretches)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("family", sorted(BACKBONES))
@pytest.mark.parametrize("name", ["dense", "specprune", "tome", "vla_pruner"])
def test_no_tensor_of_a_query_waits_for_the_garbage_collector(family: str, name: str) -> None:
    backbone, obs, _ = BACKBONES[family]()
    policy = Policy(backbone, load_pipeline(name, REGISTRY).config, REGISTRY)
    policy.reset(INSTRUCTION)
    policy.act(obs)

    def again() -> None:
        for _ in range(2):
            policy.act(obs)
            policy.executed(np.full(backbone.info.action.dims, 0.4), observation=obs)

    assert caught_in_cycles(again) == 0


def test_switches_and_resets_are_kept_apart_from_slow_modes() -> None:
    fine, coarse = (
        (lambda ms, after="": TimedQuery("fine", ms, after)),
        (lambda ms, after="": TimedQuery("coarse", ms, after)),
    )
    stretch = summary(9, [
        fine(11.5, "reset"), fine(8.0), coarse(7.0, "switch"), coarse(5.0), coarse(5.0), fine(11.0, "switch"),
        fine(8.0), TimedQuery("odd", 90.0, "switch"), fine(12.5, "reset"),
    ])  # fmt: skip
    assert (stretch.until, stretch.modes, stretch.median_ms) == (9, {"fine": 5, "coarse": 3, "odd": 1}, 8.0)
    assert (stretch.switch_ms, stretch.reset_ms) == (2.5, 4.0)
    assert summary(1, [fine(8.0)]).switch_ms is None


def test_a_result_is_read_back() -> None:
    path = ROOT / "docs" / "evidence" / "long-run-small.json"
    result = read_result(path, LongRunResult)
    assert result.to_json() == {"format_version": 1, **json.loads(path.read_text(encoding="utf-8"))}


def test_recordings_are_let_go() -> None:
    policy = tokenprune.load("openvla-oft", preset="tiny", pipeline="random", dtype="float32")
    policy.executor = recorded = GraphExecutor(policy.backbone, taped)
    obs = random_observation(policy.backbone, np.random.default_rng(0))
    for words in range(1, MAX_GRAPHS + 5):
        policy.reset(" ".join(["put"] * words))
        policy.act(obs)
    assert len(recorded._graphs) == MAX_GRAPHS
    kept = [weakref.ref(one) for one in recorded._graphs.values()]
    gc.disable()
    try:
        recorded._graphs.clear()
        assert not any(one() for one in kept)
    finally:
        gc.enable()


def held(policy: Policy) -> dict[str, int]:
    """How much is kept under each name."""
    (slot,) = policy._slots.values()
    return {
        "plans": len(policy.pipeline._plans),
        "tables": len(policy.pipeline._tables),
        "maps": len(slot.memory.maps),
        "frames": len(slot.past._frames),
        "executed": len(slot.executed),
    }
