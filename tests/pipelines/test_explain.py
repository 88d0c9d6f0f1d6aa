"""What `explain` says of a pipeline, beside what its queries do."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

from tests.helpers.backbones import BACKBONES
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_oft import INSTRUCTION
from tokenprune.errors import CapabilityError
from tokenprune.pipelines.explain import Explanation, explain, with_depth
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune.registry.hookspecs import HOT_HOOKS

QUERIES = 4
# These reuse steps of a flow head, which only pi0 has.
FLOWS = ("efficientvla", "head_cache")
# It needs weights of its own.
MISSING = "trim"
CASES = [("pi0" if name in FLOWS else "oft", name) for name in sorted(REGISTRY.pipelines) if name != MISSING]


def explained(family: str, name: str) -> Explanation:
    backbone, _, _ = BACKBONES[family]()
    return explain(load_pipeline(name, REGISTRY), backbone.info, backbone.layout(INSTRUCTION), INSTRUCTION, REGISTRY)


@contextmanager
def recorded_calls(policy: Policy) -> Any:
    """Collects each call of a stage's hook as the interpreter makes it: hook, stage, and the layer of `score_layer`."""
    names = {id(stage): name for stage, name in zip(policy.pipeline.stages, policy.pipeline.names, strict=True)}
    hooks: dict[CodeType, str] = {}
    for stage in policy.pipeline.stages:
        for hook in (*HOT_HOOKS, "reset"):
            method: Callable[..., Any] | None = getattr(type(stage), hook, None)
            if method is not None:
                hooks[inspect.unwrap(method).__code__] = hook
    calls: set[tuple[str, str, int | None]] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in hooks:
            hook, own = hooks[frame.f_code], frame.f_locals
            name = names[id(own[frame.f_code.co_varnames[0]])]
            layer = own[frame.f_code.co_varnames[1]].layer if hook == "score_layer" else None
            calls.add((hook, name, layer))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_hooks_named_are_those_that_are_called(family: str, name: str) -> None:
    backbone, observation, _ = BACKBONES[family]()
    policy = Policy(backbone, load_pipeline(name, REGISTRY).config, REGISTRY)
    with recorded_calls(policy) as calls:
        policy.reset(INSTRUCTION)
        for step in range(QUERIES):
            chunk = policy.act(observation)
            policy.executed(chunk.actions[0], np.zeros(8), step / 20, observation)
    table = {
        (call.hook, call.stage, layer)
        for call in explained(family, name).hooks
        for layer in (call.layers if call.hook == "score_layer" else (None,))
    }
    assert table == calls


def test_what_the_backbone_lacks_is_refused() -> None:
    with pytest.raises(CapabilityError, match="head_cache"):
        explained("oft", "head_cache")


def test_counts_add_up_to_the_whole_query() -> None:
    mode = explained("pi0", "fastv").modes["default"]
    gflops = dict(mode.gflops)
    total, dense = gflops.pop("total"), gflops.pop("dense")
    assert sum(gflops.values()) == pytest.approx(total)
    assert mode.flop_ratio == pytest.approx(dense / total)
    assert sum(layer.gflops for layer in mode.layers) == pytest.approx(gflops["decoder"])
    (cut,) = mode.cuts
    assert (cut.found, cut.keep) == (mode.layers[0].prunable, mode.layers[-1].prunable)


def test_another_depth_is_named_and_counted() -> None:
    backbone, _, _ = BACKBONES["oft"]()
    info = with_depth(backbone.info, 9)
    found = explain(load_pipeline("none", REGISTRY), info, backbone.layout(INSTRUCTION), INSTRUCTION, REGISTRY)
    assert "as if of 9 layers" in found.backbone
    assert len(found.modes["default"].layers) == 9
    assert replace(info, decoder=backbone.info.decoder, source=backbone.info.source) == backbone.info


def test_only_a_phase_behind_the_prefill_is_unprunable() -> None:
    assert "unprunable" not in explained("oft", "none").to_json()
    plain = json.loads(json.dumps(explained("pi0", "none").to_json()))
    assert plain["unprunable"]["phase"] == "flow"
    assert 0 < plain["unprunable"]["share_of_dense_flops"] < 1
