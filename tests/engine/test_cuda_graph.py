"""Recorded queries equal those that run call by call.

No GPU is needed: a tape of torch's operations stands for a CUDA graph, and the same things are baked into it,
everything that is read on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.backbones import BACKBONES
from tests.helpers.look import look
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.stages import TestConfig
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.engine.executor import GraphExecutor
from tokenprune.engine.query import DeviceOutcome
from tokenprune.engine.tensor_tree import copy_tensors, tensors_in
from tokenprune.errors import ConfigError
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import ActionChunk, Policy
from tokenprune.testing.tape import taped
from tokenprune_plugins.ttf import TTFConfig


def both(backbone: Any, config: PipelineConfig, rounds: list[tuple[Any, ...]]) -> list[list[ActionChunk]]:
    """The chunks of an eager and of a recorded policy, which see and do the same.

    A round is `("reset", instruction, slot)` or `("act", seed, slots)`.
    """
    policies = [Policy(backbone, config, REGISTRY) for _ in range(2)]
    policies[1].executor = GraphExecutor(backbone, taped)
    chunks: list[list[ActionChunk]] = [[], []]
    for policy, own in zip(policies, chunks, strict=True):
        for what, first, second in rounds:
            if what == "reset":
                policy.reset(first, second)
                continue
            seen = {slot: look(backbone, first + slot) for slot in second}
            answers = policy.act_batch(seen)
            own += answers.values()
            for slot in second:
                for step in range(3):
                    pace = 0.7 if first % 2 else -0.01
                    pose = np.full(7, float(first * step))
                    policy.executed(np.full(7, pace), pose, observation=look(backbone, first + step), slot=slot)
    return chunks


def same(chunks: list[list[ActionChunk]]) -> list[str]:
    """How the second policy's queries ran, after they are found equal to the first's."""
    for eager, own in zip(*chunks, strict=True):
        assert np.array_equal(eager.normalised, own.normalised)
        assert eager.trace.mode == own.trace.mode
        assert eager.trace.kept.keys() == own.trace.kept.keys()
        for after, ids in eager.trace.kept.items():
            assert torch.equal(ids, own.trace.kept[after])
        told, heard = (chunk.trace.to_json(with_ids=True) for chunk in (eager, own))
        for name in ("query_ms", "phases_ms", "execution"):
            del told[name], heard[name]
        assert told == heard
    return [chunk.trace.execution for chunk in chunks[1]]


NOT_RECORDABLE = {
    "specprune-paper", "specprune-c3", "vla_cache", "layer_cosine", "prumerge", "prumerge-plus", "sp_vla",
    "sp_vla-scheduled", "trim",
}  # fmt: skip

# Each stage alone is recorded by the check of its promises; here they are combined.
COMBINED = sorted(
    name
    for name in set(REGISTRY.pipelines) - NOT_RECORDABLE
    if len(load_pipeline(name, REGISTRY).config.stages) > 1 or name in ("none", "sparsevlm-recycle", "vla_pruner")
)

EPISODE = [
    ("reset", INSTRUCTION, 0),
    *(("act", seed, (0,)) for seed in range(6)),
    ("reset", INSTRUCTION, 0),
    *(("act", seed, (0,)) for seed in range(10, 15)),
]

# OpenVLA-OFT has no flow steps that a head cache could spare.
CASES = [(family, name) for family in ("oft", "pi0") for name in COMBINED if (family, name) != ("oft", "efficientvla")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_replay_is_the_query(family: str, name: str) -> None:
    backbone, _, _ = BACKBONES[family]()
    chunks = both(backbone, load_pipeline(name, REGISTRY).config, EPISODE)
    assert "cuda_graph" in same(chunks)


@pytest.mark.parametrize("family", sorted(BACKBONES))
def test_every_backbone_can_be_recorded(family: str) -> None:
    backbone, _, _ = BACKBONES[family]()
    # pi0.5 spells its state in the prompt, so only states of the same length make queries of the same kind.
    rounds = 2 * EPISODE[:7] if family == "pi05" else EPISODE
    ran = same(both(backbone, load_pipeline("specprune", REGISTRY).config, rounds))
    assert ran.count("cuda_graph") >= 5
    # What the first episode recorded serves the second.
    assert set(ran[6:]) == {"cuda_graph"}


def test_a_mode_switch_and_a_reset_record_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_policy_parts(tiny_config(depth=8))
    config = load_pipeline("specprune", REGISTRY).config
    recorded: list[None] = []

    def counting(run: Callable[[], DeviceOutcome]) -> Any:
        recorded.append(None)
        return taped(run)

    policy = Policy(backbone, config, REGISTRY)
    policy.executor = GraphExecutor(backbone, counting)
    modes = set()
    for episode in range(4):
        policy.reset(INSTRUCTION)
        for seed in range(6):
            modes.add(policy.act(look(backbone, seed)).trace.mode)
            for step in range(2):
                policy.executed(np.full(7, 0.8 if seed % 3 else 0.0), observation=look(backbone, seed + step))
        if episode == 0:
            known = len(recorded)
    assert modes == {"coarse", "fine"}
    assert len(recorded) == known


def test_other_instructions_views_and_batches_never_get_a_stale_recording() -> None:
    backbone = tiny_policy_parts(tiny_config(depth=8))
    short, long = "push it", "pick up the black bowl next to the ramekin and put it on the plate"
    rounds = [
        ("reset", short, 0), ("act", 0, (0,)), ("act", 1, (0,)), ("act", 2, (0,)),
        ("reset", long, 0), ("act", 3, (0,)), ("act", 4, (0,)), ("act", 5, (0,)),
        ("reset", "take it", 0), ("act", 6, (0,)), ("act", 7, (0,)),
        ("reset", short, 1), ("act", 8, (1,)), ("act", 9, (0, 1)), ("act", 10, (0, 1)), ("act", 11, (1,)),
        ("reset", short, 0), ("act", 12, (0, 1)), ("act", 13, (0, 1)), ("act", 14, (0, 1)),
    ]  # fmt: skip
    for name in ("specprune", "random", "vla_pruner"):
        assert "cuda_graph" in same(both(backbone, load_pipeline(name, REGISTRY).config, rounds))


def test_what_a_stage_reads_on_the_host_keeps_recordings_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_policy_parts(tiny_config(depth=4))
    config = pipeline(TTFConfig(use="ttf", keyframe=3, threshold=0.1))
    same(both(backbone, config, EPISODE))
    monkeypatch.setattr("tokenprune.engine.cuda_graph.graph_key", lambda pipeline, plan, given: plan.mode)
    monkeypatch.setattr("tokenprune.engine.executor.graph_key", lambda pipeline, plan, given: plan.mode)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        same(both(backbone, config, EPISODE))


def test_noise_is_new_in_every_replay() -> None:
    backbone, seen, _ = BACKBONES["pi0"]()
    policy = Policy(backbone, pipeline(), REGISTRY)
    policy.executor = GraphExecutor(backbone, taped)
    policy.reset(INSTRUCTION)
    chunks = [policy.act(seen) for _ in range(4)]
    assert [chunk.trace.execution for chunk in chunks] == ["eager", "eager", "cuda_graph", "cuda_graph"]
    assert not np.array_equal(chunks[2].normalised, chunks[3].normalised)


@pytest.mark.parametrize("name", ["specprune-paper", "vla_cache"])
def test_a_count_that_depends_on_data_is_refused_before_a_query(name: str) -> None:
    backbone = tiny_policy_parts(tiny_config(depth=8))
    policy = Policy(backbone, load_pipeline(name, REGISTRY).config, REGISTRY)
    policy.executor = GraphExecutor(backbone, taped)
    with pytest.raises(ConfigError, match="cuda_graph needs counts that are known before the query"):
        policy.reset(INSTRUCTION)


def test_a_stage_that_works_on_the_host_is_refused() -> None:
    backbone = tiny_policy_parts(tiny_config(depth=8))
    policy = Policy(backbone, load_pipeline("layer_cosine", REGISTRY).config, REGISTRY)
    policy.executor = GraphExecutor(backbone, taped)
    with pytest.raises(ConfigError, match="cuda_graph cannot hold 'layer_cosine'"):
        policy.reset(INSTRUCTION)


def test_cuda_graphs_need_cuda() -> None:
    backbone = tiny_policy_parts(tiny_config())
    with pytest.raises(ConfigError, match="cuda_graph needs a CUDA device; the policy is on 'cpu'"):
        Policy(backbone, pipeline(), REGISTRY, "cuda_graph")
    with pytest.raises(ConfigError, match=r"no execution 'cuda-graph'.*did you mean 'cuda_graph'"):
        Policy(backbone, pipeline(), REGISTRY, "cuda-graph")


def test_copies_around_a_replay_are_few_launches() -> None:
    def values(scale: float) -> dict[str, Any]:
        numbers = [torch.full((2, width), scale * width) for width in range(1, 40)]
        return {"numbers": numbers, "past": {"ids": tuple(one.long() for one in numbers), "nothing": None}}

    launched: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            launched.append(str(operation))
            return operation(*args, **(kwargs or {}))

    places, given = values(0.0), values(3.0)
    with Counting():
        copy_tensors(places, given)
    assert len(launched) == 2, "one for each dtype"
    for place, tensor in zip(tensors_in(places), tensors_in(given), strict=True):
        assert torch.equal(place, tensor)
    with pytest.raises(ValueError, match="zip"):
        copy_tensors(places, given["numbers"])


def full(run: Callable[[], DeviceOutcome]) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def full_and_broken(run: Callable[[], DeviceOutcome]) -> Any:
    """The capture cannot even be ended after an allocation in it has failed."""
    try:
        full(run)
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


def broken(run: Callable[[], DeviceOutcome]) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_recording_that_fails_otherwise_is_an_error() -> None:
    backbone = tiny_policy_parts(tiny_config())
    policy = Policy(backbone, pipeline(), REGISTRY)
    policy.executor = GraphExecutor(backbone, broken)
    policy.reset(INSTRUCTION)
    with pytest.raises(RuntimeError, match="not permitted"):
        policy.act(observation(backbone.config))


@pytest.mark.parametrize("full", [full, full_and_broken])
def test_without_memory_for_a_graph_queries_run_call_by_call(full: Any) -> None:
    backbone = tiny_policy_parts(tiny_config())
    policy = Policy(backbone, pipeline(TestConfig(use="test.memory")), REGISTRY)
    policy.executor = GraphExecutor(backbone, full)
    policy.reset(INSTRUCTION)
    with pytest.warns(UserWarning, match="no memory to capture pipeline 'drawn', mode 'default'"):
        first = policy.act(observation(backbone.config))
    assert first.trace.execution == "eager (no memory for a graph)"
    eager = Policy(backbone, pipeline(TestConfig(use="test.memory")), REGISTRY)
    eager.reset(INSTRUCTION)
    assert np.array_equal(first.normalised, eager.act(observation(backbone.config)).normalised)
