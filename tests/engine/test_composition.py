"""Stages of different papers at one cut, one after the other, and under one controller."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.helpers import tiny_pi0
from tests.helpers.paths import ROOT
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.cli import app
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune_plugins.dart import DARTConfig
from tokenprune_plugins.divprune import DivPruneConfig
from tokenprune_plugins.fastv import FastVConfig
from tokenprune_plugins.head_cache import HeadCacheConfig
from tokenprune_plugins.shared.bases import HalfConfig
from tokenprune_plugins.specprune.controller import ControllerConfig, Motion

COMPOSED = ("diverse-then-attended", "attended-and-spread", "seen-then-dropped", "gated-static", "merged-then-attended")

AT_ONE_CUT: dict[str, Any] = {
    "fastv": FastVConfig(use="fastv", after=(1,), keep=12),
    "dart": DARTConfig(use="dart", after=(1,), keep=14),
    "divprune": DivPruneConfig(use="divprune", after=(1,), keep=13),
    "uniform_grid": HalfConfig(use="uniform_grid", after=(1,), keep=0.5, weight=0.5),
    "test.protector": HalfConfig(use="test.protector", after=(1,), keep=0.5),
}


@pytest.fixture(scope="module")
def backbone() -> Any:
    return tiny_policy_parts(tiny_config())


def kept(backbone: Any, *stages: Any) -> list[int]:
    policy = Policy(backbone, pipeline(*stages), REGISTRY)
    policy.reset(INSTRUCTION)
    return policy.act(observation(backbone.config)).trace.kept[1][0].tolist()


@pytest.mark.parametrize("names", list(itertools.combinations(AT_ONE_CUT, 2)), ids="+".join)
def test_the_order_of_stages_at_one_cut_does_not_matter(backbone: Any, names: tuple[str, str]) -> None:
    one, other = (AT_ONE_CUT[name] for name in names)
    together = kept(backbone, one, other)
    assert together == kept(backbone, other, one)
    assert len(together) == min(len(kept(backbone, stage)) for stage in (one, other))


def test_scores_at_one_cut_are_summed_by_rank(backbone: Any) -> None:
    patches = list(backbone.layout(INSTRUCTION).prunable)

    def ranks(stage: Any) -> np.ndarray:
        """How many tokens each is worth more than, from what stays at every count."""
        rank = np.zeros(len(patches))
        for count in range(1, len(patches)):
            stays = kept(backbone, stage.model_copy(update={"keep": count}))
            rank[[patches.index(token) for token in stays]] += 1
        return rank

    fastv, grid = AT_ONE_CUT["fastv"], AT_ONE_CUT["uniform_grid"]
    total = ranks(fastv) + 0.5 * ranks(grid)
    best = sorted(range(len(patches)), key=lambda i: (-total[i], i))[:12]
    assert kept(backbone, fastv, grid) == sorted(patches[i] for i in best)


def test_what_any_stage_protects_stays_and_what_any_drops_leaves_first(backbone: Any) -> None:
    protector, fastv = AT_ONE_CUT["test.protector"], AT_ONE_CUT["fastv"]
    patches = set(backbone.layout(INSTRUCTION).prunable)
    protected = {token for token in patches if token % 3 == 0}
    dropped = {token for token in patches if token % 5 == 0} - protected
    assert protected <= set(kept(backbone, fastv, protector)) or len(protected) > 12
    room = fastv.model_copy(update={"keep": len(patches) - len(dropped)})
    assert set(kept(backbone, room, protector.model_copy(update={"keep": 1.0}))) == patches - dropped


def test_a_rivals_selector_obeys_specprunes_controller(backbone: Any) -> None:
    controller = ControllerConfig(
        use="specprune.controller", enter=(Motion(translation=0.3),), leave=Motion(translation=0.5)
    )
    divprune = DivPruneConfig(use="divprune", keep={"coarse": 6, "fine": 18})
    policy = Policy(backbone, pipeline(controller, divprune, modes=("coarse", "fine")), REGISTRY)
    policy.reset(INSTRUCTION)
    counts = []
    for speed in (0.9, 0.0, 0.0, 0.9):
        counts.append(policy.act(observation(backbone.config)).trace.kept[-1].shape[1])
        for _ in range(8):
            policy.executed(np.array([speed, 0, 0, 0, 0, 0, 1.0]))
    counts.append(policy.act(observation(backbone.config)).trace.kept[-1].shape[1])
    assert counts == [6, 6, 18, 18, 6]


@pytest.mark.parametrize("name", ["random", "fastv", "divprune", "dart", "fastervlm", "tome", "vla_cache", "specprune"])
def test_a_head_cache_beside_any_strategy_changes_no_selection(name: str) -> None:
    policy_of = tiny_pi0.tiny_backbone(tiny_pi0.tiny_config(depth=8))
    config = load_pipeline(name, REGISTRY).config
    cached = config.model_copy(update={"stages": (*config.stages, HeadCacheConfig(use="head_cache", interval=10))})
    traces = []
    for one in (config, cached):
        policy = Policy(policy_of, one, REGISTRY)
        policy.reset(tiny_pi0.INSTRUCTION)
        traces.append(policy.act(tiny_pi0.observation(policy_of.config)).trace)
    plain, beside = traces
    assert plain.held == beside.held
    assert all(torch.equal(plain.kept[cut], beside.kept[cut]) for cut in plain.kept)
    assert (plain.spared, beside.spared) == (0, 9)


@pytest.mark.parametrize("name", COMPOSED)
def test_the_page_tells_the_ratio_of_each(name: str) -> None:
    page = (ROOT / "docs" / "strategies" / "composing.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
    facts = json.loads(CliRunner().invoke(app, ["explain", name, "--preset", "7b", "--json"]).output)
    assert f"| {max(mode['flop_ratio'] for mode in facts['modes'].values()):.2f} |" in row
