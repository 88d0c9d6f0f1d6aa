"""The hook table that bind computes and `explain` prints is what queries really call, for every shipped pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokenprune.errors import CapabilityError, LayoutError, MissingError
from tokenprune.loading import load_backbone
from tokenprune.pipelines.binding import BoundPipeline, HookCall
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune.stages.token_context import LayerContext
from tokenprune.testing.matrix import random_observation

REGISTRY = Registry.discover()
FAMILIES = ("openvla", "openvla-oft", "pi0", "pi05")
QUERIES = 2

Calls = set[tuple[str, int, int | None]]


def listed(pipeline: BoundPipeline) -> Calls:
    """Hook, stage and layer of every call that bind announces."""
    return {
        (call.hook, call.stage, layer)
        for calls in pipeline.hooks.values()
        for call in calls
        for layer in (call.layers or (None,))
    }


def called(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The same of every call that a reset, queries and executed actions make."""
    found: Calls = set()
    real = BoundPipeline.call

    def noted(self: BoundPipeline, call: HookCall, argument: Any, where: str = "") -> Any:
        if self is policy.pipeline and call.hook != "merge":
            found.add((call.hook, call.stage, argument.layer if isinstance(argument, LayerContext) else None))
        return real(self, call, argument, where)

    with monkeypatch.context() as patched:
        patched.setattr(BoundPipeline, "call", noted)
        policy.reset("put the bowl on the plate")
        rng = np.random.default_rng(0)
        for _ in range(QUERIES):
            chunk = policy.act(random_observation(policy.backbone, rng))
            policy.executed(chunk.actions[0], observation=random_observation(policy.backbone, rng))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_call_what_bind_lists(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(family, REGISTRY, None, "tiny", "cpu", "float32", 0, {})
    refused, compared = {}, []
    for name in sorted(REGISTRY.pipelines):
        try:
            policy = Policy(backbone, load_pipeline(name, REGISTRY).config, REGISTRY)
        except (CapabilityError, LayoutError, MissingError) as error:
            refused[name] = error
            continue
        assert called(policy, monkeypatch) == listed(policy.pipeline), name
        compared.append(name)
    assert len(compared) >= 35, refused


def test_a_hook_that_is_not_listed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone("pi0", REGISTRY, None, "tiny", "cpu", "float32", 0, {})
    policy = Policy(backbone, load_pipeline("tome", REGISTRY).config, REGISTRY)
    selecting = ("select_tokens", 0, None)
    assert selecting in listed(policy.pipeline)
    assert called(policy, monkeypatch) - {selecting} != listed(policy.pipeline)
