"""Whether a policy looks at its cameras."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tiny_oft import tiny_config, tiny_policy_parts
from tokenprune.compare.view_check import view_changes
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT

TASK = "open the drawer"
STATE = 8


@pytest.fixture
def backbone() -> OpenVLAOFT:
    return tiny_policy_parts(tiny_config(), dtype=torch.float32)


def changes(backbone: OpenVLAOFT) -> dict[str, float]:
    return view_changes(backbone, Registry(), TASK, STATE)


def test_the_change_is_that_of_one_view_at_a_time(backbone: OpenVLAOFT) -> None:
    black, white = np.zeros((256, 256, 3), np.uint8), np.full((256, 256, 3), 255, np.uint8)
    policy = Policy(backbone, DENSE, Registry())
    policy.reset(TASK)
    both, first, second = (
        policy.act({"images": {"primary": primary, "wrist": wrist}, "state": np.zeros(STATE)}).normalised
        for primary, wrist in ((black, black), (white, black), (black, white))
    )
    expected = {"primary": np.abs(first - both).max(), "wrist": np.abs(second - both).max()}
    assert changes(backbone) == pytest.approx(expected)
    assert min(expected.values()) > 0.01


@pytest.mark.parametrize("blind", [("wrist",), ("primary", "wrist")])
def test_a_view_that_is_ignored_changes_nothing(
    backbone: OpenVLAOFT, monkeypatch: pytest.MonkeyPatch, blind: tuple[str, ...]
) -> None:
    prepare = OpenVLAOFT.prepare

    def without(self: OpenVLAOFT, *arguments: Any) -> Any:
        inputs = prepare(self, *arguments)
        for view in blind:
            inputs.images[view].zero_()
        return inputs

    monkeypatch.setattr(OpenVLAOFT, "prepare", without)
    found = changes(backbone)
    assert [view for view, change in found.items() if not change] == list(blind)


@pytest.mark.parametrize("blind", [True, False])
def test_a_difference_between_equal_queries_does_not_count(
    backbone: OpenVLAOFT, monkeypatch: pytest.MonkeyPatch, blind: bool
) -> None:
    infer, queries = OpenVLAOFT.infer, []

    def unsteady(self: OpenVLAOFT, inputs: Any, query: Any) -> torch.Tensor:
        queries.append(None)
        actions = infer(self, inputs, query) + (1e-3 if len(queries) > 1 else 0)
        return actions * 0 + 1e-3 * (len(queries) > 1) if blind else actions

    monkeypatch.setattr(OpenVLAOFT, "infer", unsteady)
    assert [bool(change) for change in changes(backbone).values()] == [not blind] * 2


def test_every_query_draws_the_same_noise(backbone: OpenVLAOFT, monkeypatch: pytest.MonkeyPatch) -> None:
    infer, drawn = OpenVLAOFT.infer, []

    def noisy(self: OpenVLAOFT, inputs: Any, query: Any) -> torch.Tensor:
        drawn.append(query.noise(8, 7))
        return infer(self, inputs, query) + drawn[-1]

    monkeypatch.setattr(OpenVLAOFT, "infer", noisy)
    changes(backbone)
    assert len(drawn) == 4
    assert all(torch.equal(noise, drawn[0]) for noise in drawn)
