"""No operation of a query waits for the device."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.helpers.graph_safe import GRAPH_SAFE
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_clip import write_clip
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.errors import StageError
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune.testing.waiting import no_waiting
from tokenprune_plugins.shared import ranks
from tokenprune_plugins.shared.ranks import rank_within


def queries(name: str, *overrides: str) -> None:
    config = tiny_config(depth=8)
    backbone = tiny_policy_parts(config)
    policy = Policy(backbone, load_pipeline(name, REGISTRY, overrides).config, REGISTRY)
    for slot in range(2):
        policy.reset(INSTRUCTION, slot)
    for query in range(3):
        policy.act_batch({slot: observation(config, slot) for slot in range(2)})
        for step in range(3):
            for slot in range(2):
                pose = np.full(7, float(query * step))
                policy.executed(np.full(7, 0.4), pose, observation=observation(config, 10 + step), slot=slot)
    with no_waiting(backbone):
        policy.act_batch({slot: observation(config, 20 + slot) for slot in range(2)})


@pytest.mark.parametrize("name", GRAPH_SAFE)
def test_no_query_waits_for_the_device(name: str) -> None:
    queries(name)


def test_a_clip_of_its_own_does_not_wait_either(tmp_path: Path) -> None:
    queries("trim", *(f"stages.0.{key}={value}" for key, value in write_clip(tmp_path).items()))


@pytest.mark.parametrize(
    "name", ["specprune-paper", "specprune-c3", "vla_cache", "prumerge", "prumerge-plus", "sp_vla"]
)
def test_a_union_waits_to_learn_its_count(name: str) -> None:
    with pytest.raises(AssertionError, match="is read"):
        queries(name)


@pytest.mark.parametrize("name", ["prumerge", "prumerge-plus", "sp_vla"])
def test_with_a_fixed_number_it_does_not_wait(name: str) -> None:
    queries(name, "stages.0.keep=9")


def test_a_planted_wait_is_refused() -> None:
    real = rank_within

    def waiting(score: torch.Tensor, member: torch.Tensor | None = None) -> torch.Tensor:
        return real(score, member) if score.any() else real(-score, member)

    with patch.object(ranks, "rank_within", waiting), pytest.raises(StageError, match="is read"):
        queries("specprune")
